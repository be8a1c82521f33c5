"""Radix tree of cached prompts: runs of tokens, and the blocks that hold them.

A node is a run of tokens that is common to all sequences through it. Runs may begin and end
inside a block; a block belongs to the node of its last token. So if two prompts first differ
inside a block, each branch has its own copy of that block, and the tokens before it are stored
once. Only full blocks are cached: a leaf ends with its last block.

Tokens themselves are compared, never only hashes. The cost of a walk depends on the nodes of its
path, not on the size of the tree: children are found by their first token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ferrum_jax.policies.blocks import CachedBlock
from ferrum_jax.tokens import TOKEN_BYTES, TokenIds
from ferrum_jax.types import NULL_BLOCK, BlockId


class Node:
    """A run of tokens in the tree. A root has no tokens and no parent.

    Attributes:
      packed: The run's tokens, packed.
      begin: Position of the run's first token.
      blocks: Blocks that end in the run, in order.
      children: Following nodes by their first token (packed), the most recently used last.
      parent: Preceding node; None for a root, and for a node that was removed.
      root: The root of its tree.
      num_users: Number of requests and pins that hold the whole node.
      is_pinned: Whether one of these is a pin.
      ttl_seconds: Time to live without use.
      expires_at: End of that time, in seconds of the clock; never before that of a child.
    """

    __slots__ = (
        "packed",
        "begin",
        "blocks",
        "children",
        "parent",
        "root",
        "num_users",
        "is_pinned",
        "ttl_seconds",
        "expires_at",
    )

    root: Root

    def __init__(self, packed: bytes, begin: int, parent: Node | None):
        self.packed, self.begin, self.parent = packed, begin, parent
        if parent is not None:
            self.root = parent.root
        self.blocks: list[TreeBlock] = []
        self.children: dict[bytes, Node] = {}
        self.num_users = 0
        self.is_pinned = False
        self.ttl_seconds, self.expires_at = math.inf, -math.inf

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.begin + len(self.packed) // TOKEN_BYTES

    def is_expired(self, now: float) -> bool:
        """Returns whether the node is unused and past its time to live."""
        return now >= self.expires_at and not self.num_users

    def count_as_last(self) -> None:
        """Makes the node the most recently used child of its parent."""
        if self.parent is not None:
            siblings, key = self.parent.children, self.packed[:TOKEN_BYTES]
            siblings[key] = siblings.pop(key)

    def path(self) -> Iterator[Node]:
        """Yields the node, its parent and so on up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def subtree(self) -> Iterator[Node]:
        """Yields all nodes below and the node itself, children before their parents."""
        order, waiting = [], [self]
        while waiting:
            order.append(waiting.pop())
            waiting += order[-1].children.values()
        return reversed(order)


class TreeKey(NamedTuple):
    """What prompts must have in common to share prefixes.

    Attributes:
      salt: Salt of the prompts; None for prompts without one.
      version: Version of the weights that computed the blocks.
    """

    salt: Hashable
    version: Hashable


class Root(Node):
    """Root of the tree of one key.

    Attributes:
      key: Salt and version under which the tree's prefixes were committed.
    """

    __slots__ = ("key",)

    def __init__(self, key: TreeKey):
        super().__init__(b"", 0, None)
        self.root, self.key = self, key
        self.expires_at = math.inf


@dataclasses.dataclass(slots=True, eq=False)
class TreeBlock(CachedBlock):
    """A cached block in the tree.

    Attributes:
      node: Node of the block's last token.
      group_ids: Id in each layer group, `NULL_BLOCK` where a window group has none; empty if the
        only group is a full one, of which `block_id` is the id.
      window_users: Number of requests and pins that hold its ids in window groups.
      num_fills: How often window groups have added ids that it lacked.
    """

    node: Node
    group_ids: tuple[BlockId, ...] = ()
    window_users: int = 0
    num_fills: int = 0

    @property
    def block_ids(self) -> tuple[BlockId, ...]:
        """Id in each layer group, `NULL_BLOCK` where a window group has none."""
        return self.group_ids or (self.block_id,)

    @property
    def held_ids(self) -> list[BlockId]:
        """Ids to which the cache has a reference."""
        ids = self.group_ids
        return [i for i in ids if i != NULL_BLOCK] if ids else [self.block_id]

    def set_ids(self, block_ids: Sequence[BlockId], lead: int) -> None:
        """Replaces the ids in all groups; `block_id` is the one in the group `lead`."""
        self.block_id = block_ids[lead]
        if self.group_ids:
            self.group_ids = tuple(block_ids)

    @property
    def is_cached(self) -> bool:
        """Whether the block is still in its tree."""
        return self in self.node.blocks

    @property
    def can_evict(self) -> bool:
        """Whether the block is unused and no cached block follows it."""
        node = self.node
        is_end = not node.num_users and not node.children and bool(node.blocks)
        return is_end and node.blocks[-1] is self


