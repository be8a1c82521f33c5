"""Block policies by name, and the registration of further ones."""

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
"""Function from the pool's maximum number of blocks to a policy, such as the policy's class."""

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
    """Registers a block policy under a name, for `ManagerOptions` and the replay command.

    Args:
      name: Name of the policy.
      factory: Function from the pool's maximum number of blocks to a policy.

    Raises:
      ValueError: The name is registered already.
    """
    if name in _FACTORIES:
        raise ValueError(f"Block policy {name!r} is registered already. Choose another name.")
    _FACTORIES[name] = factory


def block_policy_names() -> list[str]:
    """Returns the names of all registered policies, in the order of their registration."""
    return list(_FACTORIES)


def make_block_policy(policy: str | BlockPolicyFactory, capacity: int) -> BlockEvictionPolicy:
    """Makes a policy.

    Args:
      policy: Registered name, or a factory.
      capacity: Maximum number of blocks in the pool.

    Returns:
      A new, empty policy.

    Raises:
      ValueError: No policy has that name, or `capacity` is not a positive integer.
    """
    if not isinstance(policy, str):
        return policy(capacity)
    if policy not in _FACTORIES:
        raise ValueError(
            f"Block policy {policy!r} is not registered. Use one of {', '.join(_FACTORIES)}, or "
            "register it with `register_block_policy`."
        )
    return _FACTORIES[policy](capacity)
