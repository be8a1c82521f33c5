"""A cache for the prompts of a run: how large it is, and its manager."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from examples.models.shape import ModelConfig
from ferrum_jax import (
    CacheConfig,
    CacheGeometry,
    Device,
    LayerGroup,
    PagedKvCacheManager,
    PrefixCacheConfig,
)
from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.layers import most_window_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Size of a cache, and whether it caches prefixes.

    Attributes:
      dtype: Dtype of keys and values.
      block_size: Tokens per block.
      num_blocks: Blocks of the pool; enough for the longest prompts at once if absent.
      num_rows: Most prompts decoded at once.
      caches_prefixes: Whether prompts share the blocks of equal first tokens.
    """

    dtype: str = "float32"
    block_size: int = 16
    num_blocks: int | None = None
    num_rows: int = 32
    caches_prefixes: bool = True


def make_cache(
    config: ModelConfig,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    options: CacheOptions,
) -> PagedKvCacheManager:
    """Makes a cache that holds the longest prompts, and their new tokens, at once.

    Args:
      config: Shape of the model.
      prompts: Token ids of each prompt.
      max_new_tokens: Most new tokens of each.
      options: Size of the cache.

    Returns:
      The manager of the cache.

    Raises:
      ValueError: A prompt is longer than the model, or than the pool, can hold; or the pool does
        not fit in memory.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > config.max_sequence_length:
        raise ValueError(
            f"The longest prompt and {max_new_tokens} new tokens are {longest} tokens; the "
            f"model holds {config.max_sequence_length}. Shorten it, or lower --max-new-tokens."
        )
    if options.block_size > config.max_sequence_length:
        raise ValueError(
            f"A block of {options.block_size} tokens is larger than the "
            f"{config.max_sequence_length} tokens that the model holds. Lower --block-size."
        )
    geometry = CacheGeometry.of(
        config, max_seqs=options.num_rows, max_sequence_length=longest, dtype=options.dtype
    )
    groups = [place.group for place in geometry.layer_map.places]
    needed = [
        sum(_num_blocks(group, len(ids), max_new_tokens, options) for group in groups)
        for ids in prompts
    ]
    num_blocks = options.num_blocks or sum(sorted(needed)[-options.num_rows :])
    if max(needed) > num_blocks:
        raise ValueError(
            f"One prompt with its new tokens needs {max(needed)} blocks, there are {num_blocks}. "
            "Raise --num-blocks."
        )
    return _manager(geometry, num_blocks, options)


def _num_blocks(
    group: LayerGroup, prompt_tokens: int, max_new_tokens: int, options: CacheOptions
) -> int:
    """Returns the most blocks that a layer group takes for a prompt and its new tokens."""
    total = ceil_div(prompt_tokens + max_new_tokens, options.block_size)
    if group.sliding_window is None:
        return total
    # At most all of the prompt while it is read; later the window, a token at a time.
    window = most_window_blocks(group.sliding_window, 1, options.block_size)
    return max(ceil_div(prompt_tokens, options.block_size), min(total, window))


def _manager(
    geometry: CacheGeometry, num_blocks: int, options: CacheOptions
) -> PagedKvCacheManager:
    kept = PrefixCacheConfig(
        max_prefixes=num_blocks,
        min_prefix_length=options.block_size,
        prefix_ttl_seconds=math.inf,
        enable_cross_request_sharing=True,
    )
    config = CacheConfig(
        block_size=options.block_size,
        max_blocks=num_blocks,
        initial_blocks=num_blocks,
        target_devices=(Device.of(jax.devices()[0]),),
        enable_prefix_caching=options.caches_prefixes,
        prefix_cache_config=kept,
    )
    try:
        return PagedKvCacheManager(config, geometry)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"A pool of {num_blocks} blocks of {options.block_size} tokens cannot be made "
            f"({error}). Lower --num-blocks, --batch-size or --block-size."
        ) from error
