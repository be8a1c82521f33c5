"""The radix trees of all salts, with counts of their blocks and prefixes.

This module adds, splits, holds and removes nodes; `cache` decides which blocks to keep.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.tree import Match, Node, Root, TreeBlock, find, split
from ferrum_jax.tokens import TOKEN_BYTES, TokenIds
from ferrum_jax.types import BlockId


class Forest:
    """A radix tree of cached blocks for each salt.

    Args:
      block_size: Tokens per block.

    Attributes:
      block_size: As given.
      ttl_seconds: Time to live of new nodes.
      blocks: All blocks in the trees, by id.
      num_idle_blocks: Number of blocks without users.
      num_prefixes: Number of leaves.
    """

    def __init__(self, block_size: int):
        self.block_size, self.ttl_seconds = block_size, math.inf
        self.blocks: dict[BlockId, TreeBlock] = {}
        self.num_idle_blocks = self.num_prefixes = 0
        self._roots: dict[Hashable, Root] = {}
        self._shortened: set[Node] = set()
        self._deadlines: list[tuple[float, int, Node]] = []
        self._numbers, self._num_removed = itertools.count(), 0

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the trees."""
        return len(self.blocks)

    def salts(self) -> list[Hashable]:
        """Returns the salts that have a tree."""
        return list(self._roots)

    def find(self, salt: Hashable, tokens: TokenIds, limit: int, now: float) -> Match:
        """Finds the longest cached prefix under a salt; see `tree.find`."""
        root = self._roots.get(salt) or Root(salt)
        return find(root, tokens, limit, self.block_size, now)

    def subtree_of(self, salt: Hashable) -> list[TreeBlock]:
        """Returns all blocks under a salt, each after the blocks that follow it."""
        root = self._roots.get(salt)
        return blocks_below(root) if root is not None else []

    def nodes(self) -> Iterator[Node]:
        """Yields all nodes, children before their parents."""
        for root in list(self._roots.values()):
            yield from root.subtree()

    # Holding.

    def ending_at(self, node: Node, position: int) -> Node:
        """Returns the node of the path to `node` that ends at a position; splits one if needed."""
        while node.begin >= position and node.parent is not None:
            node = node.parent
        if node.end == position:
            return node
        upper = split(node, position, self.block_size)
        self.schedule(upper, upper.expires_at)
        return upper

    def hold(self, node: Node, until: Node | None = None) -> None:
        """Adds a user to all nodes of the path to `node`, or to those below `until`."""
        for held in node.path():
            if held is until:
                return
            if not held.num_users:
                self.num_idle_blocks -= len(held.blocks)
            held.num_users += 1
            if isinstance(held, Root):
                self._roots.setdefault(held.salt, held)

    def release(self, node: Node) -> None:
        """Removes a user from all nodes of the path to `node`."""
        for held in node.path():
            held.num_users -= 1
            if not held.num_users:
                self.num_idle_blocks += len(held.blocks)
            self._discard_if_empty(held)

    def num_idle_without(self, holders: Iterable[Node]) -> int:
        """Returns how many more blocks would be idle after some releases.

        Args:
          holders: Nodes that would be released.
        """
        users = _count_users(holders)
        return sum(len(node.blocks) for node, count in users.items() if count == node.num_users)

    # Growing.

    def would_add_prefix(self, match: Match) -> bool:
        """Returns whether appending to a match adds a prefix, rather than lengthens one."""
        node = match.node
        return node.parent is None or bool(node.children) or match.num_tokens < node.end

    def append(
        self, match: Match, tokens: TokenIds, block_ids: Sequence[BlockId], holder: Node
    ) -> list[TreeBlock]:
        """Adds blocks after a match.

        Args:
          match: Cached prefix of `tokens`.
          tokens: All tokens from the first one on, up to the end of the last new block.
          block_ids: Ids of the blocks to add, at least one.
          holder: Last node that the request of these blocks holds.

        Returns:
          The new blocks.
        """
        self.num_prefixes += self.would_add_prefix(match)
        node = self.ending_at(match.node, match.num_tokens)
        packed = tokens.packed[match.num_tokens * TOKEN_BYTES :]
        if self._may_grow(node, holder):
            node.packed += packed
        else:
            parent, node = node, Node(packed, match.num_tokens, node)
            parent.children[packed[:TOKEN_BYTES]] = node
            node.ttl_seconds = self.ttl_seconds
            self.schedule(node, -math.inf)
        first = match.num_tokens // self.block_size
        blocks = self._new_blocks(node, tokens, block_ids, first)
        node.blocks += blocks
        self.blocks.update((block.block_id, block) for block in blocks)
        if not node.num_users:
            self.num_idle_blocks += len(blocks)
        return blocks

    def _may_grow(self, node: Node, holder: Node) -> bool:
        """Returns whether a run can be lengthened: it is a leaf of equal retention, held only here.

        Args:
          node: Node of the run.
          holder: Last node that the request of the new blocks holds.
        """
        if node.children or node.parent is None or node.is_pinned:
            return False
        is_own = node.num_users == (1 if node is holder else 0)
        return is_own and node.ttl_seconds == self.ttl_seconds

    def _new_blocks(
        self, node: Node, tokens: TokenIds, block_ids: Sequence[BlockId], first: int
    ) -> list[TreeBlock]:
        before = next((above.blocks[-1] for above in node.path() if above.blocks), None)
        key = hash(root_of(node).salt) if before is None else before.prefix_key
        blocks, retention, size = [], Retention(), self.block_size * TOKEN_BYTES
        for i, block_id in enumerate(block_ids, first):
            key = hash((key, tokens.packed[i * size : (i + 1) * size]))
            blocks.append(TreeBlock(block_id, i, key, retention, node))
        return blocks

    # Removing.

    def remove(self, block: TreeBlock) -> None:
        """Removes an evictable block; call `shorten_leaves` after the last of several."""
        node = block.node
        assert block.can_evict
        node.blocks.pop()
        del self.blocks[block.block_id]
        self.num_idle_blocks -= 1
        self._shortened.add(node)
        while not (node.blocks or node.children) and node.parent is not None:
            parent, node.parent = node.parent, None
            del parent.children[node.packed[:TOKEN_BYTES]]
            self._num_removed += 1
            self._shortened.add(parent)
            if parent.children or parent.parent is None:
                self.num_prefixes -= 1
            node = parent
        self._discard_if_empty(node)

    def shorten_leaves(self) -> None:
        """Shortens leaves that have lost blocks, since a leaf ends with its last block."""
        for node in self._shortened:
            if node.parent is not None and not node.children:
                end = (node.blocks[-1].logical_index + 1) * self.block_size
                node.packed = node.packed[: (end - node.begin) * TOKEN_BYTES]
        self._shortened.clear()
        if self._num_removed > len(self._deadlines) // 2:
            self._deadlines = [due for due in self._deadlines if due[2].parent is not None]
            heapq.heapify(self._deadlines)
            self._num_removed = 0

    def has(self, block: TreeBlock) -> bool:
        """Returns whether a block is in one of these trees."""
        if not block.is_cached:
            return False
        root = root_of(block.node)
        return self._roots.get(root.salt) is root

    def any_evictable(self) -> TreeBlock | None:
        """Returns an evictable block, if any."""
        return next((block for block in self.blocks.values() if block.can_evict), None)

    def renumber(self, new_ids: Mapping[BlockId, BlockId]) -> None:
        """Updates the ids of blocks that have moved in the pool, by their old ids."""
        for block in self.blocks.values():
            block.block_id = new_ids.get(block.block_id, block.block_id)
        self.blocks = {block.block_id: block for block in self.blocks.values()}

    def schedule(self, node: Node, at: float) -> None:
        """Makes `pop_expired` examine a node at a time, in seconds of the clock, or later."""
        if at < math.inf:
            heapq.heappush(self._deadlines, (at, next(self._numbers), node))

    def pop_expired(self, now: float) -> Iterator[Node]:
        """Yields expired nodes. Remove each with all nodes below before asking for the next."""
        while self._deadlines and self._deadlines[0][0] <= now:
            node = heapq.heappop(self._deadlines)[2]
            if node.parent is None:
                continue  # Removed before.
            if node.is_expired(now):
                yield node
            else:
                # After its last release it is kept for at least its time to live.
                is_due = node.expires_at <= now
                self.schedule(node, now + node.ttl_seconds if is_due else node.expires_at)

    def _discard_if_empty(self, node: Node) -> None:
        """Discards a root without children and users."""
        if isinstance(node, Root) and not node.children and not node.num_users:
            self._roots.pop(node.salt, None)

    # Checking.

    def check(self, holders: Iterable[Node]) -> None:
        """Raises AssertionError unless trees and counts agree.

        Args:
          holders: Last node of each hold, except for pins.
        """
        nodes = list(self.nodes())
        users = _count_users([*holders, *(node for node in nodes if node.is_pinned)])
        for node in nodes:
            _require(users.pop(node, 0) == node.num_users, "a node's users are miscounted")
            _check_node(node, self.block_size)
        _require(not users, "a node outside the trees is held")
        blocks = [block for node in nodes for block in node.blocks]
        idle = [block for block in blocks if not block.node.num_users]
        leaves = [node for node in nodes if node.parent is not None and not node.children]
        counts = len(blocks), len(idle), len(leaves)
        counted = self.num_blocks, self.num_idle_blocks, self.num_prefixes
        _require(counts == counted, f"there are {counts} blocks, idle ones, leaves; not {counted}")
        by_id = {block.block_id: block for block in blocks}
        _require(len(by_id) == len(blocks), "a block is cached twice")
        _require(by_id == self.blocks, "a block is not found by its id")


