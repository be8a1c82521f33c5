"""The radix trees of all salts and versions, with counts of their blocks and prefixes.

This module adds, splits, holds and removes nodes; `cache` decides which blocks to keep.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.groups import LayerGroups
from ferrum_jax.prefix.soundness import check_node, require_sound
from ferrum_jax.prefix.tree import (
    Match,
    Node,
    Root,
    TreeBlock,
    TreeKey,
    blocks_below,
    blocks_from,
    find,
    split,
)
from ferrum_jax.prefix.window_ids import WindowIds
from ferrum_jax.tokens import TOKEN_BYTES, TokenIds
from ferrum_jax.types import NULL_BLOCK, BlockId

Hold = tuple[Node, int]
"""Last node that a request or a pin holds, and its first block that is held in window groups."""


class Forest:
    """A radix tree of cached blocks for each salt and version of the weights.

    Args:
      groups: The layer groups of the blocks.

    Attributes:
      groups: As given.
      block_size: Tokens per block.
      ttl_seconds: Time to live of new nodes.
      blocks: All blocks in the trees, by each of their ids.
      window_ids: Users and order of the ids in window groups.
      num_unused: Number of blocks in nodes without users.
      num_prefixes: Number of leaves.
    """

    def __init__(self, groups: LayerGroups):
        self.groups, self.window_ids = groups, WindowIds(groups)
        self._has_windows = bool(groups.windowed)
        self.block_size, self.ttl_seconds = groups.block_size, math.inf
        self.blocks: dict[BlockId, TreeBlock] = {}
        self.num_unused = self.num_prefixes = 0
        self._roots: dict[TreeKey, Root] = {}
        self._version: Hashable = None
        self._outdated: list[Node] = []  # Those that may be evictable; each after those above it.
        self._shortened: set[Node] = set()
        self._deadlines: list[tuple[float, int, Node]] = []
        self._numbers, self._num_removed = itertools.count(), 0

    @property
    def num_idle_blocks(self) -> PerPool:
        """Number of ids that could be evicted: they have no users."""
        num_idle = self.groups.num_full.times(self.num_unused)
        return num_idle + self.window_ids.num_idle if self._has_windows else num_idle

    @property
    def version(self) -> Hashable:
        """The version of the weights; trees of other ones are outdated."""
        return self._version

    def set_version(self, version: Hashable) -> None:
        """Replaces the version of the weights; the caller unpins the nodes of outdated trees."""
        self._version = version
        outdated = [root for key, root in self._roots.items() if key.version != version]
        self._outdated = [node for root in outdated for node in list(root.subtree())[::-1]]

    def keys(self) -> list[TreeKey]:
        """Returns the salts and versions that have a tree."""
        return list(self._roots)

    def find(self, key: TreeKey, tokens: TokenIds, limit: int, now: float) -> Match:
        """Finds the longest cached prefix under a salt and a version; see `tree.find`."""
        root = self._roots.get(key) or Root(key)
        return find(root, tokens, limit, self.block_size, now)

    def subtree_of(self, key: TreeKey) -> list[TreeBlock]:
        """Returns all blocks under a salt and a version, each after the blocks that follow it."""
        root = self._roots.get(key)
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

    def hold(self, node: Node, first_window: int, until: Node | None = None) -> None:
        """Adds a user to nodes and window ids.

        Args:
          node: Last node to hold; all nodes of the path to it are held.
          first_window: Logical index of the first block of the path to hold in window groups.
          until: Node of the path that has this user already, and all nodes above it.
        """
        if self._has_windows:
            self.window_ids.hold(blocks_from(node, first_window))
        for held in node.path():
            if held is until:
                return
            if not held.num_users:
                self.num_unused -= len(held.blocks)
            held.num_users += 1
            if isinstance(held, Root):
                self._roots.setdefault(held.key, held)

    def release(self, node: Node, first_window: int, until: Node | None = None) -> None:
        """Removes a user that `hold` added; nodes from `until` up to the root keep it."""
        if self._has_windows:
            self.window_ids.release(blocks_from(node, first_window))
        unused: list[Node] = []
        for held in node.path():
            if held is until:
                return
            held.num_users -= 1
            if not held.num_users:
                self.num_unused += len(held.blocks)
                unused += [held] if held.blocks else []
            if isinstance(held, Root):
                if held.key.version != self._version:
                    self._outdated += reversed(unused)
                self._discard_if_empty(held)

    def first_window_at(self, node: Node) -> int:
        """Returns the logical index of the first block that the boundary after a node needs."""
        return self.groups.first_window(self.groups.num_released(node.end))

    def num_idle_without(self, holds: Iterable[Hold]) -> PerPool:
        """Returns how many more ids would be idle after some releases.

        Args:
          holds: `(node, first_window)` of each hold that would be released.
        """
        users, window_users = self._count_users(holds)
        unused = sum(len(node.blocks) for node, count in users.items() if count == node.num_users)
        num_idle = self.groups.num_full.times(unused)
        for block, count in window_users.items():
            if count == block.window_users:
                num_idle += self.groups.num_window_ids(block)
        return num_idle

    def _count_users(self, holds: Iterable[Hold]) -> tuple[dict[Node, int], dict[TreeBlock, int]]:
        """Returns the number of holds of each node, and of each block in window groups."""
        users, window_users = dict[Node, int](), dict[TreeBlock, int]()
        for last, first_window in holds:
            for node in last.path():
                users[node] = users.get(node, 0) + 1
            for block in blocks_from(last, first_window) if self._has_windows else ():
                window_users[block] = window_users.get(block, 0) + 1
        return users, window_users

    # Growing.

    def would_add_prefix(self, match: Match) -> bool:
        """Returns whether appending to a match adds a prefix, rather than lengthens one."""
        node = match.node
        return node.parent is None or bool(node.children) or match.num_tokens < node.end

    def append(
        self,
        match: Match,
        tokens: TokenIds,
        block_ids: Sequence[tuple[BlockId, ...]],
        holder: Node,
    ) -> list[TreeBlock]:
        """Adds blocks after a match.

        Args:
          match: Cached prefix of `tokens`.
          tokens: All tokens from the first one on, up to the end of the last new block.
          block_ids: Ids of each block to add in all groups; at least one block.
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
        if not node.num_users:
            self.num_unused += len(blocks)
        if self._has_windows:
            self.window_ids.add(blocks)
        return blocks

    def set_ids(self, block: TreeBlock, block_ids: Sequence[BlockId]) -> None:
        """Replaces the ids of a cached block."""
        for block_id in block.held_ids:
            del self.blocks[block_id]
        self.window_ids.replace(block, block_ids)
        self.blocks.update(dict.fromkeys(block.held_ids, block))

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
        self, node: Node, tokens: TokenIds, block_ids: Sequence[tuple[BlockId, ...]], first: int
    ) -> list[TreeBlock]:
        before = next((above.blocks[-1] for above in node.path() if above.blocks), None)
        key = hash(node.root.key.salt) if before is None else before.prefix_key
        blocks, retention, size = [], Retention(), self.block_size * TOKEN_BYTES
        lead, is_single = self.groups.lead, self.groups.is_single
        for i, ids in enumerate(block_ids, first):
            key = hash((key, tokens.packed[i * size : (i + 1) * size]))
            group_ids = () if is_single else ids
            block = TreeBlock(ids[lead], i, key, retention, node, group_ids)
            blocks.append(block)
            for block_id in ids:
                if block_id != NULL_BLOCK:
                    self.blocks[block_id] = block
        return blocks

    # Removing.

    def strip(self, block: TreeBlock) -> list[BlockId]:
        """Removes the window ids of a block, which have no users, and returns them."""
        kept = self.groups.without_windows(block)
        removed = [block_id for block_id in block.held_ids if block_id not in kept]
        self.set_ids(block, kept)
        return removed

    def remove(self, block: TreeBlock) -> list[BlockId]:
        """Removes an evictable block; call `shorten_leaves` after the last of several.

        Args:
          block: The block.

        Returns:
          The ids that it had.
        """
        node = block.node
        last = node.blocks.pop()
        assert last is block and not (node.num_users or node.children)
        removed = block.held_ids
        for block_id in removed:
            del self.blocks[block_id]
        self.num_unused -= 1
        if self._has_windows:
            self.window_ids.remove(block)
        self._shortened.add(node)
        while not (node.blocks or node.children) and node.parent is not None:
            parent, node.parent = node.parent, None
            del parent.children[node.packed[:TOKEN_BYTES]]
            self._num_removed += 1
            self._shortened.add(parent)
            if parent.children or parent.parent is None:
                self.num_prefixes -= 1
            node = parent
        if isinstance(node, Root):
            self._discard_if_empty(node)
        return removed

    def shorten_leaves(self) -> None:
        """Shortens leaves that have lost blocks, since a leaf ends with its last block."""
        if not self._shortened:
            return
        for node in self._shortened:
            if node.parent is not None and not node.children:
                end = (node.blocks[-1].logical_index + 1) * self.block_size
                node.packed = node.packed[: (end - node.begin) * TOKEN_BYTES]
        self._shortened.clear()
        if self._num_removed > len(self._deadlines) // 2:
            self._deadlines = [due for due in self._deadlines if due[2].parent is not None]
            heapq.heapify(self._deadlines)
            self._num_removed = 0

    def can_evict(self, block: TreeBlock) -> bool:
        """Returns whether a block is an evictable one of these trees."""
        if not block.can_evict:
            return False
        root = block.node.root
        return self._roots.get(root.key) is root

    def next_outdated(self) -> TreeBlock | None:
        """Returns an evictable block of an outdated tree, if any."""
        while self._outdated:
            node = self._outdated[-1]
            if node.num_users or not (node.blocks or node.children):
                self._outdated.pop()  # In use: its release adds it again. Or removed.
            elif node.children:
                self._outdated += node.children.values()
            else:
                return node.blocks[-1]
        return None

    def any_evictable(self) -> TreeBlock | None:
        """Returns an evictable block, if any."""
        ends = (node.blocks[-1] for node in self.nodes() if node.blocks)
        return next((block for block in ends if block.can_evict), None)

    def renumber(self, new_ids: Mapping[BlockId, BlockId]) -> None:
        """Updates the ids of blocks that have moved in the pool, by their old ids."""
        for block in dict.fromkeys(self.blocks.values()):
            ids = [new_ids.get(block_id, block_id) for block_id in block.block_ids]
            block.set_ids(ids, self.groups.lead)
        self.blocks = {new_ids.get(i, i): block for i, block in self.blocks.items()}

    def schedule(self, node: Node, at: float) -> None:
        """Makes `pop_expired` examine a node at a time, in seconds of the clock, or later."""
        if at < math.inf:
            heapq.heappush(self._deadlines, (at, next(self._numbers), node))

    def may_have_expired(self, now: float) -> bool:
        """Returns whether `pop_expired` has a node to examine."""
        return bool(self._deadlines) and self._deadlines[0][0] <= now

    def pop_expired(self, now: float) -> Iterator[Node]:
        """Yields expired nodes. Remove each with all nodes below before asking for the next."""
        while self.may_have_expired(now):
            node = heapq.heappop(self._deadlines)[2]
            if node.parent is None:
                continue  # Removed before.
            if node.is_expired(now):
                yield node
            else:
                # After its last release it is kept for at least its time to live.
                is_due = node.expires_at <= now
                self.schedule(node, now + node.ttl_seconds if is_due else node.expires_at)

    def _discard_if_empty(self, root: Root) -> None:
        """Discards a root without children and users."""
        if not root.children and not root.num_users:
            self._roots.pop(root.key, None)

    # Checking.

    def check(self, holds: Iterable[Hold]) -> None:
        """Raises AssertionError unless trees and counts agree.

        Args:
          holds: `(node, first_window)` of each hold, except for pins.
        """
        nodes = list(self.nodes())
        pins = [(node, self.first_window_at(node)) for node in nodes if node.is_pinned]
        users, window_users = self._count_users([*holds, *pins])
        for node in nodes:
            require_sound(users.pop(node, 0) == node.num_users, "a node's users are miscounted")
            check_node(node, self.block_size)
        require_sound(not users, "a node outside the trees is held")
        blocks = [block for node in nodes for block in node.blocks]
        unused = [block for block in blocks if not block.node.num_users]
        leaves = [node for node in nodes if node.parent is not None and not node.children]
        counts, counted = (len(unused), len(leaves)), (self.num_unused, self.num_prefixes)
        require_sound(counts == counted, f"{counts} blocks and leaves are unused, not {counted}")
        ids = [(block_id, block) for block in blocks for block_id in block.held_ids]
        require_sound(len(dict(ids)) == len(ids), "a block is cached twice")
        require_sound(dict(ids) == self.blocks, "a block is not found by its id")
        require_sound(self.window_ids.check(window_users, blocks), "window ids are miscounted")
        require_sound(all(map(self._has_full_ids, blocks)), "a full group lacks a block")

    def _has_full_ids(self, block: TreeBlock) -> bool:
        """Returns whether a block has an id in each full group, and `block_id` is the lead's."""
        pairs = zip(block.block_ids, self.groups.windows, strict=True)
        has_all = all(block_id != NULL_BLOCK for block_id, window in pairs if window is None)
        return has_all and block.block_id == block.block_ids[self.groups.lead]
