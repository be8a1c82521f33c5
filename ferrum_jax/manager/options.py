"""How a manager works, beyond the contract's configuration."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection

from jax.sharding import Mesh

from ferrum_jax.checks import check_callable, check_flag, check_items, check_type
from ferrum_jax.config import TierConfig
from ferrum_jax.interfaces import CacheEvictionPolicy
from ferrum_jax.policies.blocks import BlockPolicyFactory
from ferrum_jax.types import TokenFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManagerOptions:
    """How a manager works, beyond the contract's configuration.

    Attributes:
      scrub_freed_blocks: Whether blocks that the manager frees are zeroed, so that no later
        request, nor a dump of memory, finds what an earlier one left.
      block_policy: Which cached block goes first: the name of a block policy, or what makes one
        for a pool of so many blocks.
      preemption_policy: Chooses who is swapped out when a more urgent request finds no room;
        None if nobody is.
      tiers: Where requests wait that are swapped out.
      token_formats: Formats that requests are going to be compressed to: steps are compiled for
        them at once, and not again when the first request is.
      mesh: Devices of this process that hold the pool together, each some heads of every block, as
        `sharding.init_sharded` has it; the first of `CacheConfig.target_devices` is one of them,
        and stands for all. None for a pool on that one alone.
      axis_name: The axis of the mesh over which the heads lie.
      clock: Returns seconds that only grow; for tests.
    """

    scrub_freed_blocks: bool = True
    block_policy: str | BlockPolicyFactory = "lru"
    preemption_policy: CacheEvictionPolicy | None = None
    tiers: TierConfig = TierConfig()
    token_formats: Collection[TokenFormat] = ()
    mesh: Mesh | None = None
    axis_name: str = "tp"
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        """Checks what would show only later."""
        check_flag("scrub_freed_blocks", self.scrub_freed_blocks)
        check_type("tiers", self.tiers, TierConfig)
        if self.preemption_policy is not None:
            check_type("preemption_policy", self.preemption_policy, CacheEvictionPolicy)
        if self.mesh is not None:
            check_type("mesh", self.mesh, Mesh)
        if not isinstance(self.block_policy, str):
            check_callable("block_policy", self.block_policy)
        for token_format in check_items("token_formats", self.token_formats):
            check_type("token_formats", token_format, TokenFormat)
        check_type("axis_name", self.axis_name, str)
        check_callable("clock", self.clock)
