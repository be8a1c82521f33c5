"""What the host knows of one device's pool without asking the device.

The counts follow from the calls, so that the host knows whether a request fits. They are not a
second truth: `DevicePool.check` compares them with the tables.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.codecs import CODECS, format_of
from ferrum_jax.types import TokenFormat


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Length and token format of one sequence.

    Attributes:
      held_len: Tokens in the row's blocks.
      token_format: How these tokens are stored.
      num_pruned: Tokens of the sequence that compression dropped.
    """

    held_len: int
    token_format: TokenFormat = TokenFormat.Native
    num_pruned: int = 0

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence, dropped ones included."""
        return self.held_len + self.num_pruned

    @property
    def is_compressed(self) -> bool:
        """Whether the blocks differ from what a model has written."""
        return not CODECS[self.token_format].is_native or self.num_pruned > 0


class PoolCounts:
    """Counts of a pool's blocks and rows; host only. S rows. Not thread-safe.

    Only the pool changes them, after the program that makes the same change on the device.

    Args:
      num_blocks: Blocks in the empty pool.
      max_blocks: Blocks that the pool may grow to.
      max_seqs: Rows (S).
      block_sizes: Tokens per block of each format that the pool's geometry allows.

    Attributes:
      num_blocks: Blocks in the pool now.
      max_blocks: As given.
      block_sizes: As given.
      num_free: Blocks that are free now.
      held_lens: int[S]. Tokens in the blocks of each row.
      num_blocks_held: int[S]. Blocks of each row.
      token_formats: int[S]. The `TokenFormat` of each row.
      num_pruned: int[S]. Tokens of each row's sequence that compression dropped.
      num_cached_blocks: int[S]. Leading blocks of each row that are in the prefix cache too.
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
    ):
        self.num_blocks = self.num_free = num_blocks
        self.max_blocks, self.block_sizes = max_blocks, block_sizes
        self.held_lens = np.zeros(max_seqs, int)
        self.num_blocks_held = np.zeros(max_seqs, int)
        self.token_formats = np.zeros(max_seqs, int)
        self.num_pruned = np.zeros(max_seqs, int)
        self.num_cached_blocks = np.zeros(max_seqs, int)
        self.num_prefix_blocks = 0
        self.taken: set[int] = set()
        self.may_share = False
        self._free_rows: list[int] = list(range(max_seqs - 1, -1, -1))

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
        """The row that `start_row` takes next."""
        return self._free_rows[-1]

    @property
    def stray_rows(self) -> list[int]:
        """Rows that hold blocks on the device and were not started here."""
        return [row for row in self._free_rows if self.num_blocks_held[row]]

    @property
    def of_rows(self) -> tuple[np.ndarray, ...]:
        """What the tables say of each row, as the host counts it: four int[S]."""
        return self.held_lens, self.num_blocks_held, self.token_formats, self.num_pruned

    def row_shape(self, seq_id: int) -> RowShape:
        """Returns the length and token format of a row."""
        return RowShape(
            held_len=int(self.held_lens[seq_id]),
            token_format=format_of(self.token_formats[seq_id]),
            num_pruned=int(self.num_pruned[seq_id]),
        )

    def seq_len(self, seq_id: int) -> int:
        """Returns the tokens of a row's sequence, dropped ones included."""
        return int(self.held_lens[seq_id] + self.num_pruned[seq_id])

    def blocks_for(self, num_tokens: int, token_format: TokenFormat = TokenFormat.Native) -> int:
        """Returns how many blocks hold `num_tokens`; the format need not be enabled yet."""
        return ceil_div(num_tokens, self.block_sizes[token_format])

    def num_new_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Returns how many blocks a row lacks for `num_tokens` more tokens."""
        total = int(self.held_lens[seq_id]) + num_tokens
        needed = self.blocks_for(total, format_of(self.token_formats[seq_id]))
        return max(0, needed - int(self.num_blocks_held[seq_id]))

    def note_sharing(self) -> None:
        """Updates `may_share` from the other counts."""
        own = int((self.num_blocks_held - self.num_cached_blocks).sum())
        self.may_share = own + self.num_prefix_blocks + len(self.taken) != self.num_used

    def set_cached(self, seq_id: int, num_blocks: int) -> None:
        """Notes how many leading blocks of a row are in the prefix cache."""
        self.num_cached_blocks[seq_id] = num_blocks

    def start_row(self, shape: RowShape, num_cached: int = 0) -> None:
        """Counts `next_row` as started; its first `num_cached` blocks were allocated before."""
        seq_id, num_found = self._free_rows.pop(), num_cached * self.block_size
        self.token_formats[seq_id] = shape.token_format
        self.num_pruned[seq_id] = shape.num_pruned
        self.num_blocks_held[seq_id] = self.num_cached_blocks[seq_id] = num_cached
        self.held_lens[seq_id] = num_found
        self.add_tokens(seq_id, shape.held_len - num_found)

    def add_tokens(self, seq_id: int, num_tokens: int) -> None:
        """Counts more tokens in a row, and the blocks allocated for them."""
        num_new = self.num_new_blocks(seq_id, num_tokens)
        self.num_free -= num_new
        self.num_blocks_held[seq_id] += num_new
        self.held_lens[seq_id] += num_tokens

    def end_rows(self, seq_ids: Sequence[int]) -> int:
        """Counts rows as free, and returns how many blocks they held outside the prefix cache."""
        rows = np.asarray(seq_ids)
        num_own = int((self.num_blocks_held[rows] - self.num_cached_blocks[rows]).sum())
        for counts in (*self.of_rows, self.num_cached_blocks):
            counts[rows] = 0
        self._free_rows.extend(seq_ids)
        return num_own

    def replace(self, num_free: int, of_rows: Sequence[np.ndarray]) -> None:
        """Replaces the counts by what the tables say; see `of_rows`."""
        self.num_free = num_free
        self.held_lens, self.num_blocks_held, self.token_formats, self.num_pruned = of_rows
        # A step may have truncated rows, and replaced a block that was cut through by a copy.
        num_full = self.held_lens // self.block_size
        self.num_cached_blocks = np.minimum(self.num_cached_blocks, num_full)
        self.note_sharing()
