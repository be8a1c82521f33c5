"""What the host knows of one device's cache without asking the device.

The counts follow from what was asked, so that the host knows whether a call fits. They are not a
second truth: `check` holds them against the tables.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import ferrum_jax.manager.programs as programs
from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.invariants import check_state
from ferrum_jax.state import CacheState
from ferrum_jax.types import TokenFormat


@dataclasses.dataclass(frozen=True)
class RowShape:
    """How much a row holds, and how.

    Attributes:
      num_tokens: Tokens in its blocks.
      token_format: How they are written.
      num_pruned: Tokens of its sequence that were dropped.
    """

    num_tokens: int
    token_format: TokenFormat = TokenFormat.Native
    num_pruned: int = 0

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.num_tokens + self.num_pruned

    @property
    def is_compressed(self) -> bool:
        """Whether its blocks are not what a model has written."""
        return self.token_format != TokenFormat.Native or self.num_pruned > 0


class CacheCounts:
    """A cache state, and what is counted of it. Not thread-safe.

    Args:
      state: An empty cache.
      max_blocks: Blocks that its pool may grow to.

    Attributes:
      state: The cache itself.
      max_blocks: As given.
      num_free: Blocks that are free now.
      num_tokens: Tokens in the blocks of each row.
      token_formats: How these are written.
      num_pruned: Tokens of each row's sequence that were dropped.
      num_blocks_held: Blocks of each row.
      num_cached_blocks: Blocks of each row, its first ones, that are kept for later prompts too.
      num_kept: Blocks that are kept for later prompts, each one reference.
      taken: Blocks that were taken for no row.
      may_share: Whether rows may share blocks that are not kept.
    """

    def __init__(self, state: CacheState, max_blocks: int):
        self.state, self.max_blocks = state, max_blocks
        max_seqs = state.tables.max_seqs
        self.num_free = state.tables.num_blocks
        self.num_tokens = np.zeros(max_seqs, int)
        self.token_formats = np.zeros(max_seqs, int)
        self.num_pruned = np.zeros(max_seqs, int)
        self.num_blocks_held = np.zeros(max_seqs, int)
        self.num_cached_blocks = np.zeros(max_seqs, int)
        self.num_kept = 0
        self.taken: set[int] = set()
        self._free_rows: list[int] = list(range(max_seqs - 1, -1, -1))
        self.may_share = False

    @property
    def block_size(self) -> int:
        """Tokens a native block."""
        return self.state.tables.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool now."""
        return self.state.tables.num_blocks

    @property
    def num_used(self) -> int:
        """Blocks in use."""
        return self.num_blocks - self.num_free

    @property
    def num_available(self) -> int:
        """Blocks that could be taken, growth counted."""
        return self.max_blocks - self.num_used

    @property
    def num_free_rows(self) -> int:
        """Sequences that could be held besides those that are."""
        return len(self._free_rows)

    def row_shape(self, seq_id: int) -> RowShape:
        """Returns how much a row holds, and how."""
        return RowShape(
            num_tokens=int(self.num_tokens[seq_id]),
            token_format=TokenFormat(int(self.token_formats[seq_id])),
            num_pruned=int(self.num_pruned[seq_id]),
        )

    def length(self, seq_id: int) -> int:
        """Returns the tokens of a row's sequence, those included that were dropped."""
        return int(self.num_tokens[seq_id] + self.num_pruned[seq_id])

    def blocks_for(self, num_tokens: int, token_format: TokenFormat = TokenFormat.Native) -> int:
        """Returns how many blocks hold `num_tokens`, whether or not the format is enabled yet."""
        return ceil_div(num_tokens, self.state.pool.tokens_per_block(token_format))

    def possible_block_sizes(self) -> dict[TokenFormat, int]:
        """Returns the tokens a block of each format that the pool's geometry allows."""
        sizes = {}
        for token_format in TokenFormat:
            with contextlib.suppress(ValueError):
                sizes[token_format] = self.state.pool.tokens_per_block(token_format)
        return sizes

    def num_new_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Returns how many blocks a row lacks for `num_tokens` more tokens."""
        total = int(self.num_tokens[seq_id]) + num_tokens
        needed = self.blocks_for(total, TokenFormat(int(self.token_formats[seq_id])))
        return max(0, needed - int(self.num_blocks_held[seq_id]))

    def num_freed_by(self, seq_ids: Sequence[int]) -> int:
        """Returns how many blocks would be free if rows ended, kept ones aside."""
        rows, tables = list(seq_ids), self.state.tables
        if not self.may_share:
            return int((self.num_blocks_held[rows] - self.num_cached_blocks[rows]).sum())
        block_ids, ref_counts = jax.device_get((tables.block_ids, tables.ref_counts))
        own = [
            block_ids[row, self.num_cached_blocks[row] : self.num_blocks_held[row]] for row in rows
        ]
        mentions = np.bincount(np.concatenate([*own, np.zeros(0, int)]), minlength=ref_counts.size)
        return int(((mentions > 0) & (mentions == ref_counts)).sum())

    def num_unshared(self, block_ids: Sequence[int], first: int) -> int:
        """Returns how many blocks of a row come before one, from `first` on, of another row too."""
        if not self.may_share:
            return len(block_ids)
        ref_counts = jax.device_get(self.state.tables.ref_counts)
        is_shared = ref_counts[np.asarray(block_ids[first:], int)] > 1
        return first + int(is_shared.argmax()) if is_shared.any() else len(block_ids)

    def num_blocks_to_share(self, target: int, num_tokens: int) -> int:
        """Returns how many blocks `share` takes: one for a last block that has another owner."""
        num_full, num_tail = divmod(num_tokens, self.block_size)
        if not num_tail or num_full < self.num_cached_blocks[target]:
            return 0
        return int(self.num_unshared(self.row_blocks(target)[: num_full + 1], num_full) == num_full)

    def num_blocks_to_compress(self, seq_id: int, num_blocks: int) -> int:
        """Returns how many blocks a row takes to be written anew in `num_blocks`; waits.

        It is one for each that has another owner too, as far as its own do not suffice.
        """
        ref_counts = jax.device_get(self.state.tables.ref_counts)
        num_own = int((ref_counts[self.row_blocks(seq_id)] == 1).sum())
        return max(0, num_blocks - num_own)

    def row_blocks(self, seq_id: int) -> list[int]:
        """Returns a row's blocks in order; waits for the device."""
        row = np.asarray(
            programs.one_row(self.state.tables.block_ids, np.asarray(seq_id, np.int32))
        )
        return row[: self.num_blocks_held[seq_id]].tolist()

    def all_row_blocks(self) -> dict[int, list[int]]:
        """Returns every row's blocks in order, of those that hold any; waits for the device."""
        block_ids = jax.device_get(self.state.tables.block_ids)
        held = np.flatnonzero(self.num_blocks_held)
        return {int(i): block_ids[i, : self.num_blocks_held[i]].tolist() for i in held}

    def note_sharing(self) -> None:
        """Notes whether rows may share blocks beside those that are kept, as the counts tell."""
        own = int((self.num_blocks_held - self.num_cached_blocks).sum())
        self.may_share = own + self.num_kept + len(self.taken) != self.num_used

    def is_free(self, block_id: int) -> bool:
        """Says whether nobody holds a block of the pool; waits for the device."""
        return int(self.state.tables.ref_counts[block_id]) == 0

    def check(self, kept: Sequence[int] = ()) -> None:
        """Raises AssertionError unless state and counts hold together; waits for the device.

        Args:
          kept: The blocks that are kept for later prompts.
        """
        pins = np.zeros(self.num_blocks, int)
        pins[[*self.taken, *kept]] = 1
        check_state(self.state, pins)
        if len(kept) != self.num_kept:
            raise AssertionError(f"{len(kept)} blocks are kept, and {self.num_kept} are counted.")
        counted, found = [self.num_free, *self._counts], self._counts_of_device()
        if not all(map(np.array_equal, counted, found)):
            raise AssertionError(f"The host counted {counted}, the device {found}.")

    @property
    def _counts(self) -> tuple[np.ndarray, ...]:
        """What the tables say of each row, as the host counts it."""
        return self.num_tokens, self.num_blocks_held, self.token_formats, self.num_pruned

    def _counts_of_device(self) -> list[Any]:
        tables = self.state.tables
        rows = tables.seq_lens, tables.num_blocks_held, tables.formats, tables.num_pruned
        num_free, *counts = jax.device_get((tables.num_free, *rows))
        return [int(num_free), *(x.astype(int) for x in counts)]
