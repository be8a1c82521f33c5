"""Questions about the rows and blocks of pools that only the device can answer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax.manager.pool.reads as reads
from ferrum_jax.arithmetic import PerPool, ceil_div, next_power_of_two
from ferrum_jax.codecs import format_of
from ferrum_jax.invariants import check_state
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.manager.pool.device_state import DeviceState
from ferrum_jax.ops import gather
from ferrum_jax.ops.buckets import first_rows
from ferrum_jax.ops.transfer import BlockPayload, stream_blocks
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_BLOCK


class PoolQueries:
    """Reads a device's pools, and changes nothing. Not thread-safe.

    Each method waits for the device where it has to ask it; `stream_seq` does not. Block ids are
    the host's ones, unless a method says otherwise; see `PoolCounts`.

    Args:
      device_state: The state that is read.
      counts: What the host counts of it.
      scrub_freed_blocks: Whether freed blocks are erased.
    """

    def __init__(self, device_state: DeviceState, counts: PoolCounts, *, scrub_freed_blocks: bool):
        self._device_state, self._counts = device_state, counts
        self._scrub = scrub_freed_blocks

    def main_blocks(self, seq_id: int) -> list[int]:
        """Returns a sequence's blocks in the group of `PoolCounts.main_row`, by their pool's ids.

        They are in order; those that it has released are left out.
        """
        return self._row_blocks(self._counts.main_row(seq_id))

    def seq_blocks(self, seq_id: int) -> list[list[int]]:
        """Returns a sequence's blocks in each group; `NULL_BLOCK` where it has released one."""
        counts = self._counts
        ends = [
            int(counts.num_released[row] + counts.num_blocks_held[row])
            for row in counts.rows_of(seq_id)
        ]
        block_ids = reads.rows_of_seq(self._state.page_tables, np.asarray(seq_id, np.int32))
        block_ids = counts.ids.on_host(np.asarray(block_ids))
        return [ids[:end].tolist() for ids, end in zip(block_ids, ends, strict=True)]

    def all_row_blocks(self) -> dict[int, list[int]]:
        """Returns the blocks of every sequence that holds any, each at its logical index.

        They are those of one group, `PoolCounts.main_row`; `NULL_BLOCK` where a row has released.
        """
        counts, block_ids = self._counts, self._all_block_ids()
        ends = counts.num_released + counts.num_blocks_held
        rows = {seq_id: counts.main_row(seq_id) for seq_id in counts.seqs_with_blocks}
        return {seq_id: block_ids[row, : ends[row]].tolist() for seq_id, row in rows.items()}

    def is_free(self, block_id: int) -> bool:
        """Returns whether a block is free."""
        return int(self._all_ref_counts()[block_id]) == 0

    def num_freed_by(self, seq_ids: Sequence[int]) -> PerPool:
        """Returns how many blocks freeing these sequences returns, prefix-cached ones excluded."""
        counts = self._counts
        if not counts.may_share:
            return counts.num_own(seq_ids)
        block_ids, ref_counts = self._all_block_ids(), self._all_ref_counts()
        own = [
            block_ids[row, counts.num_cached_blocks[seq_id] :]
            for seq_id in seq_ids
            for row in counts.rows_of(seq_id)
        ]
        mentions = _num_mentions(own, ref_counts.size)
        return counts.ids.count(np.flatnonzero((mentions > 0) & (mentions == ref_counts)).tolist())

    def num_blocks_to_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> PerPool:
        """Returns how many free blocks `DevicePool.extend` needs, besides those that it releases.

        Args:
          seq_ids: The sequences.
          num_tokens: Tokens to add to each of them.
        """
        counts = self._counts
        num_new = counts.num_new_blocks(seq_ids, num_tokens)
        if not counts.has_windows:
            return num_new
        extended = [i for i, count in zip(seq_ids, num_tokens, strict=True) if count]
        num_passed = {i: counts.num_passed(i) for i in extended}
        if not counts.may_share or not any(map(any, num_passed.values())):
            num_own = sum(map(counts.num_freed_by_windows, extended), counts.none)
            return (num_new - num_own).at_least_zero()
        block_ids, ref_counts, num_own = self._all_block_ids(), self._all_ref_counts(), counts.none
        for seq_id, of_groups in num_passed.items():
            own = []
            for row, count in zip(counts.rows_of(seq_id), of_groups, strict=True):
                first = counts.num_released[row]
                own.append(int((ref_counts[block_ids[row, first : first + count]] == 1).sum()))
            num_own += counts.by_pool(own)
        return (num_new - num_own).at_least_zero()

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
        ref_counts, block_ids = self._all_ref_counts(), np.asarray(seq_blocks, int)[:, first:]
        is_shared = ((block_ids != NULL_BLOCK) & (ref_counts[block_ids] > 1)).any(axis=0)
        return first + int(is_shared.argmax()) if is_shared.any() else len(seq_blocks[0])

    def num_blocks_to_share(self, target: int, num_tokens: int) -> PerPool:
        """Returns how many blocks `DevicePool.share` allocates to copy blocks held by others.

        Args:
          target: The row that is going to hold another row's tokens.
          num_tokens: How many tokens.
        """
        counts = self._counts
        num_full, num_tail = divmod(num_tokens, counts.block_size)
        is_cached = num_full < counts.num_cached_blocks[target]
        if not num_tail or is_cached or not counts.may_share:
            return counts.none
        block_ids, ref_counts = self._all_block_ids(), self._all_ref_counts()
        changed = block_ids[list(counts.rows_of(target)), num_full]
        changed = changed[changed != NULL_BLOCK]
        return counts.ids.count(changed[ref_counts[changed] > 1].tolist())

    def num_blocks_to_compress(self, seq_id: int, num_blocks: PerPool) -> PerPool:
        """Returns how many blocks are allocated to rewrite the rows that compression changes.

        Blocks that others hold too cannot be overwritten; a row's own ones can.

        Args:
          seq_id: The sequence.
          num_blocks: Blocks of each of its rows afterwards, in each pool.
        """
        counts, block_ids = self._counts, self._all_block_ids()
        ref_counts, num_new = self._all_ref_counts(), [0] * len(counts.windows)
        for group in counts.full_groups:
            row = block_ids[group * counts.max_seqs + seq_id]
            num_own = int((ref_counts[row[row != NULL_BLOCK]] == 1).sum())
            num_new[group] = max(0, num_blocks[counts.pools[group]] - num_own)
        return counts.by_pool(num_new)

    def num_written(self, seq_id: int, num_known: int, num_tokens: int) -> int:
        """Returns how many of a sequence's first tokens are written, as far as can be known.

        What was never written is zero where freed blocks are erased. A pool of integers may round
        what is written to zero. The row is that of `PoolCounts.main_row`.

        Args:
          seq_id: The sequence, which is not compressed.
          num_known: Leading tokens that are known to be written.
          num_tokens: Leading tokens to look at.
        """
        pool, row = self._counts.place_of_row(self._counts.main_row(seq_id))
        state = self._state.part(pool)
        is_float = jnp.issubdtype(state.pool.dtype, jnp.floating)
        if not (self._scrub and is_float) or num_tokens <= num_known:
            return num_tokens
        size = self._counts.block_size
        num_blocks = ceil_div(num_tokens, size) - num_known // size
        numbers = (np.asarray(x, np.int32) for x in (row, num_known, num_tokens))
        return int(reads.num_written(state, *numbers, max_blocks=next_power_of_two(num_blocks)))

    def read_row(self, seq_id: int, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns a sequence's keys and values of one layer, each [tokens, H, D].

        A program is compiled for each power of two of blocks, and none for a number of tokens.
        """
        self._device_state.require()
        counts, state = self._counts, self._state
        row = seq_id
        if not state.layers.is_single:
            place = state.layers.places[state.layers.find(layer)[0]]
            row += counts.max_seqs * state.layers.by_pool().index(place)
        num_blocks = next_power_of_two(int(counts.num_released[row] + counts.num_blocks_held[row]))
        token_format = format_of(counts.token_formats[row])
        k, v = gather(state, layer, seq_id, token_format, max_blocks=num_blocks)
        num_tokens = int(counts.held_lens[row])
        return first_rows(k, num_tokens), first_rows(v, num_tokens)

    def stream_seq(self, seq_id: int) -> tuple[BlockPayload, ...]:
        """Returns a sequence's blocks in each pool, group by group, those it has released left out.

        Each chunk is copied when asked for, until the pools change. `gathered()` of a payload
        orders all copies at once.
        """
        seq, state = np.asarray(seq_id, np.int32), self._state
        parts = zip(state.pools, state.page_tables, self._counts.num_held(seq_id), strict=True)
        return tuple(
            stream_blocks(pool, reads.seq_blocks(t.block_ids, seq, t.windows), num_blocks)
            for pool, t, num_blocks in parts
        )

    def check(self, prefix_blocks: Sequence[int] = ()) -> None:
        """Raises AssertionError unless state and counts hold together.

        Args:
          prefix_blocks: Ids of the blocks in the prefix cache.
        """
        counts, all_pins = self._counts, []
        pinned = counts.ids.split([*counts.taken, *prefix_blocks])
        for num_blocks, block_ids in zip(counts.num_blocks, pinned, strict=True):
            pins = np.zeros(num_blocks, int)
            pins[block_ids] = 1
            all_pins.append(pins)
        check_state(self._state, all_pins if len(all_pins) > 1 else all_pins[0])
        num_prefix_blocks = counts.ids.count(prefix_blocks)
        if num_prefix_blocks != counts.num_prefix_blocks:
            raise AssertionError(
                f"{num_prefix_blocks} blocks are in the prefix cache, and "
                f"{counts.num_prefix_blocks} are counted."
            )
        num_free, found = self._device_state.read_counts()
        counted = {"num_free": counts.num_free, **counts.of_rows}
        found = {"num_free": num_free, **found}
        if not all(np.array_equal(counted[name], found[name]) for name in found):
            raise AssertionError(f"The host counted {counted}, the device {found}.")

    @property
    def _state(self) -> CacheState:
        return self._device_state.current

    def _row_blocks(self, row: int) -> list[int]:
        """Returns the blocks that a row holds, by their pool's ids."""
        released, held = self._counts.num_released[row], self._counts.num_blocks_held[row]
        pool, row = self._counts.place_of_row(row)
        block_ids = self._state.page_tables[pool].block_ids
        block_ids = np.asarray(reads.row_of_table(block_ids, np.asarray(row, np.int32)))
        return block_ids[released : released + held].tolist()

    def _all_block_ids(self) -> np.ndarray:
        """Returns the blocks of all rows: int[G * S, M]."""
        block_ids = jax.device_get([tables.block_ids for tables in self._state.page_tables])
        rows = np.concatenate(block_ids)
        return self._counts.ids.on_host(rows.reshape(len(self._counts.pools), -1)).reshape(
            rows.shape
        )

    def _all_ref_counts(self) -> np.ndarray:
        """Returns the references to each block, by the host's ids; 0 for those to come."""
        counts = self._counts
        of_pools = jax.device_get([tables.ref_counts for tables in self._state.page_tables])
        if len(of_pools) == 1:
            return of_pools[0]
        ref_counts = np.zeros(counts.max_blocks.total, np.int32)
        for first, of_pool in zip(counts.ids.firsts, of_pools, strict=True):
            ref_counts[first : first + of_pool.size] = of_pool
        return ref_counts


def _num_mentions(rows: Sequence[np.ndarray], num_blocks: int) -> np.ndarray:
    """Returns how often rows of a table name each block: int[N]."""
    named = np.concatenate([*rows, np.zeros(0, int)])
    return np.bincount(named[named != NULL_BLOCK], minlength=num_blocks)
