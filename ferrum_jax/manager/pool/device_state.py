"""The cache state on one device, and what its programs did that the host has not read yet."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np

import ferrum_jax.manager.pool.programs as programs
from ferrum_jax.errors import CacheLostError, UncountedTokensError
from ferrum_jax.interrupts import interrupts
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import Device

T = TypeVar("T")


class DeviceState:
    """Holds a cache state from one program to the next. Not thread-safe.

    A program whose outcome the host cannot predict leaves the state *unsettled*, until `Settling`
    has read the counts back.

    Args:
      state: The state of an empty cache.
      device: Where it is, for error texts.

    Attributes:
      current: The state; `replace` changes it.
      device: As given.
      held_before: bool[N]. Blocks that were in use before the state became unsettled; None while
        it is settled.
    """

    def __init__(self, state: CacheState, device: Device):
        self.current, self.device = state, device
        self.held_before: jax.Array | np.ndarray | None = None
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
        held_before: jax.Array | None = None,
    ) -> None:
        """Replaces the state by what a program returned.

        Args:
          state: The new state.
          ok: bool[]. Whether the program did what the host counts; read by `confirm_counts`.
          held_before: bool[N]. Blocks that were in use before, if the state is unsettled now.
        """
        self.current = state
        if ok is not None:
            self._oks.append(ok)
        if held_before is not None:
            self.held_before = held_before

    def replace_tables(self, tables: PageTables, ok: jax.Array | None = None) -> None:
        """Replaces the tables alone; see `replace`."""
        self.replace(CacheState(self.current.pool, tables), ok=ok)

    def held_blocks(self) -> jax.Array:
        """Returns which blocks are in use: bool[N]."""
        return programs.are_held(self.current.tables)

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
        num_free: Any = self.current.tables.num_free
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
        self.held_before = np.ones(self.current.tables.num_blocks, bool)

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
            jax.block_until_ready(self.current.tables.num_free)

    def read_counts(self) -> tuple[int, list[np.ndarray]]:
        """Returns what the tables say, as `PoolCounts.replace` takes it; waits for the device."""
        tables = self.current.tables
        rows = tables.held_lens, tables.num_blocks_held, tables.token_formats, tables.num_pruned
        num_free, *of_rows = jax.device_get((tables.num_free, *rows))
        return int(num_free), [x.astype(int) for x in of_rows]

    def read_back(self, tree: T) -> T:
        """Returns a program's output on the host; the cache is lost where it cannot be read."""
        with self.reading():
            return jax.device_get(tree)

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
    return state.pool.k.is_deleted() or state.tables.held_lens.is_deleted()
