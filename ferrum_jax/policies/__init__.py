"""Eviction policies: which cached block to evict, and which request to preempt."""

from ferrum_jax.policies.blocks import (
    BlockEvictionPolicy,
    BlockPolicyFactory,
    CachedBlock,
    Retention,
    block_policy_names,
    make_block_policy,
    register_block_policy,
)
from ferrum_jax.policies.requests import LruEvictionPolicy

__all__ = [
    "BlockEvictionPolicy",
    "BlockPolicyFactory",
    "CachedBlock",
    "LruEvictionPolicy",
    "Retention",
    "block_policy_names",
    "make_block_policy",
    "register_block_policy",
]
