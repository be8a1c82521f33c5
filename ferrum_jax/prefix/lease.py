"""A request's lease on a cached prefix."""

from __future__ import annotations

import dataclasses

from ferrum_jax.prefix.forest import Hold
from ferrum_jax.prefix.tree import Node, TreeBlock, TreeKey
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId


@dataclasses.dataclass(slots=True, eq=False)
class Lease:
    """One request's hold on a cached prefix: the blocks that it covers are not evicted.

    Attributes:
      key: Salt of the request, and version of the weights when it started.
      node: Last node that the lease holds; a root while it covers no block.
      num_blocks: Number of blocks that the lease covers, from the request's first block on.
      first_window: Logical index of the first of them that is held in window groups, at most
        `num_blocks`.
      is_counted: Whether the policy was told of this use.
    """

    key: TreeKey
    node: Node
    num_blocks: int
    first_window: int = 0
    is_counted: bool = False

    @property
    def hold(self) -> Hold:
        """The lease's hold on the trees."""
        return self.node, self.first_window

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
    def marks(self) -> list[tuple[TreeBlock, int]]:
        """These blocks, and their `num_fills`: a later one means that ids were added."""
        return [(block, block.num_fills) for block in self.blocks]

    @property
    def block_ids(self) -> list[BlockId]:
        """Ids of the blocks that the lease covers in the lead group, in order."""
        return [block.block_id for block in self.blocks]
