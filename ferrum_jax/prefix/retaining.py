"""Times to live and pins of cached prefixes, along a path of the tree."""

from __future__ import annotations

import math

from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.forest import Forest
from ferrum_jax.prefix.tree import Node


def retain(last: Node, now: float) -> None:
    """Restarts the time to live of the path to `last` at `now` seconds."""
    expires_at = -math.inf
    for node in last.path():
        expires_at = max(expires_at, now + node.ttl_seconds)
        node.expires_at = max(node.expires_at, expires_at)
        node.count_as_last()


def set_retention(forest: Forest, last: Node, retention: Retention) -> None:
    """Applies a retention to all blocks of the path to `last`; pins or unpins it."""
    ttl_seconds = retention.ttl_seconds or forest.ttl_seconds
    for node in last.path():
        if node.parent is None:
            continue  # A root has no blocks.
        for block in node.blocks:
            block.retention = retention
        if ttl_seconds < node.ttl_seconds and len(node.children) <= 1:
            # A node that other prefixes continue is kept as long as before for them.
            below = (child.expires_at for child in node.children.values())
            node.expires_at = max(below, default=-math.inf)
            forest.schedule(node, -math.inf)
        node.ttl_seconds = ttl_seconds
        if not retention.is_pinned:
            unpin(forest, node)
    if retention.is_pinned and not last.is_pinned and last.parent is not None:
        last.is_pinned = True
        forest.hold(last, forest.first_window_at(last))


def unpin(forest: Forest, node: Node) -> None:
    """Removes the pin of a node, if it has one."""
    if node.is_pinned:
        node.is_pinned = False
        forest.release(node, forest.first_window_at(node))
