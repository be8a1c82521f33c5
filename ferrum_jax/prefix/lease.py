"""A request's lease on a cached prefix, and the plan of a commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from ferrum_jax.prefix.tree import Match, Node, TreeBlock
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId


@dataclasses.dataclass(slots=True, eq=False)
class Lease:
    """One request's hold on a cached prefix: the blocks that it covers are not evicted.

    Attributes:
      salt: Salt of the request.
      node: Last node that the lease holds; a root while it covers no block.
      num_blocks: Number of blocks that the lease covers, from the request's first block on.
      is_counted: Whether the policy was told of this use.
    """

    salt: Hashable
    node: Node
    num_blocks: int
    is_counted: bool = False

    @property
    def tokens(self) -> TokenIds:
        """Tokens that the lease covers."""
        runs = [node.packed for node in self.node.path()]
        return TokenIds.from_packed(b"".join(reversed(runs)))

    @property
    def blocks(self) -> list[TreeBlock]:
        """Blocks that the lease covers, in order."""
        return [block for node in self.node.path() for block in node.blocks[::-1]][::-1]

    @property
    def block_ids(self) -> list[BlockId]:
        """Ids of the blocks that the lease covers, in order."""
        return [block.block_id for block in self.blocks]


@dataclasses.dataclass(frozen=True, slots=True)
class CommitPlan:
    """Changes that a commit makes to the request's row, the references, and the tree.

    Attributes:
      first: Logical index of the first block that the commit concerns.
      tokens: Tokens of all full blocks, from the sequence's first token on.
      match: Cached prefix of `tokens`; None if nothing is to be cached.
      adopted: Ids of cached blocks with equal content, which replace the row's own from `first`
        on.
      added: Ids of the row's blocks after these, to which the cache adds a reference.
      evicted: Ids of blocks evicted to stay within `max_prefixes`; the caller releases their
        references.
    """

    first: int
    tokens: TokenIds
    match: Match | None
    adopted: list[BlockId] = dataclasses.field(default_factory=list)
    added: list[BlockId] = dataclasses.field(default_factory=list)
    evicted: list[BlockId] = dataclasses.field(default_factory=list)
