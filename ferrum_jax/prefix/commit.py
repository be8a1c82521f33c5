"""The plan of a commit: which cached blocks a row takes, and which of its own are cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ferrum_jax.prefix.tree import Match, TreeBlock
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_BLOCK, BlockId

BlockIds = tuple[BlockId, ...]
"""Ids of one block in each layer group; `NULL_BLOCK` where there is none."""


class CommitPlan(NamedTuple):
    """Changes that a commit makes to the request's row, the references, and the tree.

    Attributes:
      first: Logical index of the first block that the commit concerns.
      tokens: Tokens of all full blocks, from the sequence's first token on.
      match: Cached prefix of `tokens`; None if nothing is to be cached.
      num_blocks: Number of leading blocks that the lease covers afterwards.
      adopted: For each layer group, ids of cached blocks with equal content, which replace the
        row's own from `first` on; `NULL_BLOCK` where the row keeps its own, or has none.
      new: Ids of the row's blocks after these, each of which becomes a cached block.
      filled: Adopted blocks that lack ids of the row in window groups, with all of their new ids.
      added: Ids of the row, in all groups, to which the cache adds a reference.
      evicted: Ids of blocks evicted to stay within `max_prefixes`; the caller releases their
        references.
      first_window: Logical index of the first block that the row holds in any window group.
    """

    first: int
    tokens: TokenIds
    match: Match | None
    num_blocks: int
    adopted: list[list[BlockId]]
    new: Sequence[BlockIds] = ()
    filled: Sequence[tuple[TreeBlock, BlockIds]] = ()
    added: Sequence[BlockId] = ()
    evicted: Sequence[BlockId] = ()
    first_window: int = 0


def adopt(
    blocks: Sequence[TreeBlock], row_blocks: Sequence[Sequence[BlockId]], first: int
) -> tuple[list[list[BlockId]], list[tuple[TreeBlock, BlockIds]], list[BlockId]]:
    """Returns what replaces a row's blocks, and what the cached blocks take from the row.

    Args:
      blocks: Cached blocks with the content of the row's, from `first` on.
      row_blocks: The row's ids in each layer group.
      first: Logical index of the first of `blocks`.

    Returns:
      `(adopted, filled, added)` of a `CommitPlan`, without new blocks.
    """
    adopted: list[list[BlockId]] = [[] for _ in row_blocks]
    filled: list[tuple[TreeBlock, BlockIds]] = []
    added: list[BlockId] = []
    for index, block in enumerate(blocks, first):
        own, ids = [row[index] for row in row_blocks], list(block.block_ids)
        for group, (cached, mine) in enumerate(zip(block.block_ids, own, strict=True)):
            adopted[group].append(cached if mine != NULL_BLOCK else NULL_BLOCK)
            if cached == NULL_BLOCK != mine:
                ids[group] = mine
                added.append(mine)
        if tuple(ids) != block.block_ids:
            filled.append((block, tuple(ids)))
    return adopted, filled, added
