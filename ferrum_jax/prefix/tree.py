"""Cached prompts as a radix tree: runs of tokens, and the blocks that hold them.

A node is a run of tokens that every sequence through it has in common. Runs may begin and end
inside a block; a block belongs to the node with its last token. So two prompts that part inside
a block have that block twice, once in each branch, and the tokens before the parting once. Only
full blocks are cached: a leaf ends with its last block.

Tokens themselves are compared, nothing is trusted to a hash. What a walk costs follows from the
nodes on its way, not from how many others there are: children are found by their first token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator

import numpy as np

from ferrum_jax.policies.blocks import CachedBlock
from ferrum_jax.tokens import TOKEN_BYTES, TokenIds


class Node:
    """A run of tokens in the tree. A root has none, and no parent.

    Attributes:
      packed: The run's tokens, packed.
      begin: Position of its first token.
      blocks: Blocks whose last token is in the run, in order.
      children: What may follow, by the first token (packed); what was used last is last.
      parent: What precedes it; None for a root, and for a node that was removed.
      num_users: Requests, and pins, that hold all of it.
      is_pinned: Whether one of these is a pin.
      ttl_seconds: How long it is kept unused.
      expires_at: When that is over; never before that of a child.
    """

    __slots__ = (
        "packed",
        "begin",
        "blocks",
        "children",
        "parent",
        "num_users",
        "is_pinned",
        "ttl_seconds",
        "expires_at",
    )

    def __init__(self, packed: bytes, begin: int, parent: Node | None):
        self.packed, self.begin, self.parent = packed, begin, parent
        self.blocks: list[TreeBlock] = []
        self.children: dict[bytes, Node] = {}
        self.num_users = 0
        self.is_pinned = False
        self.ttl_seconds, self.expires_at = math.inf, -math.inf

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.begin + len(self.packed) // TOKEN_BYTES

    def is_expired(self, now: float) -> bool:
        """Says whether it went unused for too long."""
        return now >= self.expires_at and not self.num_users

    def count_as_last(self) -> None:
        """Notes that, of all children of its parent, it was used last."""
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
        """Yields all nodes below and the node itself, children before parents."""
        order, waiting = [], [self]
        while waiting:
            order.append(waiting.pop())
            waiting += order[-1].children.values()
        return reversed(order)


class Root(Node):
    """Where the tree of a salt begins.

    Attributes:
      salt: What its prefixes were committed under.
    """

    __slots__ = ("salt",)

    def __init__(self, salt: Hashable):
        super().__init__(b"", 0, None)
        self.salt = salt
        self.expires_at = math.inf


@dataclasses.dataclass(slots=True, eq=False)
class TreeBlock(CachedBlock):
    """A cached block that knows its place.

    Attributes:
      node: Where it is.
    """

    node: Node

    @property
    def is_cached(self) -> bool:
        """Whether it is in its tree still."""
        return self in self.node.blocks

    @property
    def can_go(self) -> bool:
        """Whether nobody uses it and nothing cached follows it."""
        node = self.node
        return not node.num_users and not node.children and node.blocks[-1:] == [self]


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """How far a sequence is cached.

    Attributes:
      start: Where the walk began.
      node: Where the walk ended: the last node of which it has any token.
      num_tokens: Tokens that are cached.
      blocks: The full blocks that hold them, from `start` on.
      tail: The block that begins with those of `num_tokens` which fill no block, if any.
    """

    start: Node
    node: Node
    num_tokens: int
    blocks: list[TreeBlock]
    tail: TreeBlock | None

    @property
    def block_ids(self) -> list[int]:
        """Ids of the full blocks."""
        return [block.block_id for block in self.blocks]


def find(start: Node, tokens: TokenIds, limit: int, block_size: int, now: float) -> Match:
    """Walks down a tree as far as tokens agree.

    Args:
      start: Where to begin: the tokens up to its end are taken as agreed.
      tokens: A sequence, from its first token.
      limit: Tokens to look at.
      block_size: Tokens of a block.
      now: Seconds of the clock; what has expired by then is not there.

    Returns:
      What is cached behind `start` (blocks), and how many tokens are from the root on.
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
        behind = at + len(child.packed)
        if packed[at:behind] != child.packed:
            at += num_common_bytes(child.packed, packed[at:behind])
            break
        at = behind
    num_tokens = at // TOKEN_BYTES
    num_full = num_tokens // block_size
    del blocks[num_full - start.end // block_size :]
    tail = _block_at(node, num_full, now) if num_tokens % block_size else None
    if tail is None:
        num_tokens = num_full * block_size  # What was behind has gone, or expired.
    return Match(start, node, num_tokens, blocks, tail)


def _block_at(node: Node, logical_index: int, now: float) -> TreeBlock | None:
    """Returns the block at an index, which is in a node or below it."""
    below: Node | None = node
    while below is not None:
        place = logical_index - below.blocks[0].logical_index if below.blocks else 0
        if place < len(below.blocks):
            return below.blocks[place]
        # The child used last comes first here: however many have expired, they are not met.
        children = reversed(below.children.values())
        below = next((child for child in children if not child.is_expired(now)), None)
    return None


def split(node: Node, position: int, block_size: int) -> Node:
    """Cuts a node in two.

    Args:
      node: It becomes the lower part, so that who holds it holds all that was held.
      position: Where to cut: behind its first token, before its end.
      block_size: Tokens of a block.

    Returns:
      The upper part, held by all who hold the lower one, not pinned itself.
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
    """Returns the bytes of the tokens with which both begin."""
    size = min(len(first), len(second))
    differ = np.frombuffer(first[:size], np.int32) != np.frombuffer(second[:size], np.int32)
    return int(differ.argmax()) * TOKEN_BYTES if differ.any() else size
