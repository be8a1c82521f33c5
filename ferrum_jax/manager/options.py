"""Options of a manager that the contract's configuration does not have."""

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
    """How a manager works, beyond `CacheConfig`.

    Attributes:
      scrub_freed_blocks: Whether freed blocks are zeroed, so that neither a later request nor a
        dump of memory can read what an earlier request left.
      block_policy: Which cached block is evicted first: the name of a block policy, or a function
        that makes one for a number of blocks.
      preemption_policy: Chooses the requests to swap out when a more urgent request finds no room;
        None for no preemption.
      tiers: Where the bytes of requests go that are swapped out.
      token_formats: Formats that requests are going to be compressed to: steps are compiled for
        them at once, and not again when the first request is compressed.
      mesh: Devices of this process that hold the pool together, each some heads of every block, as
        `sharding.init_sharded` lays it out. The first of `CacheConfig.target_devices` is one of
        them, and names the pool. None for a pool on that device alone.
      axis_name: The axis of the mesh over which the heads are divided.
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
        """Checks types that would be noticed only later."""
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