class Match(NamedTuple):
    """The longest cached prefix of a sequence.

    Attributes:
      start: Node at which the walk began.
      node: Node at which the walk ended: the last one of which any token matched.
      num_tokens: Number of matching tokens, from the root on.
      blocks: Full blocks of matching tokens, from `start` on.
      tail: Block that begins with the last `num_tokens % block_size` matching tokens; None if
        there are no such tokens.
      num_released: Leading blocks that each layer group does not take, since its window has
        passed them.
    """

    start: Node
    node: Node
    num_tokens: int
    blocks: list[TreeBlock]
    tail: TreeBlock | None
    num_released: tuple[int, ...] = (0,)

    @property
    def block_ids(self) -> list[BlockId]:
        """Ids of the full blocks in the lead group."""
        return [block.block_id for block in self.blocks]

    @property
    def row_blocks(self) -> list[list[BlockId]]:
        """Ids of the full blocks in each layer group, `NULL_BLOCK` where it takes none."""
        if self.num_released == (0,):
            return [self.block_ids]
        return [
            [NULL_BLOCK] * first + [block.block_ids[group] for block in self.blocks[first:]]
            for group, first in enumerate(self.num_released)
        ]


def find(start: Node, tokens: TokenIds, limit: int, block_size: int, now: float) -> Match:
    """Finds the longest cached prefix of a sequence.

    Args:
      start: Node to begin at; the tokens up to its end are assumed to match.
      tokens: The sequence, from its first token.
      limit: Number of tokens to compare at most.
      block_size: Tokens per block.
      now: Seconds of the clock; nodes that have expired by then are ignored.

    Returns:
      The match.
    """
    packed, end = tokens.packed[: limit * TOKEN_BYTES], limit * TOKEN_BYTES
    node, at = start, start.end * TOKEN_BYTES
    blocks: list[TreeBlock] = []
    while at < end:
        child = node.children.get(packed[at : at + TOKEN_BYTES])
        if child is None or child.is_expired(now):
            break
        node = child
        blocks += child.blocks
        after = at + len(child.packed)
        if packed[at:after] != child.packed:
            at += num_common_bytes(child.packed, packed[at:after])
            break
        at = after
    num_tokens = at // TOKEN_BYTES
    num_full = num_tokens // block_size
    del blocks[num_full - start.end // block_size :]
    tail = _block_at(node, num_full, now) if num_tokens % block_size else None
    if tail is None:
        num_tokens = num_full * block_size  # The block of the rest was evicted, or has expired.
    return Match(start, node, num_tokens, blocks, tail)


def _block_at(node: Node, logical_index: int, now: float) -> TreeBlock | None:
    """Returns the block at a logical index, in a node or below it, if it is still there."""
    below: Node | None = node
    while below is not None:
        place = logical_index - below.blocks[0].logical_index if below.blocks else 0
        if place < len(below.blocks):
            return below.blocks[place]
        # The most recently used child comes first, so expired ones cost nothing, however many.
        children = reversed(below.children.values())
        below = next((child for child in children if not child.is_expired(now)), None)
    return None


def blocks_from(node: Node, first: int) -> list[TreeBlock]:
    """Returns the blocks of the path to `node` from a logical index on, in order."""
    runs: list[list[TreeBlock]] = []
    for above in node.path():
        num_before = first - above.blocks[0].logical_index if above.blocks else 0
        runs.append(above.blocks[max(0, num_before) :])
        if above.blocks and num_before >= 0:
            break
    return [block for run in reversed(runs) for block in run]


def split(node: Node, position: int, block_size: int) -> Node:
    """Splits a node in two.

    Args:
      node: Node to split. It becomes the lower part, so its holders still hold all tokens.
      position: Position at which the lower part begins, after the node's first token.
      block_size: Tokens per block.

    Returns:
      The upper part, with the same users, but not pinned itself.
    """
    assert node.parent is not None and node.begin < position < node.end
    cut = (position - node.begin) * TOKEN_BYTES
    upper = Node(node.packed[:cut], node.begin, node.parent)
    upper.num_users, upper.expires_at = node.num_users, node.expires_at
    upper.ttl_seconds = node.ttl_seconds
    num_upper = sum((block.logical_index + 1) * block_size <= position for block in node.blocks)
    upper.blocks, node.blocks = node.blocks[:num_upper], node.blocks[num_upper:]
    for block in upper.blocks:
        block.node = upper
    node.parent.children[upper.packed[:TOKEN_BYTES]] = upper
    node.packed, node.begin, node.parent = node.packed[cut:], position, upper
    upper.children[node.packed[:TOKEN_BYTES]] = node
    return upper


def num_common_bytes(first: bytes, second: bytes) -> int:
    """Returns how many bytes two packed sequences have in common at the beginning."""
    size = min(len(first), len(second))
    differ = np.frombuffer(first[:size], np.int32) != np.frombuffer(second[:size], np.int32)
    return int(differ.argmax()) * TOKEN_BYTES if differ.any() else size


def blocks_below(node: Node) -> list[TreeBlock]:
    """Returns the blocks of a node and of all nodes below, each after the blocks that follow it."""
    return [block for below in node.subtree() for block in reversed(below.blocks)]
