"""Block policies: which block of the prefix cache to evict when the pool is full."""

from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock, Retention
from ferrum_jax.policies.blocks.registry import (
    BlockPolicyFactory,
    block_policy_names,
    make_block_policy,
    register_block_policy,
)

__all__ = [
    "BlockEvictionPolicy",
    "BlockPolicyFactory",
    "CachedBlock",
    "Retention",
    "block_policy_names",
    "make_block_policy",
    "register_block_policy",
]
