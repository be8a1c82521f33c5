"""Scenarios: how a manager of several devices is made for a random program."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from ferrum_jax import KeyValue, LayerGroup, PrefixCacheConfig
from ferrum_jax.types import TokenFormat
from tests.support.managers import PREFIXES
from tests.support.multi_device import CPU

DEVICES, MAX_BLOCKS, MAX_ROWS, NUM_IDS = CPU[:3], 8, 4, 11
NUM_LAYERS, HEAD_DIM, TTL_SECONDS = 2, 8, 20.0
LENGTHS = (7, 4, 9, 1, 3, 12, 2)
KEEP_ALL = dataclasses.replace(PREFIXES, prefix_ttl_seconds=TTL_SECONDS)
KEEP_FEW = dataclasses.replace(KEEP_ALL, max_prefixes=2, min_prefix_length=5)
SALTED_ONLY = dataclasses.replace(KEEP_ALL, enable_cross_request_sharing=False)


class Draw(Protocol):
    """Makes random choices."""

    def one_of(self, options: Sequence[Any]) -> Any:
        """Returns one of some options."""
        ...

    def number(self, low: int, high: int) -> int:
        """Returns a number from `low` to `high`, both included."""
        ...


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How a manager is made.

    Attributes:
      config: The first configuration of prefix caching; None for none.
      configs: Configurations that replace it later.
      grows: Whether pools begin small, and shrink when they are emptier.
      request_policy: Preemption policy, "lru" or "bad"; None for none.
      block_policy: Eviction policy of cached blocks, "lru" or "bad".
      max_host_blocks: Blocks that host memory takes.
      has_disk: Whether there is a disk tier.
      dtype: Dtype of keys and values.
      compresses: Whether requests are compressed.
      max_blocks: Blocks of a device's pool.
      window: Sliding window of layer 1, which is in a layer group of its own then; None for a
        single group.
      token_formats: Formats that steps are compiled for from the first.
    """

    config: PrefixCacheConfig | None = KEEP_ALL
    configs: Sequence[PrefixCacheConfig | None] = (KEEP_ALL,)
    grows: bool = False
    request_policy: str | None = None
    block_policy: str = "lru"
    max_host_blocks: int = MAX_BLOCKS
    has_disk: bool = False
    dtype: str = "float32"
    compresses: bool = False
    token_formats: Sequence[TokenFormat] = ()
    max_blocks: int = MAX_BLOCKS
    window: int | None = None

    @property
    def num_groups(self) -> int:
        """Layer groups, which share one pool."""
        return 1 if self.window is None else 2

    @property
    def geometry(self) -> dict[str, Any]:
        """Fields of `CacheGeometry`."""
        sizes = {"max_seqs": MAX_ROWS, "dtype": self.dtype, "head_dim": HEAD_DIM}
        if self.window is None:
            return sizes
        payload = KeyValue(1, HEAD_DIM, self.dtype)
        groups = LayerGroup("full", [0], payload), LayerGroup("local", [1], payload, self.window)
        return {**sizes, "groups": groups}


SCENARIOS = {
    # Formats are enabled when first used; each program is compiled for each set of formats.
    "plain": Scenario(config=None, compresses=True),
    "prefixes": Scenario(grows=True, request_policy="lru", max_host_blocks=999),
    "disk": Scenario(
        max_host_blocks=4, has_disk=True, compresses=True, token_formats=tuple(TokenFormat)
    ),
    "disk alone": Scenario(max_host_blocks=0, has_disk=True, dtype="bfloat16"),
    "bad policies": Scenario(
        config=KEEP_FEW,
        configs=(KEEP_FEW, KEEP_ALL, SALTED_ONLY),
        grows=True,
        request_policy="bad",
        block_policy="bad",
        max_host_blocks=999,
    ),
    # Blocks of 3: a window of 5 is passed at other lengths than those at which a block is full.
    "windows": Scenario(
        config=None,
        configs=(None,),
        grows=True,
        request_policy="lru",
        max_host_blocks=6,
        has_disk=True,
        compresses=True,
        token_formats=tuple(TokenFormat),
        max_blocks=12,
        window=5,
    ),
}
