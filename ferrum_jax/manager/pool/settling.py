"""Settling: reads back into the host's counts what the device did by itself."""

import numpy as np

import ferrum_jax.manager.pool.programs as programs
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.manager.pool.device_state import DeviceState
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.types import NULL_SEQ, TokenFormat


class Settling:
    """Brings the counts in line with an unsettled state. Not thread-safe.

    Args:
      device_state: The state.
      counts: The counts that follow it.
      scrub_freed_blocks: Whether freed blocks are erased.
    """

    def __init__(self, device_state: DeviceState, counts: PoolCounts, *, scrub_freed_blocks: bool):
        self._device_state, self._counts = device_state, counts
        self._scrub = scrub_freed_blocks

    def settle(self) -> None:
        """Reads the counts from the device, and erases what was freed; waits for the device.

        The slots past the new end of a row that became shorter are erased too: tokens that take
        these slots later would otherwise seem to be written. Where this was interrupted, call it
        again.

        Raises:
          CacheLostError: If the device cannot tell.
        """
        held_before = self._device_state.held_before
        if held_before is None:
            return
        before = self._counts.num_tokens
        with self._device_state.reading():
            self._read_counts()
            self._erase_tails(np.flatnonzero(self._counts.num_tokens < before))
            tables = self._device_state.current.tables
            self._erase(np.flatnonzero(np.asarray(programs.freed_since(tables, held_before))))
        self._device_state.held_before = None

    def count_freed(self, num_blocks: int) -> None:
        """Counts blocks as free; where rows may share some, the device is asked."""
        self._counts.num_free += num_blocks
        if self._counts.may_share:
            with self._device_state.reading():
                self._read_counts()

    def free_stray_rows(self) -> list[int]:
        """Frees rows that hold blocks and were not started here, and returns them."""
        strays = self._counts.stray_rows
        if strays:
            ids = pad_to_power_of_two(np.asarray(strays), NULL_SEQ)
            held_before = self._device_state.held_blocks()
            state = programs.free_rows(self._device_state.current, ids, self._scrub)
            self._device_state.replace(state, held_before=held_before)
            self.settle()
        return strays

    def _erase(self, block_ids: np.ndarray) -> None:
        """Erases blocks (int[P]) that are free now, if freed blocks are erased."""
        if self._scrub and block_ids.size:
            ids = pad_to_power_of_two(block_ids, self._counts.num_blocks)
            self._device_state.replace(programs.erase_blocks(self._device_state.current, ids))

    def _erase_tails(self, seq_ids: np.ndarray) -> None:
        """Erases the slots past the end of native rows (int[R]), if freed blocks are erased."""
        counts = self._counts
        is_native = counts.token_formats[seq_ids] == TokenFormat.Native
        cut = seq_ids[is_native & (counts.num_tokens[seq_ids] % counts.block_size > 0)]
        if self._scrub and cut.size:
            ids = pad_to_power_of_two(cut, NULL_SEQ)
            self._device_state.replace(programs.erase_tails(self._device_state.current, ids))

    def _read_counts(self) -> None:
        self._counts.replace(*self._device_state.read_counts())
