"""A request's hold on what is cached, and what a commit asks of its row."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from ferrum_jax.prefix.tree import Match, Node, TreeBlock
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId


@dataclasses.dataclass(slots=True, eq=False)
class Lease:
    """One request's hold on a cached prefix: what it covers is not evicted.

    Attributes:
      salt: What it was taken under.
      node: The last node that it holds, whole; a root while it holds nothing.
      num_blocks: Blocks that it covers, the first ones of its request.
      is_counted: Whether the policy has heard of this use.
    """

    salt: Hashable
    node: Node
    num_blocks: int
    is_counted: bool = False

    @property
    def tokens(self) -> TokenIds:
        """The tokens that it covers."""
        runs = [node.packed for node in self.node.path()]
        return TokenIds.from_packed(b"".join(reversed(runs)))

    @property
    def blocks(self) -> list[TreeBlock]:
        """The blocks that it covers, in order."""
        return [block for node in self.node.path() for block in node.blocks[::-1]][::-1]

    @property
    def block_ids(self) -> list[BlockId]:
        """The ids of the blocks that it covers, in order."""
        return [block.block_id for block in self.blocks]


@dataclasses.dataclass(frozen=True, slots=True)
class CommitPlan:
    """What a commit does to the request's row, to the references, and to the tree.

    Attributes:
      first: Logical index of the first block concerned.
      tokens: The tokens of all full blocks, from the first one on.
      match: How far they are cached already; None if nothing is to be cached.
      adopted: Blocks that were cached meanwhile: the row is to hold these, from `first` on, in
        place of its own.
      added: Blocks of the row, those after `adopted`, that the cache holds too from now on.
      evicted: Blocks that were evicted to stay within `max_prefixes`: their references are to be
        dropped.
    """

    first: int
    tokens: TokenIds
    match: Match | None
    adopted: list[BlockId] = dataclasses.field(default_factory=list)
    added: list[BlockId] = dataclasses.field(default_factory=list)
    evicted: list[BlockId] = dataclasses.field(default_factory=list)
