"""Questions about the rows and blocks of a pool that only the device can answer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax.manager.pool.programs as programs
from ferrum_jax.arithmetic import ceil_div, next_power_of_two
from ferrum_jax.codecs import format_of
from ferrum_jax.invariants import check_state
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.manager.pool.device_state import DeviceState
from ferrum_jax.ops import gather
from ferrum_jax.ops.buckets import first_rows
from ferrum_jax.ops.transfer import BlockPayload, stream_blocks
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_BLOCK


class PoolQueries:
    """Reads a pool, and changes nothing. Not thread-safe.

    Each method waits for the device where it has to ask it; `stream_seq` does not.

    Args:
      device_state: The state that is read.
      counts: What the host counts of it.
      scrub_freed_blocks: Whether freed blocks are erased.
    """

    def __init__(self, device_state: DeviceState, counts: PoolCounts, *, scrub_freed_blocks: bool):
        self._device_state, self._counts = device_state, counts
        self._scrub = scrub_freed_blocks

    def row_blocks(self, row: int) -> list[int]:
        """Returns a row's blocks in order, those that it has released left out."""
        released, held = self._counts.num_released[row], self._counts.num_blocks_held[row]
        block_ids = np.asarray(self._rows_on_device(row))
        return block_ids[released : released + held].tolist()

    def seq_blocks(self, seq_id: int) -> list[list[int]]:
        """Returns a sequence's blocks in each group; `NULL_BLOCK` where it has released one."""
        counts, rows = self._counts, self._counts.rows_of(seq_id)
        ends = [int(counts.num_released[row] + counts.num_blocks_held[row]) for row in rows]
        block_ids = np.asarray(self._rows_on_device(rows))
        return [ids[:end].tolist() for ids, end in zip(block_ids, ends, strict=True)]

    def all_row_blocks(self) -> dict[int, list[int]]:
        """Returns the blocks of every sequence that holds any, each at its logical index.

        They are those of one group, `PoolCounts.main_row`; `NULL_BLOCK` where a row has released.
        """
        counts, block_ids = self._counts, jax.device_get(self._tables.block_ids)
        ends = counts.num_released + counts.num_blocks_held
        rows = {seq_id: counts.main_row(seq_id) for seq_id in counts.seqs_with_blocks}
        return {seq_id: block_ids[row, : ends[row]].tolist() for seq_id, row in rows.items()}

    def is_free(self, block_id: int) -> bool:
        """Returns whether a block of the pool is free."""
        return int(self._tables.ref_counts[block_id]) == 0

    def num_freed_by(self, seq_ids: Sequence[int]) -> int:
        """Returns how many blocks freeing these sequences returns, prefix-cached ones excluded."""
        counts = self._counts
        if not counts.may_share:
            return sum(map(counts.num_held, seq_ids)) - counts.num_cached_ids(seq_ids)
        block_ids, ref_counts = jax.device_get((self._tables.block_ids, self._tables.ref_counts))
        own = [
            block_ids[row, counts.num_cached_blocks[seq_id] :]
            for seq_id in seq_ids
            for row in counts.rows_of(seq_id)
        ]
        mentions = _num_mentions(own, ref_counts.size)
        return int(((mentions > 0) & (mentions == ref_counts)).sum())

    def num_blocks_to_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> int:
        """Returns how many free blocks `DevicePool.extend` needs, besides those that it releases.

        Args:
          seq_ids: The sequences.
          num_tokens: Tokens to add to each of them.
        """
        counts = self._counts
        num_new = sum(map(counts.num_new_blocks, seq_ids, num_tokens))
        if not counts.has_windows:
            return num_new
        extended = [i for i, count in zip(seq_ids, num_tokens, strict=True) if count]
        num_passed = {i: counts.num_passed(i) for i in extended}
        if not counts.may_share or not any(map(any, num_passed.values())):
            return max(0, num_new - sum(map(counts.num_freed_by_windows, extended)))
        block_ids, ref_counts = jax.device_get((self._tables.block_ids, self._tables.ref_counts))
        num_own = 0
        for seq_id, of_groups in num_passed.items():
            for row, count in zip(counts.rows_of(seq_id), of_groups, strict=True):
                first = counts.num_released[row]
                num_own += int((ref_counts[block_ids[row, first : first + count]] == 1).sum())
        return max(0, num_new - num_own)

    def num_unshared(self, seq_blocks: Sequence[Sequence[int]], first: int) -> int:
        """Returns the logical index of the first block from `first` on that another row holds too.

        Args:
          seq_blocks: Result of `seq_blocks`.
          first: Index from which on blocks may be shared.

        Returns:
          The index; the number of blocks, released ones included, if there is no such block.
        """
        if not self._counts.may_share:
            return len(seq_blocks[0])
        ref_counts = jax.device_get(self._tables.ref_counts)
        block_ids = np.asarray(seq_blocks, int)[:, first:]  # Floats if there are none, otherwise.
        is_shared = ((block_ids != NULL_BLOCK) & (ref_counts[block_ids] > 1)).any(axis=0)
        return first + int(is_shared.argmax()) if is_shared.any() else len(seq_blocks[0])

    def num_blocks_to_share(self, target: int, num_tokens: int) -> int:
        """Returns how many blocks `DevicePool.share` allocates: 1 to copy a block held by others.

        Args:
          target: The row that is going to hold another row's tokens.
          num_tokens: How many tokens.
        """
        counts = self._counts
        num_full, num_tail = divmod(num_tokens, counts.block_size)
        is_cached = num_full < counts.num_cached_blocks[target]
        if not num_tail or is_cached or not counts.may_share:
            return 0
        block_ids, ref_counts = jax.device_get((self._tables.block_ids, self._tables.ref_counts))
        changed = block_ids[list(counts.rows_of(target)), num_full]
        return int((ref_counts[changed[changed != NULL_BLOCK]] > 1).sum())

    def num_blocks_to_compress(self, rows: Sequence[int], num_blocks: int) -> int:
        """Returns how many blocks are allocated to rewrite rows in `num_blocks` blocks each.

        Blocks that others hold too cannot be overwritten; a row's own ones can.
        """
        ref_counts = jax.device_get(self._tables.ref_counts)
        num_own = [int((ref_counts[self.row_blocks(row)] == 1).sum()) for row in rows]
        return sum(max(0, num_blocks - own) for own in num_own)

    def num_written(self, seq_id: int, num_known: int, num_tokens: int) -> int:
        """Returns how many of a sequence's first tokens are written, as far as can be known.

        What was never written is zero where freed blocks are erased. A pool of integers may round
        what is written to zero. The row is that of `PoolCounts.main_row`.

        Args:
          seq_id: The sequence, which is not compressed.
          num_known: Leading tokens that are known to be written.
          num_tokens: Leading tokens to look at.
        """
        is_float = jnp.issubdtype(self._device_state.current.pool.dtype, jnp.floating)
        if not (self._scrub and is_float) or num_tokens <= num_known:
            return num_tokens
        size, row = self._counts.block_size, self._counts.main_row(seq_id)
        num_blocks = ceil_div(num_tokens, size) - num_known // size
        numbers = (np.asarray(x, np.int32) for x in (row, num_known, num_tokens))
        state = self._device_state.current
        return int(programs.num_written(state, *numbers, max_blocks=next_power_of_two(num_blocks)))

    def read_row(self, seq_id: int, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns a sequence's keys and values of one layer, each [tokens, H, D].

        A program is compiled for each power of two of blocks, and none for a number of tokens.
        """
        self._device_state.require()
        counts, state = self._counts, self._device_state.current
        row = seq_id
        if not state.layers.is_single:
            row += counts.max_seqs * state.layers.find(layer)[0]
        num_blocks = next_power_of_two(int(counts.num_released[row] + counts.num_blocks_held[row]))
        token_format = format_of(counts.token_formats[row])
        k, v = gather(state, layer, seq_id, token_format, max_blocks=num_blocks)
        num_tokens = int(counts.held_lens[row])
        return first_rows(k, num_tokens), first_rows(v, num_tokens)

    def stream_seq(self, seq_id: int) -> BlockPayload:
        """Returns a sequence's blocks, group by group, those that it has released left out.

        Each chunk is copied when asked for, until the pool changes. `gathered()` of the payload
        orders all copies at once.
        """
        seq = np.asarray(seq_id, np.int32)
        block_ids = programs.seq_blocks(self._tables.block_ids, seq, self._tables.windows)
        pool = self._device_state.current.pool
        return stream_blocks(pool, block_ids, self._counts.num_held(seq_id))

    def check(self, prefix_blocks: Sequence[int] = ()) -> None:
        """Raises AssertionError unless state and counts hold together.

        Args:
          prefix_blocks: Ids of the blocks in the prefix cache.
        """
        counts = self._counts
        pins = np.zeros(counts.num_blocks, int)
        pins[[*counts.taken, *prefix_blocks]] = 1
        check_state(self._device_state.current, pins)
        if len(prefix_blocks) != counts.num_prefix_blocks:
            raise AssertionError(
                f"{len(prefix_blocks)} blocks are in the prefix cache, and "
                f"{counts.num_prefix_blocks} are counted."
            )
        num_free, found = self._device_state.read_counts()
        counted = {"num_free": counts.num_free, **counts.of_rows}
        found = {"num_free": num_free, **found}
        if not all(np.array_equal(counted[name], found[name]) for name in found):
            raise AssertionError(f"The host counted {counted}, the device {found}.")

    @property
    def _tables(self) -> PageTables:
        return self._device_state.current.tables

    def _rows_on_device(self, rows: int | Sequence[int]) -> jax.Array:
        return programs.rows_of_table(self._tables.block_ids, np.asarray(rows, np.int32))


def _num_mentions(rows: Sequence[np.ndarray], num_blocks: int) -> np.ndarray:
    """Returns how often rows of a table name each block: int[N]."""
    named = np.concatenate([*rows, np.zeros(0, int)])
    return np.bincount(named[named != NULL_BLOCK], minlength=num_blocks)
