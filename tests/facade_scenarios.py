"""How a manager of several devices is made for a random life, and who decides what happens."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from ferrum_jax import PrefixCacheConfig
from ferrum_jax.types import TokenFormat
from tests.multi_device import CPU

DEVICES, MAX_BLOCKS, MAX_ROWS, NUM_IDS = CPU[:3], 6, 3, 9
NUM_LAYERS, HEAD_DIM, TTL_SECONDS = 2, 8, 20.0
LENGTHS = (7, 4, 9, 1, 3, 12, 2)
PREFIXES = PrefixCacheConfig(
    max_prefixes=99,
    min_prefix_length=1,
    prefix_ttl_seconds=TTL_SECONDS,
    enable_cross_request_sharing=True,
)


class Draw(Protocol):
    """Who decides."""

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
      caches_prefixes: Whether prompts are cached from the beginning, and not from some time on.
      grows: Whether pools begin small, and shrink when there is less in them.
      preempts: Whether less urgent requests are swapped out for others.
      max_host_blocks: Room in host memory.
      has_disk: Whether there is a disk tier.
      dtype: Of keys and values.
      compresses: Whether requests are compressed.
      token_formats: Formats that steps are compiled for at once.
    """

    caches_prefixes: bool = True
    grows: bool = False
    preempts: bool = False
    max_host_blocks: int = MAX_BLOCKS
    has_disk: bool = False
    dtype: str = "float32"
    compresses: bool = False
    token_formats: Sequence[TokenFormat] = ()


SCENARIOS = {
    # Formats are enabled as they come, and every program is compiled for each set of them.
    "plain": Scenario(caches_prefixes=False, compresses=True),
    "prefixes": Scenario(grows=True, preempts=True, max_host_blocks=999),
    "disk": Scenario(
        max_host_blocks=4, has_disk=True, compresses=True, token_formats=tuple(TokenFormat)
    ),
    "disk alone": Scenario(max_host_blocks=0, has_disk=True, dtype="bfloat16"),
}
