"""The cache state on one device, and how the host's counts are brought in line with it."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

import ferrum_jax.manager.pool.programs as programs
import ferrum_jax.manager.pool.reads as reads
from ferrum_jax.arithmetic import PerPool
from ferrum_jax.codecs import CODECS
from ferrum_jax.errors import CacheLostError, UncountedTokensError
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ, Device

T = TypeVar("T")


class DeviceState:
    """Holds a cache state from one program to the next. Not thread-safe.

    A program with an outcome that the host cannot predict leaves the state *unsettled*, until
    `settle` has read the counts back.

    Args:
      state: The state of an empty cache.
      counts: The counts that follow the state.
      device: Where the state is, for error texts.
      scrub_freed_blocks: Whether freed blocks are erased.

    Attributes:
      current: The state; `replace` changes it.
      device: As given.
      held_before: bool[N] of each pool. Blocks that were in use before the state became unsettled;
        None while it is settled.
    """

    def __init__(
        self, state: CacheState, counts: PoolCounts, device: Device, *, scrub_freed_blocks: bool
    ):
        self.current, self.device = state, device
        self._counts, self._scrub = counts, scrub_freed_blocks
        self.held_before: Sequence[Any] | None = None
        self._oks: collections.deque[Any] = collections.deque()  # Each bool[].
        self._has_failed = False

    @property
    def is_lost(self) -> bool:
        """Whether the state was consumed and not returned, or cannot be read any more."""
        return self._has_failed or is_consumed(self.current)

    @property
    def is_settled(self) -> bool:
        """Whether the host's counts are those of the device, unless a step broke its word."""
        return self.held_before is None

    def replace(
        self,
        state: CacheState,
        *,
        ok: jax.Array | None = None,
        held_before: Sequence[Any] | None = None,
    ) -> None:
        """Replaces the state by what a program returned.

        Args:
          state: The new state.
          ok: bool[]. Whether the program did what the host counts; read by `confirm_counts`.
          held_before: What `held_blocks` returned before, if the state is unsettled now.
        """
        self.current = state
        if ok is not None:
            self._oks.append(ok)
        if held_before is not None:
            self.held_before = held_before

    def replace_tables(
        self, page_tables: Sequence[PageTables], ok: jax.Array | None = None
    ) -> None:
        """Replaces the tables alone; see `replace`."""
        self.replace(self.current.with_tables(page_tables), ok=ok)

    def held_blocks(self) -> tuple[jax.Array, ...]:
        """Returns which blocks of each pool are in use: bool[N]."""
        return reads.are_held(self.current.page_tables)

    def require(self) -> None:
        """Raises CacheLostError if the state was consumed and not returned."""
        if self.is_lost:
            raise CacheLostError(
                f"The cache on {self.device} is lost: a step or a program took it, donated, and "
                "did not return it. Close the manager and make another; steps must return "
                "(state, output)."
            )

    def note_failure(self) -> None:
        """Notes that the cache is lost, if it cannot be read after a device has failed."""
        with interrupts.delayed():
            try:
                jax.block_until_ready(self.current)
            except Exception:
                self._has_failed = True

    def confirm_counts(self) -> bool:
        """Returns whether the device did what the host counted, as far as that is known.

        It does not wait for a step that is still running: what such a step did is read later.
        After False the state is unsettled.
        """
        # Once the last state is there, every answer is, or takes microseconds.
        num_free: Any = self.current.page_tables[0].num_free
        is_ready = bool(self._oks) and num_free.is_ready()
        while self._oks and (is_ready or self._oks[0].is_ready()):
            with self.reading():
                is_as_counted = bool(self._oks[0])
            self._oks.popleft()
            if not is_as_counted:
                self._oks.clear()
                self.distrust_counts()
                return False
        return True

    def distrust_counts(self) -> None:
        """Leaves the state unsettled, whichever blocks were in use."""
        page_tables = self.current.page_tables
        self.held_before = tuple(np.ones(tables.num_blocks, bool) for tables in page_tables)

    def uncounted_error(self) -> UncountedTokensError:
        """Returns the error for a step that changed lengths without `extends=True`."""
        return UncountedTokensError(
            f"The tables on {self.device} are not what the manager had counted: a step changed "
            "lengths and was not declared to. Pass extends=True to run for such steps. All lengths "
            "are what the device has now: ask again for what is short."
        )

    def wait(self) -> None:
        """Waits for the device; signal handlers may raise meanwhile."""
        with interrupts.allowed():
            jax.block_until_ready([tables.num_free for tables in self.current.page_tables])

    def read_counts(self) -> tuple[PerPool, dict[str, np.ndarray]]:
        """Returns what the tables say, as `PoolCounts.replace` takes it; waits for the device."""
        all_tables, names = self.current.page_tables, list(self._counts.of_rows)
        num_free = [tables.num_free for tables in all_tables]
        of_rows = {name: [getattr(tables, name) for tables in all_tables] for name in names}
        num_free, of_rows = jax.device_get((num_free, of_rows))
        counts = {name: np.concatenate(parts).astype(int) for name, parts in of_rows.items()}
        return PerPool(map(int, num_free)), counts

    def read_back(self, tree: T) -> T:
        """Returns a program's output on the host; the cache is lost where it cannot be read."""
        with self.reading():
            return jax.device_get(tree)

    def settle(self) -> None:
        """Reads the counts from the device, and erases what was freed; waits for the device.

        The slots past the new end of a row that became shorter are erased too: tokens that take
        these slots later would otherwise seem to be written. Where this was interrupted, call it
        again.

        Raises:
          CacheLostError: If the device cannot tell.
        """
        held_before = self.held_before
        if held_before is None:
            return
        before = self._counts.held_lens
        with self.reading():
            self._counts.replace(*self.read_counts())
            self._erase_tails(np.flatnonzero(self._counts.held_lens < before))
            freed = reads.freed_since(self.current.page_tables, tuple(held_before))
            self._erase([np.flatnonzero(are_freed) for are_freed in jax.device_get(freed)])
        self.held_before = None

    def count_freed(self, num_blocks: PerPool) -> None:
        """Counts blocks as free; where rows may share some, the device is asked."""
        self._counts.num_free += num_blocks
        if self._counts.may_share:
            with self.reading():
                self._counts.replace(*self.read_counts())

    def free_stray_rows(self) -> list[int]:
        """Frees rows that hold blocks and were not started here, and returns them."""
        strays = self._counts.stray_rows
        if strays:
            ids = pad_to_power_of_two(np.asarray(strays), NULL_SEQ)
            held_before = self.held_blocks()
            state = programs.free_rows(self.current, ids, self._scrub)
            self.replace(state, held_before=held_before)
            self.settle()
        return strays

    def _erase(self, block_ids: Sequence[np.ndarray]) -> None:
        """Erases blocks (int[P] of each pool) that are free now, if freed blocks are erased."""
        if self._scrub and any(ids.size for ids in block_ids):
            padded = tuple(pad_to_power_of_two(ids, NULL_BLOCK) for ids in block_ids)
            self.replace(programs.erase_blocks(self.current, padded))

    def _erase_tails(self, rows: np.ndarray) -> None:
        """Erases the slots past the end of native rows (int[R]), if freed blocks are erased."""
        counts, native = self._counts, [f for f in CODECS if CODECS[f].is_native]
        is_native = np.isin(counts.token_formats[rows], native)
        cut = rows[is_native & (counts.held_lens[rows] % counts.block_size > 0)]
        if self._scrub and cut.size:
            padded = (pad_to_power_of_two(part, NULL_SEQ) for part in counts.rows_in_pools(cut))
            self.replace(programs.erase_tails(self.current, tuple(padded)))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Marks the cache as lost if the body cannot read what the programs left there."""
        try:
            yield
        except Exception as error:
            self._has_failed = True
            raise CacheLostError(
                f"The cache on {self.device} is lost: what a program left there cannot be read. "
                "Close the manager and make another."
            ) from error


def is_consumed(state: CacheState) -> bool:
    """Returns whether a step has consumed a state, so that it cannot be used any more."""
    # A program consumes all arrays of what it is given: one tells of the others.
    pool_array = next(iter(state.pools[0].arrays.values()))
    return pool_array.is_deleted() or state.page_tables[0].held_lens.is_deleted()
