"""Questions about the rows and blocks of a pool that only the device can answer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax.manager.pool.programs as programs
from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.invariants import check_state
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.manager.pool.device_state import DeviceState
from ferrum_jax.ops import gather
from ferrum_jax.ops.buckets import first_rows
from ferrum_jax.ops.transfer import BlockPayload, stream_blocks
from ferrum_jax.state import PageTables


class PoolQueries:
    """Reads a pool, and changes nothing. Not thread-safe.

    Each method waits for the device where it has to ask it; `stream_row` does not.

    Args:
      device_state: The state that is read.
      counts: What the host counts of it.
      scrub_freed_blocks: Whether freed blocks are erased.
    """

    def __init__(self, device_state: DeviceState, counts: PoolCounts, *, scrub_freed_blocks: bool):
        self._device_state, self._counts = device_state, counts
        self._scrub = scrub_freed_blocks

    def row_blocks(self, seq_id: int) -> list[int]:
        """Returns a row's blocks in order."""
        row = np.asarray(self._row_on_device(seq_id))
        return row[: self._counts.num_blocks_held[seq_id]].tolist()

    def all_row_blocks(self) -> dict[int, list[int]]:
        """Returns the blocks, in order, of every row that holds any."""
        num_held = self._counts.num_blocks_held
        block_ids = jax.device_get(self._tables.block_ids)
        return {int(i): block_ids[i, : num_held[i]].tolist() for i in np.flatnonzero(num_held)}

    def is_free(self, block_id: int) -> bool:
        """Returns whether a block of the pool is free."""
        return int(self._tables.ref_counts[block_id]) == 0

    def num_freed_by(self, seq_ids: Sequence[int]) -> int:
        """Returns how many blocks freeing these rows returns, prefix-cached ones excluded."""
        rows, counts = list(seq_ids), self._counts
        if not counts.may_share:
            return int((counts.num_blocks_held[rows] - counts.num_cached_blocks[rows]).sum())
        block_ids, ref_counts = jax.device_get((self._tables.block_ids, self._tables.ref_counts))
        own = [
            block_ids[row, counts.num_cached_blocks[row] : counts.num_blocks_held[row]]
            for row in rows
        ]
        mentions = np.bincount(np.concatenate([*own, np.zeros(0, int)]), minlength=ref_counts.size)
        return int(((mentions > 0) & (mentions == ref_counts)).sum())

    def num_unshared(self, block_ids: Sequence[int], first: int) -> int:
        """Returns the index of the first block, at or after `first`, that another row holds too.

        Args:
          block_ids: A row's blocks in order.
          first: Index from which on blocks may be shared.

        Returns:
          The index; `len(block_ids)` if there is no such block.
        """
        if not self._counts.may_share:
            return len(block_ids)
        ref_counts = jax.device_get(self._tables.ref_counts)
        is_shared = ref_counts[np.asarray(block_ids[first:], int)] > 1
        return first + int(is_shared.argmax()) if is_shared.any() else len(block_ids)

    def num_blocks_to_share(self, target: int, num_tokens: int) -> int:
        """Returns how many blocks `DevicePool.share` allocates: 1 to copy a block held by others.

        Args:
          target: The row that is going to hold another row's tokens.
          num_tokens: How many tokens.
        """
        num_full, num_tail = divmod(num_tokens, self._counts.block_size)
        if not num_tail or num_full < self._counts.num_cached_blocks[target]:
            return 0
        return int(self.num_unshared(self.row_blocks(target)[: num_full + 1], num_full) == num_full)

    def num_blocks_to_compress(self, seq_id: int, num_blocks: int) -> int:
        """Returns how many blocks are allocated to rewrite a row in `num_blocks` blocks.

        Blocks that others hold too cannot be overwritten; the row's own ones can.
        """
        ref_counts = jax.device_get(self._tables.ref_counts)
        num_own = int((ref_counts[self.row_blocks(seq_id)] == 1).sum())
        return max(0, num_blocks - num_own)

    def num_written(self, seq_id: int, num_known: int, num_tokens: int) -> int:
        """Returns how many of a row's first tokens are written, as far as can be known.

        What was never written is zero where freed blocks are erased. A pool of integers may round
        what is written to zero.

        Args:
          seq_id: The row, which is not compressed.
          num_known: Leading tokens that are known to be written.
          num_tokens: Leading tokens to look at.
        """
        is_float = jnp.issubdtype(self._device_state.current.pool.dtype, jnp.floating)
        if not (self._scrub and is_float) or num_tokens <= num_known:
            return num_tokens
        num_blocks = self._counts.blocks_for(num_tokens) - num_known // self._counts.block_size
        numbers = (np.asarray(x, np.int32) for x in (seq_id, num_known, num_tokens))
        state = self._device_state.current
        return int(programs.num_written(state, *numbers, max_blocks=next_power_of_two(num_blocks)))

    def read_row(self, seq_id: int, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns a row's keys and values of one layer, each [tokens, H, D].

        A program is compiled for each power of two of blocks, and none for a number of tokens.
        """
        self._device_state.require()
        shape, state = self._counts.row_shape(seq_id), self._device_state.current
        num_blocks = next_power_of_two(int(self._counts.num_blocks_held[seq_id]))
        k, v = gather(state, layer, seq_id, shape.token_format, max_blocks=num_blocks)
        return first_rows(k, shape.held_len), first_rows(v, shape.held_len)

    def stream_row(self, seq_id: int) -> BlockPayload:
        """Returns a row's blocks; each chunk is copied when asked for, until the pool changes.

        `gathered()` of the payload orders all copies at once.
        """
        row, num_blocks = self._row_on_device(seq_id), int(self._counts.num_blocks_held[seq_id])
        return stream_blocks(self._device_state.current.pool, row, num_blocks)

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
        num_free, of_rows = self._device_state.read_counts()
        counted, found = [counts.num_free, *counts.of_rows], [num_free, *of_rows]
        if not all(map(np.array_equal, counted, found)):
            raise AssertionError(f"The host counted {counted}, the device {found}.")

    @property
    def _tables(self) -> PageTables:
        return self._device_state.current.tables

    def _row_on_device(self, seq_id: int) -> jax.Array:
        return programs.one_row(self._tables.block_ids, np.asarray(seq_id, np.int32))
