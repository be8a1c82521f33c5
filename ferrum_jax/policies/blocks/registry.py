"""The block policies by name, and the place where users add their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ferrum_jax.policies.blocks.arc import ArcBlockPolicy
from ferrum_jax.policies.blocks.frequency import GdsfBlockPolicy, LfuBlockPolicy
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy
from ferrum_jax.policies.blocks.priority import PriorityBlockPolicy
from ferrum_jax.policies.blocks.recency import LruBlockPolicy, SegmentedLruBlockPolicy
from ferrum_jax.policies.blocks.return_rate import ReturnRateBlockPolicy
from ferrum_jax.policies.blocks.s3fifo import S3FifoBlockPolicy

BlockPolicyFactory: TypeAlias = Callable[[int], BlockEvictionPolicy]
"""Makes a policy for a pool of so many blocks."""

_FACTORIES: dict[str, BlockPolicyFactory] = {
    "lru": LruBlockPolicy,
    "slru": SegmentedLruBlockPolicy,
    "arc": ArcBlockPolicy,
    "s3fifo": S3FifoBlockPolicy,
    "lfu": LfuBlockPolicy,
    "gdsf": GdsfBlockPolicy,
    "priority": PriorityBlockPolicy,
    "return_rate": ReturnRateBlockPolicy,
}


def register_block_policy(name: str, factory: BlockPolicyFactory) -> None:
    """Makes a policy known by name.

    Args:
      name: What configurations call it.
      factory: Makes one for a pool of so many blocks, such as the policy's class.

    Raises:
      ValueError: If the name is taken.
    """
    if name in _FACTORIES:
        raise ValueError(f"There is a block policy {name!r} already. Choose another name.")
    _FACTORIES[name] = factory


def block_policy_names() -> list[str]:
    """Returns the names of all policies known, in the order in which they were registered."""
    return list(_FACTORIES)


def make_block_policy(policy: str | BlockPolicyFactory, capacity: int) -> BlockEvictionPolicy:
    """Makes a policy.

    Args:
      policy: A registered name, or a factory.
      capacity: Blocks that the pool may have.

    Raises:
      ValueError: If no policy has that name.
    """
    if not isinstance(policy, str):
        return policy(capacity)
    if policy not in _FACTORIES:
        known = ", ".join(_FACTORIES)
        raise ValueError(f"There is no block policy {policy!r}; known are {known}.")
    return _FACTORIES[policy](capacity)
