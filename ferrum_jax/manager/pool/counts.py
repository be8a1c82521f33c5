"""What the host knows of one device's cache without asking the device.

The counts follow from the calls, so that the host knows whether a request fits. They are not a
second truth: `DevicePool.check` compares them with the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from ferrum_jax.arithmetic import PerPool, ceil_div
from ferrum_jax.codecs import CODECS, format_of
from ferrum_jax.layers import first_needed_block, most_window_blocks
from ferrum_jax.manager.pool.block_ids import BlockIds
from ferrum_jax.manager.pool.shapes import GroupRow, RowShape, block_sizes_of
from ferrum_jax.state import CacheState
from ferrum_jax.types import BlockId, TokenFormat


class PoolCounts:
    """Counts of the blocks and rows of a device's pools; host only. Not thread-safe.

    S sequences, G layer groups, pool by pool: row `g * S + s` is sequence s in group g. These are
    the rows of the page tables of all pools, one after the other.

    Only the pool changes the counts, after the program that makes the same change on the device.

    Args:
      state: An empty cache.
      max_blocks: Blocks that each pool may grow to.

    Attributes:
      num_blocks: Blocks in each pool now.
      max_blocks: As given.
      max_seqs: Sequences (S).
      block_size: Tokens per native block.
      block_sizes: Tokens per block of each format that groups with all tokens may have; the least
        number of their pools.
      windows: Sliding window of each layer group; None for a group that keeps all tokens.
      pools: Index of each group's pool.
      num_groups: Groups in each pool.
      has_windows: Whether a group has a sliding window.
      full_groups: Groups that keep all tokens, which compression may change.
      num_full_groups: How many of these each pool has.
      full_pools: Pools that have some.
      ids: The blocks' ids on the host, which are those of `taken` and of the prefix cache.
      num_free: Blocks of each pool that are free now.
      held_lens: int[G * S]. Tokens in the blocks of each row, or in blocks that it has released.
      num_blocks_held: int[G * S]. Blocks of each row.
      num_released: int[G * S]. Leading blocks that each row has released.
      token_formats: int[G * S]. The `TokenFormat` of each row.
      num_pruned: int[G * S]. Tokens of each row's sequence that compression dropped.
      num_cached_blocks: int[S]. Leading blocks of each sequence that are in the prefix cache too.
      num_prefix_blocks: Blocks of each pool in the prefix cache, which has one reference to each.
      none: 0 for each pool.
      taken: Ids of the blocks that callers took without a row.
      may_share: Whether rows may share blocks that are not in the prefix cache.
    """

    def __init__(self, state: CacheState, max_blocks: PerPool):
        all_tables = state.page_tables
        self.num_blocks = self.num_free = PerPool([tables.num_blocks for tables in all_tables])
        self.max_blocks, self.max_seqs = max_blocks, state.max_seqs
        self._num_growable = max_blocks - self.num_blocks
        self.block_size = all_tables[0].block_size
        self.windows = tuple(window for tables in all_tables for window in tables.windows)
        self.num_groups = PerPool([tables.num_groups for tables in all_tables])
        self.pools = tuple(pool for pool, n in enumerate(self.num_groups) for _ in range(n))
        self.ids = BlockIds(max_blocks, self.pools)
        self._num_rows = len(self.windows) * self.max_seqs
        self.held_lens = np.zeros(self._num_rows, int)
        self.num_blocks_held = np.zeros(self._num_rows, int)
        self.num_released = np.zeros(self._num_rows, int)
        self.token_formats = np.zeros(self._num_rows, int)
        self.num_pruned = np.zeros(self._num_rows, int)
        self.num_cached_blocks = np.zeros(self.max_seqs, int)
        self.num_prefix_blocks = self.none = PerPool([0] * len(all_tables))
        self.taken: set[BlockId] = set()
        self.may_share = False
        self.has_windows = any(window is not None for window in self.windows)
        self.full_groups = tuple(g for g, window in enumerate(self.windows) if window is None)
        self.num_full_groups = self.by_pool([window is None for window in self.windows])
        self.full_pools = tuple(dict.fromkeys(self.pools[group] for group in self.full_groups))
        self._main_group = self.full_groups[0] if self.full_groups else 0
        self._main_row = self._main_group * self.max_seqs
        self._sizes = [block_sizes_of(state.pools[pool]) for pool in self.pools]
        full = [block_sizes_of(state.pools[pool]) for pool in self.full_pools or (0,)]
        least = map(min, zip(*full, strict=True))
        self.block_sizes = {f: size for f, size in zip(CODECS, least, strict=True) if size}
        self._free_rows: list[int] = list(range(self.max_seqs - 1, -1, -1))

    @property
    def num_used(self) -> PerPool:
        """Blocks in use."""
        return self.num_blocks - self.num_free

    @property
    def num_available(self) -> PerPool:
        """Blocks that can be allocated, growth of the pools included."""
        return self.num_free + self._num_growable

    @property
    def num_free_rows(self) -> int:
        """Sequences that can be started."""
        return len(self._free_rows)

    @property
    def next_row(self) -> int:
        """The sequence that `start_row` takes next."""
        return self._free_rows[-1]

    def next_rows(self, num_rows: int) -> list[int]:
        """Returns the sequences that are started next, in this order."""
        return self._free_rows[: -num_rows - 1 : -1]

    @property
    def stray_rows(self) -> list[int]:
        """Sequences that hold blocks on the device and were not started here."""
        return [row for row in self._free_rows if self.num_blocks_held[row]]

    @property
    def of_rows(self) -> dict[str, np.ndarray]:
        """What the tables say of each row, as the host counts it: int[G * S] by name."""
        of_rows = {
            "held_lens": self.held_lens,
            "num_blocks_held": self.num_blocks_held,
            "token_formats": self.token_formats,
            "num_pruned": self.num_pruned,
        }
        return {**of_rows, "num_released": self.num_released} if self.has_windows else of_rows

    @property
    def blocks_of_groups(self) -> list[int]:
        """Blocks of the rows of each group; one that rows share is counted for each."""
        return self.num_blocks_held.reshape(-1, self.max_seqs).sum(axis=1).tolist()

    @property
    def seqs_with_blocks(self) -> list[int]:
        """Sequences that hold blocks."""
        return np.flatnonzero(self.num_blocks_held[: self.max_seqs]).tolist()

    def rows_of(self, seq_id: int) -> range:
        """Returns a sequence's row in each group."""
        return range(seq_id, self._num_rows, self.max_seqs)

    def main_row(self, seq_id: int) -> int:
        """Returns a sequence's row in the first group that keeps all tokens, else in group 0."""
        return self._main_row + seq_id

    def full_rows(self, seq_id: int) -> list[int]:
        """Returns a sequence's rows in the groups that keep all tokens."""
        return [seq_id + group * self.max_seqs for group in self.full_groups]

    def released(self, seq_id: int) -> list[int]:
        """Returns how many leading blocks a sequence has released in each group."""
        return self.num_released[seq_id :: self.max_seqs].tolist()

    def row_shape(self, seq_id: int) -> RowShape:
        """Returns the length and token format of a sequence."""
        row = self._main_row + seq_id
        num_released = tuple(self.released(seq_id)) if self.has_windows else ()
        return RowShape(
            held_len=int(self.held_lens[row]),
            token_format=format_of(self.token_formats[row]),
            num_pruned=int(self.num_pruned[row]),
            num_released=num_released,
        )

    def rows_for(self, shape: RowShape) -> list[GroupRow]:
        """Returns what the tables say of a sequence of a shape in each group."""
        full = GroupRow(shape.token_format, shape.num_pruned, shape.held_len, 0)
        if not self.has_windows:
            return [full] * len(self.windows)
        passed = shape.num_released or [0] * len(self.windows)
        return [
            full if window is None else GroupRow(TokenFormat.Native, 0, shape.seq_len, num_released)
            for window, num_released in zip(self.windows, passed, strict=True)
        ]

    def seq_len(self, seq_id: int) -> int:
        """Returns the tokens of a sequence, dropped ones included."""
        return int(self.held_lens[seq_id] + self.num_pruned[seq_id])

    def num_held(self, seq_id: int) -> PerPool:
        """Returns the blocks that a sequence holds in all groups."""
        return self.by_pool(self.num_blocks_held[seq_id :: self.max_seqs].tolist())

    def num_stored(self, seq_id: int) -> int:
        """Returns the tokens in a sequence's blocks in the group of `main_row`."""
        row = self._main_row + seq_id
        return int(self.held_lens[row] - self.num_released[row] * self.block_size)

    def capacity(self, seq_id: int) -> int:
        """Returns the tokens for which a sequence's blocks in the group of `main_row` have room."""
        row = self._main_row + seq_id
        return int(self.num_blocks_held[row]) * self.tokens_per_block(seq_id)

    def tokens_per_block(self, seq_id: int) -> int:
        """Returns the tokens of a block of a sequence in the group of `main_row`."""
        return self._sizes[self._main_group][self.token_formats[self._main_row + seq_id]]

    def blocks_for(self, num_tokens: int, step: int | None = None) -> PerPool:
        """Returns the most blocks of a new sequence of `num_tokens`, `step` added at once."""
        size, whole = self.block_size, ceil_div(num_tokens, self.block_size)
        if step is None or not self.has_windows:
            return self.num_groups.times(whole)
        most = [whole if w is None else most_window_blocks(w, step, size) for w in self.windows]
        return self.by_pool([min(whole, num_blocks) for num_blocks in most])

    def blocks_of(self, shape: RowShape) -> PerPool:
        """Returns how many blocks a sequence of a shape takes; its format may be disabled yet."""
        return self.by_pool(
            [
                ceil_div(row.held_len, sizes[row.token_format]) - row.num_released
                for row, sizes in zip(self.rows_for(shape), self._sizes, strict=True)
            ]
        )

    def blocks_of_row(self, num_tokens: int, token_format: TokenFormat) -> PerPool:
        """Returns how many blocks hold tokens in one group that keeps all, if it is in a pool."""
        num_blocks = list(self.none)
        for group in self.full_groups:
            num_blocks[self.pools[group]] = ceil_div(num_tokens, self._sizes[group][token_format])
        return PerPool(num_blocks)

    def num_new_blocks(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> PerPool:
        """Returns how many blocks sequences lack for more tokens in each."""
        num_new = [0] * len(self.num_blocks)
        for seq_id, count in zip(seq_ids, num_tokens, strict=True):
            for group, pool in enumerate(self.pools):
                num_new[pool] += self._num_lacking(group, seq_id, count)
        return PerPool(num_new)

    def by_pool(self, of_groups: Sequence[int]) -> PerPool:
        """Returns the sums in each pool of numbers of groups."""
        sums = [0] * len(self.num_blocks)
        for pool, number in zip(self.pools, of_groups, strict=True):
            sums[pool] += number
        return PerPool(sums)

    def num_passed(self, seq_id: int) -> list[int]:
        """Returns how many blocks each row of a sequence releases when it is extended."""
        return [
            max(0, first_needed_block(int(self.held_lens[row]), window, self.block_size) - released)
            for row, window, released in zip(
                self.rows_of(seq_id), self.windows, self.released(seq_id), strict=True
            )
        ]

    def num_freed_by_windows(self, seq_id: int) -> PerPool:
        """Returns how many of the blocks of `num_passed` are not in the prefix cache."""
        num_cached, released = int(self.num_cached_blocks[seq_id]), self.released(seq_id)
        pairs = zip(released, self.num_passed(seq_id), strict=True)
        return self.by_pool(
            [max(0, first + count - max(first, num_cached)) for first, count in pairs]
        )

    def needs_no_free_block(self, seq_id: int, num_tokens: int) -> bool:
        """Returns whether a sequence has room for more tokens, or frees what it takes."""
        num_new = self.num_new_blocks([seq_id], [num_tokens])
        if self.has_windows and not self.may_share:
            num_new -= self.num_freed_by_windows(seq_id)
        return num_new.fits_in(self.none)

    def holds_needed(self, seq_id: int, num_tokens: int) -> bool:
        """Returns whether a sequence holds what tokens from `num_tokens` on can see."""
        return num_tokens == 0 or all(
            count <= first_needed_block(num_tokens, window, self.block_size)
            for window, count in zip(self.windows, self.released(seq_id), strict=True)
        )

    def note_sharing(self) -> None:
        """Updates `may_share` from the other counts."""
        num_released = self.num_released.reshape(-1, self.max_seqs)
        num_cached = np.maximum(self.num_cached_blocks - num_released, 0).ravel()
        num_own = self.num_blocks_held - num_cached
        num_own = self.by_pool(num_own.reshape(-1, self.max_seqs).sum(axis=1).tolist())
        own = num_own + self.num_prefix_blocks + self.ids.count(self.taken)
        self.may_share = own != self.num_used

    def num_own(self, seq_ids: Iterable[int]) -> PerPool:
        """Returns how many blocks sequences hold in all groups outside the prefix cache."""
        num_own = [0] * len(self.num_blocks)
        for seq_id in seq_ids:
            num_cached = int(self.num_cached_blocks[seq_id])
            for pool, row in zip(self.pools, self.rows_of(seq_id), strict=True):
                num_released = int(self.num_released[row])
                num_own[pool] += int(self.num_blocks_held[row]) - max(0, num_cached - num_released)
        return PerPool(num_own)

    def set_size(self, pool: int, num_blocks: int) -> None:
        """Notes how many blocks a pool has now, the new ones free."""
        sizes = list(self.num_blocks)
        sizes[pool] = num_blocks
        self.num_free += PerPool(sizes) - self.num_blocks
        self.num_blocks = PerPool(sizes)
        self._num_growable = self.max_blocks - self.num_blocks

    def in_first_pool(self, num_blocks: int) -> PerPool:
        """Returns a number of blocks of the first pool, and none of the others."""
        return PerPool([num_blocks, *self.none[1:]])

    def place_of_row(self, row: int) -> tuple[int, int]:
        """Returns the pool of a row, and the row in that pool's tables."""
        pool = self.pools[row // self.max_seqs]
        return pool, row - sum(self.num_groups[:pool]) * self.max_seqs

    def rows_in_pools(self, rows: np.ndarray) -> list[np.ndarray]:
        """Returns the rows (int[R]) of each pool's tables, given rows of all pools."""
        sizes = [count * self.max_seqs for count in self.num_groups]
        firsts = [0, *itertools.accumulate(sizes)]
        pairs = itertools.pairwise(firsts)
        return [rows[(rows >= first) & (rows < end)] - first for first, end in pairs]

    def set_cached(self, seq_id: int, num_blocks: int) -> None:
        """Notes how many leading blocks of a row are in the prefix cache."""
        self.num_cached_blocks[seq_id] = num_blocks

    def start_row(self, shape: RowShape, num_cached: int = 0) -> None:
        """Counts `next_row` as started; its first `num_cached` blocks are cached ones."""
        seq_id, num_found = self._free_rows.pop(), num_cached * self.block_size
        self.num_cached_blocks[seq_id], parts = num_cached, self.rows_for(shape)
        for row, part in zip(self.rows_of(seq_id), parts, strict=True):
            self.token_formats[row], self.num_pruned[row] = part.token_format, part.num_pruned
            self.num_released[row] = part.num_released
            self.num_blocks_held[row] = max(0, num_cached - part.num_released)
            self.held_lens[row] = num_found
        self._add_to_rows(seq_id, [part.held_len - num_found for part in parts])

    def add_tokens(self, seq_id: int, num_tokens: int) -> PerPool:
        """Counts more tokens in a sequence, and the blocks allocated for them.

        Returns:
          How many blocks outside the prefix cache its windows have passed: they are released, and
          not yet counted as free.
        """
        num_freed = self.none
        if self.has_windows and num_tokens:
            num_freed = self.num_freed_by_windows(seq_id)
            for row, count in zip(self.rows_of(seq_id), self.num_passed(seq_id), strict=True):
                self.num_released[row] += count
                self.num_blocks_held[row] -= count
        self._add_to_rows(seq_id, [num_tokens] * len(self.windows))
        return num_freed

    def tails(self, seq_id: int) -> list[int]:
        """Returns the tokens in a sequence's partly filled last block in each group, 0 if full."""
        rows = zip(self.rows_of(seq_id), self._sizes, strict=True)
        return [int(self.held_lens[r]) % sizes[self.token_formats[r]] for r, sizes in rows]

    def fork_row(self, seq_id: int) -> int:
        """Counts `next_row` as started with a sequence's blocks and copies of its partial ones."""
        forked = self._free_rows.pop()
        for counts in self.of_rows.values():
            counts[self.rows_of(forked)] = counts[self.rows_of(seq_id)]
        self.num_cached_blocks[forked] = self.num_cached_blocks[seq_id]
        self.num_free -= self.by_pool([tail > 0 for tail in self.tails(seq_id)])
        self.note_sharing()
        return forked

    def end_rows(self, seq_ids: Sequence[int]) -> PerPool:
        """Counts sequences as free; returns how many blocks they held outside the prefix cache."""
        num_own = self.num_own(seq_ids)
        rows = [row for seq_id in seq_ids for row in self.rows_of(seq_id)]
        for counts in self.of_rows.values():
            counts[rows] = 0
        self.num_cached_blocks[list(seq_ids)] = 0
        self._free_rows.extend(seq_ids)
        return num_own

    def replace(self, num_free: PerPool, of_rows: dict[str, np.ndarray]) -> None:
        """Replaces the counts by what the tables say; see `of_rows`."""
        self.num_free = num_free
        for name, counts in of_rows.items():
            setattr(self, name, counts)
        # A step may have truncated rows, and replaced a block that was cut through by a copy.
        num_full = self.held_lens[: self.max_seqs] // self.block_size
        self.num_cached_blocks = np.minimum(self.num_cached_blocks, num_full)
        self.note_sharing()

    def _num_lacking(self, group: int, seq_id: int, num_tokens: int) -> int:
        """Returns how many blocks a sequence lacks in a group for `num_tokens` more tokens."""
        row = group * self.max_seqs + seq_id
        size = self._sizes[group][self.token_formats[row]]
        end = int(self.num_blocks_held[row] + self.num_released[row])
        return max(0, ceil_div(int(self.held_lens[row]) + num_tokens, size) - end)

    def _add_to_rows(self, seq_id: int, num_tokens: Sequence[int]) -> None:
        """Counts more tokens in a sequence's rows, and the blocks allocated for them."""
        num_new = [0] * len(self.num_blocks)
        for group, row in enumerate(self.rows_of(seq_id)):
            count = self._num_lacking(group, seq_id, num_tokens[group])
            num_new[self.pools[group]] += count
            self.num_blocks_held[row] += count
            self.held_lens[row] += num_tokens[group]
        self.num_free -= PerPool(num_new)
