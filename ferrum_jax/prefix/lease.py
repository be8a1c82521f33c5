"""A request's hold on what is cached, and what a commit asks of its row."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from ferrum_jax.prefix.tree import Node
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
    def block_ids(self) -> list[BlockId]:
        """The blocks that it covers, in order."""
        last_first = [block.block_id for node in self.node.path() for block in node.blocks[::-1]]
        return last_first[::-1]


@dataclasses.dataclass(frozen=True, slots=True)
class Committed:
    """What a commit asks of the request's row and of the references.

    Attributes:
      first: Logical index of the first block concerned.
      adopted: Blocks that were cached meanwhile: the row is to hold these, from `first` on, in
        place of its own.
      added: Blocks of the row, those after `adopted`, that the cache holds too from now on.
      evicted: Blocks that the cache has let go, to stay within `max_prefixes`.
    """

    first: int
    adopted: list[BlockId]
    added: list[BlockId]
    evicted: list[BlockId]
