"""Length and token format of sequences, and of their rows in each layer group."""

import contextlib
import dataclasses
from typing import NamedTuple

from ferrum_jax.codecs import CODECS
from ferrum_jax.state import BlockPool
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


def block_sizes_of(pool: BlockPool) -> list[int]:
    """Returns the tokens per block of each format; 0 where the geometry does not allow it."""
    sizes = [0] * len(CODECS)
    for token_format in CODECS:
        with contextlib.suppress(ValueError):
            sizes[token_format] = pool.tokens_per_block(token_format)
    return sizes