def root_of(node: Node) -> Root:
    """Returns the root of a node's tree."""
    *_, root = node.path()
    assert isinstance(root, Root)
    return root


def blocks_below(node: Node) -> list[TreeBlock]:
    """Returns the blocks of a node and of all nodes below, each after the blocks that follow it."""
    return [block for below in node.subtree() for block in reversed(below.blocks)]


def _count_users(holders: Iterable[Node]) -> dict[Node, int]:
    users: dict[Node, int] = {}
    for holder in holders:
        for node in holder.path():
            users[node] = users.get(node, 0) + 1
    return users


def _check_node(node: Node, block_size: int) -> None:
    ends = [(block.logical_index + 1) * block_size for block in node.blocks]
    first = node.begin // block_size + 1
    expected = list(range(first * block_size, node.end + 1, block_size))
    if not node.children and node.parent is not None:
        _require(bool(ends) and ends[-1] == node.end, "a leaf does not end with a block")
    _require(ends == expected, "a run does not have the blocks that end in it")
    _require(all(block.node is node for block in node.blocks), "a block is not where it says")
    for first_token, child in node.children.items():
        _require(child.packed[:TOKEN_BYTES] == first_token, "a child has the wrong key")
        _require(child.parent is node and child.begin == node.end, "a child is not in its place")
        _require(child.expires_at <= node.expires_at, "a node expires before what follows it")


def _require(truth: bool, broken: str) -> None:
    if not truth:
        raise AssertionError(f"The prefix cache is corrupt: {broken}. Please report this as a bug.")
