"""What the host knows of one device's pool without asking the device.

The counts follow from the calls, so that the host knows whether a request fits. They are not a
second truth: `DevicePool.check` compares them with the tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.codecs import CODECS, format_of
from ferrum_jax.layers import first_needed_block
from ferrum_jax.state import CacheState
from ferrum_jax.types import TokenFormat


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Length and token format of one sequence, in all layer groups.

    Compression changes the groups that keep all tokens. In those with a sliding window a sequence
    is always native, and no token is dropped but those that the window has passed.

    Attributes:
      held_len: Tokens in the blocks of a group that keeps all tokens.
      token_format: How these tokens are stored.
      num_pruned: Tokens of the sequence that compression dropped.
      num_released: Leading blocks that were released in each group; empty without a window.
    """

    held_len: int
    token_format: TokenFormat = TokenFormat.Native
    num_pruned: int = 0
    num_released: tuple[int, ...] = ()

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence, dropped ones included."""
        return self.held_len + self.num_pruned

    @property
    def is_compressed(self) -> bool:
        """Whether the blocks differ from what a model has written."""
        return not CODECS[self.token_format].is_native or self.num_pruned > 0


class GroupRow(NamedTuple):
    """What the tables say of a sequence's row in one layer group.

    Attributes:
      token_format: The `TokenFormat`.
      num_pruned: Tokens that compression dropped.
      held_len: Tokens in the row's blocks, those in released blocks included.
      num_released: Leading blocks that were released.
    """

    token_format: TokenFormat
    num_pruned: int
    held_len: int
    num_released: int


class PoolCounts:
    """Counts of a pool's blocks and rows; host only. Not thread-safe.

    S sequences, G layer groups: row `g * S + s` is sequence s in group g, as in `PageTables`. Only
    the pool changes the counts, after the program that makes the same change on the device.

    Args:
      num_blocks: Blocks in the empty pool.
      max_blocks: Blocks that the pool may grow to.
      max_seqs: Sequences (S).
      block_sizes: Tokens per block of each format that the pool's geometry allows.
      windows: Sliding window of each layer group; None for a group that keeps all tokens.

    Attributes:
      num_blocks: Blocks in the pool now.
      max_blocks: As given.
      max_seqs: As given.
      block_sizes: As given.
      windows: As given.
      has_windows: Whether a group has a sliding window.
      full_groups: Groups that keep all tokens, which compression may change.
      num_free: Blocks that are free now.
      held_lens: int[G * S]. Tokens in the blocks of each row, or in blocks that it has released.
      num_blocks_held: int[G * S]. Blocks of each row.
      num_released: int[G * S]. Leading blocks that each row has released.
      token_formats: int[G * S]. The `TokenFormat` of each row.
      num_pruned: int[G * S]. Tokens of each row's sequence that compression dropped.
      num_cached_blocks: int[S]. Leading blocks of each sequence that are in the prefix cache too.
      num_prefix_blocks: Blocks in the prefix cache, which has one reference to each.
      taken: Ids of the blocks that callers took without a row.
      may_share: Whether rows may share blocks that are not in the prefix cache.
    """

    def __init__(
        self,
        num_blocks: int,
        max_blocks: int,
        max_seqs: int,
        block_sizes: dict[TokenFormat, int],
        windows: tuple[int | None, ...],
    ):
        self.num_blocks = self.num_free = num_blocks
        self.max_blocks, self.max_seqs = max_blocks, max_seqs
        self.block_sizes, self.windows = block_sizes, windows
        self._sizes = [block_sizes.get(token_format, 0) for token_format in CODECS]
        self._num_rows = len(windows) * max_seqs
        self.held_lens = np.zeros(self._num_rows, int)
        self.num_blocks_held = np.zeros(self._num_rows, int)
        self.num_released = np.zeros(self._num_rows, int)
        self.token_formats = np.zeros(self._num_rows, int)
        self.num_pruned = np.zeros(self._num_rows, int)
        self.num_cached_blocks = np.zeros(max_seqs, int)
        self.num_prefix_blocks = 0
        self.taken: set[int] = set()
        self.may_share = False
        self.has_windows = any(window is not None for window in windows)
        full = [group for group, window in enumerate(windows) if window is None]
        self.full_groups = tuple(full)
        self._main_row = full[0] * max_seqs if full else 0
        self._free_rows: list[int] = list(range(max_seqs - 1, -1, -1))

    @classmethod
    def of(cls, state: CacheState, max_blocks: int) -> PoolCounts:
        """Returns the counts of an empty cache, which may grow to `max_blocks`."""
        pool, tables, sizes = state.pool, state.tables, {}
        for token_format in CODECS:
            with contextlib.suppress(ValueError):  # The geometry does not allow the format.
                sizes[token_format] = pool.tokens_per_block(token_format)
        return cls(pool.num_blocks, max_blocks, tables.max_seqs, sizes, tables.windows)

    @property
    def block_size(self) -> int:
        """Tokens per native block."""
        return self.block_sizes[TokenFormat.Native]

    @property
    def num_used(self) -> int:
        """Blocks in use."""
        return self.num_blocks - self.num_free

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated, growth of the pool included."""
        return self.max_blocks - self.num_used

    @property
    def num_free_rows(self) -> int:
        """Sequences that can be started."""
        return len(self._free_rows)

    @property
    def next_row(self) -> int:
        """The sequence that `start_row` takes next."""
        return self._free_rows[-1]

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

    def num_held(self, seq_id: int) -> int:
        """Returns the blocks that a sequence holds in all groups."""
        return sum(self.num_blocks_held[seq_id :: self.max_seqs].tolist())

    def num_stored(self, seq_id: int) -> int:
        """Returns the tokens in a sequence's blocks in the group of `main_row`."""
        row = self._main_row + seq_id
        return int(self.held_lens[row] - self.num_released[row] * self.block_size)

    def capacity(self, seq_id: int) -> int:
        """Returns the tokens for which a sequence's blocks in the group of `main_row` have room."""
        row = self._main_row + seq_id
        return int(self.num_blocks_held[row]) * self._sizes[self.token_formats[row]]

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks a new sequence of `num_tokens` takes in all groups."""
        return len(self.windows) * ceil_div(num_tokens, self.block_size)

    def blocks_of(self, shape: RowShape) -> int:
        """Returns how many blocks a sequence of a shape takes; its format may be disabled yet."""
        return sum(
            ceil_div(row.held_len, self.block_sizes[row.token_format]) - row.num_released
            for row in self.rows_for(shape)
        )

    def num_new_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Returns how many blocks a sequence lacks for `num_tokens` more tokens."""
        num_new = 0
        for row in self.rows_of(seq_id):
            num_new += self._num_lacking(row, num_tokens)
        return num_new

    def num_passed(self, seq_id: int) -> list[int]:
        """Returns how many blocks each row of a sequence releases when it is extended."""
        return [
            max(0, first_needed_block(int(self.held_lens[row]), window, self.block_size) - released)
            for row, window, released in zip(
                self.rows_of(seq_id),
                self.windows,
                self.released(seq_id),
                strict=True,
            )
        ]

    def num_freed_by_windows(self, seq_id: int) -> int:
        """Returns how many of the blocks of `num_passed` are not in the prefix cache."""
        num_cached, released = int(self.num_cached_blocks[seq_id]), self.released(seq_id)
        pairs = zip(released, self.num_passed(seq_id), strict=True)
        return sum(max(0, first + count - max(first, num_cached)) for first, count in pairs)

    def needs_no_free_block(self, seq_id: int, num_tokens: int) -> bool:
        """Returns whether a sequence has room for more tokens, or frees what it takes."""
        num_new = self.num_new_blocks(seq_id, num_tokens)
        if num_new and self.has_windows and not self.may_share:
            num_new -= self.num_freed_by_windows(seq_id)
        return num_new <= 0

    def holds_needed(self, seq_id: int, num_tokens: int) -> bool:
        """Returns whether a sequence holds what tokens from `num_tokens` on can see."""
        return num_tokens == 0 or all(
            count <= first_needed_block(num_tokens, window, self.block_size)
            for window, count in zip(self.windows, self.released(seq_id), strict=True)
        )

    def note_sharing(self) -> None:
        """Updates `may_share` from the other counts."""
        own = int(self.num_blocks_held.sum()) - self.num_cached_ids(slice(None))
        self.may_share = own + self.num_prefix_blocks + len(self.taken) != self.num_used

    def num_cached_ids(self, seq_ids: Sequence[int] | np.ndarray | slice) -> int:
        """Returns how many blocks that sequences hold, in all groups, are in the prefix cache."""
        num_cached = self.num_cached_blocks[seq_ids]
        if len(self.windows) > 1 or self.has_windows:
            released = self.num_released.reshape(-1, self.max_seqs)[:, seq_ids]
            num_cached = np.maximum(num_cached - released, 0)
        return int(num_cached.sum())

    def set_cached(self, seq_id: int, num_blocks: int) -> None:
        """Notes how many leading blocks of a row are in the prefix cache."""
        self.num_cached_blocks[seq_id] = num_blocks

    def start_row(self, shape: RowShape, num_cached: int = 0) -> None:
        """Counts `next_row` as started; its first `num_cached` blocks are cached ones."""
        seq_id, num_found = self._free_rows.pop(), num_cached * self.block_size
        self.num_cached_blocks[seq_id] = num_cached
        for row, part in zip(self.rows_of(seq_id), self.rows_for(shape), strict=True):
            self.token_formats[row], self.num_pruned[row] = part.token_format, part.num_pruned
            self.num_released[row] = part.num_released
            self.num_blocks_held[row] = max(0, num_cached - part.num_released)
            self.held_lens[row] = num_found
            self._add_to_row(row, part.held_len - num_found)

    def add_tokens(self, seq_id: int, num_tokens: int) -> int:
        """Counts more tokens in a sequence, and the blocks allocated for them.

        Returns:
          How many blocks outside the prefix cache its windows have passed: they are released, and
          not yet counted as free.
        """
        num_freed = 0
        if self.has_windows and num_tokens:
            num_freed = self.num_freed_by_windows(seq_id)
            for row, count in zip(self.rows_of(seq_id), self.num_passed(seq_id), strict=True):
                self.num_released[row] += count
                self.num_blocks_held[row] -= count
        for row in self.rows_of(seq_id):
            self._add_to_row(row, num_tokens)
        return num_freed

    def end_rows(self, seq_ids: Sequence[int]) -> int:
        """Counts sequences as free; returns how many blocks they held outside the prefix cache."""
        seqs = np.asarray(seq_ids)
        rows = seqs
        if len(self.windows) > 1:
            rows = np.concatenate([self.rows_of(seq_id) for seq_id in seq_ids])
        num_own = int(self.num_blocks_held[rows].sum()) - self.num_cached_ids(seqs)
        for counts in self.of_rows.values():
            counts[rows] = 0
        self.num_cached_blocks[seqs] = 0
        self._free_rows.extend(seq_ids)
        return num_own

    def replace(self, num_free: int, of_rows: dict[str, np.ndarray]) -> None:
        """Replaces the counts by what the tables say; see `of_rows`."""
        self.num_free = num_free
        for name, counts in of_rows.items():
            setattr(self, name, counts)
        # A step may have truncated rows, and replaced a block that was cut through by a copy.
        num_full = self.held_lens[: self.max_seqs] // self.block_size
        self.num_cached_blocks = np.minimum(self.num_cached_blocks, num_full)
        self.note_sharing()

    def _num_lacking(self, row: int, num_tokens: int) -> int:
        """Returns how many blocks a row lacks for `num_tokens` more tokens."""
        size = self._sizes[self.token_formats[row]]
        end = int(self.num_blocks_held[row] + self.num_released[row])
        return max(0, ceil_div(int(self.held_lens[row]) + num_tokens, size) - end)

    def _add_to_row(self, row: int, num_tokens: int) -> None:
        """Counts more tokens in a row, and the blocks allocated for them."""
        num_new = self._num_lacking(row, num_tokens)
        self.num_free -= num_new
        self.num_blocks_held[row] += num_new
        self.held_lens[row] += num_tokens
