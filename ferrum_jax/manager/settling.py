"""Steps on a device's cache, and counts that follow what the device did by itself."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

import ferrum_jax.manager.programs as programs
from ferrum_jax.errors import CacheLostError, UncountedTokensError
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.counts import CacheCounts
from ferrum_jax.manager.steps import StepCaller, is_lost, output_of, state_in
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ, Device, TokenFormat

T = TypeVar("T")


class SettledCounts(CacheCounts):
    """Counts of a cache that programs change whose outcome the host cannot foretell.

    Such a program leaves the cache *unsettled*: the counts are taken from the device, and what
    it freed is erased, by `settle`. Where that was interrupted, `settle` is called again.

    Args:
      state: An empty cache.
      max_blocks: Blocks that its pool may grow to.
      device: Where it is, for error texts.
      scrubs: Whether freed blocks are erased.

    Attributes:
      device: As given.
    """

    def __init__(self, state: CacheState, max_blocks: int, device: Device, *, scrubs: bool):
        super().__init__(state, max_blocks)
        self.device = device
        self._scrubs = scrubs
        self._steps = StepCaller()
        self._oks: collections.deque[Any] = collections.deque()  # Each bool[].
        # bool[N], while the cache is unsettled.
        self._were_held: jax.Array | np.ndarray | None = None
        self._has_failed = False

    @property
    def is_lost(self) -> bool:
        """Whether the state was consumed and not returned, or cannot be read any more."""
        return self._has_failed or is_lost(self.state)

    @property
    def is_settled(self) -> bool:
        """Whether the counts are those of the device, as far as steps keep their word."""
        return self._were_held is None

    def run(
        self, step: Callable[..., Any], seq_ids: np.ndarray, *args: Any, extends: bool = False
    ) -> Any:
        """Lets `step` change the state, and returns its output.

        Args:
          step: Returns `(state, output)`.
          seq_ids: i32[R]. Rows of the step.
          *args: Further arguments of the step.
          extends: Whether it changes lengths; the cache is unsettled afterwards.
        """
        given = self.state
        were_held = programs.are_held(given.tables) if extends else None
        # A handler cannot stop a program, but would lose the state that the program returns.
        is_program = hasattr(step, "eval_shape")
        with contextlib.nullcontext() if is_program else interrupts.allowed():
            result = self._steps.call(step, given, seq_ids, *args)
        self._were_held = were_held
        try:
            output, self.state = output_of(result, given), result[0]
        except TypeError:
            self.state = state_in(result, given)
            raise
        self.require_state()
        if not extends and not self._has_same_tables(given):
            try:
                self._oks.append(self._agrees())
            except Exception:  # The step has run all the same.
                self._doubt()
        return output

    def require_state(self) -> None:
        """Raises CacheLostError if the state was consumed, and not returned."""
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
                jax.block_until_ready(self.state)
            except Exception:
                self._has_failed = True

    def is_counted(self) -> bool:
        """Says whether the device has done what the host counted, as far as that is known.

        It does not wait for a step that is still running: what such a step does is seen later. If
        it is false, the cache is unsettled from then on.
        """
        # Once the last state is there, every answer is, or takes microseconds.
        num_free: Any = self.state.tables.num_free
        is_ready = bool(self._oks) and num_free.is_ready()
        while self._oks and (is_ready or self._oks[0].is_ready()):
            with self._reading():
                is_as_counted = bool(self._oks[0])
            self._oks.popleft()
            if not is_as_counted:
                self._oks.clear()
                self._doubt()
                return False
        return True

    def wait(self) -> None:
        """Waits for the device, as long as no signal handler raises."""
        with interrupts.allowed():
            jax.block_until_ready(self.state.tables.num_free)

    def settle(self) -> None:
        """Takes the counts from the device, and erases what was freed; waits for the device.

        What a row that is shorter than it was had behind its new end is erased too: else tokens
        that take these places would seem to be written.

        Raises:
          CacheLostError: If the device cannot tell.
        """
        if self._were_held is None:
            return
        before = self.num_tokens
        with self._reading():
            self._read_counts()
            self._erase_tails(np.flatnonzero(self.num_tokens < before))
            freed = programs.freed_since(self.state.tables, self._were_held)
            self._erase(np.flatnonzero(np.asarray(freed)))
        self._were_held = None

    def read_back(self, tree: T) -> T:
        """Returns a program's output on the host; the cache is lost where it cannot be read."""
        with self._reading():
            return jax.device_get(tree)

    def empty_strays(self) -> list[int]:
        """Frees rows that hold blocks and were not started here, and returns them."""
        strays = [row for row in self._free_rows if self.num_blocks_held[row]]
        if strays:
            ids = pad_to_power_of_two(np.asarray(strays), -1)
            self._were_held = programs.are_held(self.state.tables)
            self.state = programs.free_rows(self.state, ids, self._scrubs)
            self.settle()
        return strays

    def uncounted_error(self) -> UncountedTokensError:
        """Returns the error for a step that changed lengths unasked."""
        return UncountedTokensError(
            f"The tables on {self.device} are not what the manager had counted: a step changed "
            "lengths without a word. Pass extends=True to run for such steps. All lengths are "
            "what the device has now: ask again for what is short."
        )

    def _has_same_tables(self, given: CacheState) -> bool:
        pairs = zip(jax.tree.leaves(given.tables), jax.tree.leaves(self.state.tables), strict=True)
        return all(one is other for one, other in pairs)

    def _agrees(self) -> jax.Array:
        counts = self.num_tokens, self.num_blocks_held, self.num_free
        return programs.agree(self.state.tables, *(np.asarray(x, np.int32) for x in counts))

    def _doubt(self) -> None:
        """Leaves the cache unsettled, whatever blocks were held."""
        self._were_held = np.ones(self.num_blocks, bool)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Makes it a lost cache when the outcome of what has run cannot be read."""
        try:
            yield
        except Exception as error:
            self._has_failed = True
            raise CacheLostError(
                f"The cache on {self.device} is lost: what a program left there cannot be read. "
                "Close the manager and make another."
            ) from error

    def _erase(self, block_ids: np.ndarray) -> None:
        """Erases blocks that are free now, if blocks are erased."""
        if self._scrubs and block_ids.size:
            self.state = programs.erase_blocks(self.state, self._padded(block_ids))

    def _erase_tails(self, seq_ids: np.ndarray) -> None:
        """Erases what native rows have behind their last tokens, if blocks are erased."""
        is_native = self.token_formats[seq_ids] == TokenFormat.Native
        cut = seq_ids[is_native & (self.num_tokens[seq_ids] % self.block_size > 0)]
        if self._scrubs and cut.size:
            ids = pad_to_power_of_two(cut, NULL_SEQ)
            self.state = programs.erase_tails(self.state, ids)

    def _read_counts(self) -> None:
        """Takes the counts from the device; waits for it."""
        self.num_free, *counts = self._counts_of_device()
        self.num_tokens, self.num_blocks_held, self.token_formats, self.num_pruned = counts
        # A step may have cut rows, and replaced a block cut through by a copy.
        num_full = self.num_tokens // self.block_size
        self.num_cached_blocks = np.minimum(self.num_cached_blocks, num_full)
        self.note_sharing()

    def _padded(self, block_ids: Any) -> np.ndarray:
        return pad_to_power_of_two(np.asarray(block_ids, np.int32), self.num_blocks)
