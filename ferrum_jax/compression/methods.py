"""Compression methods, and the plan by which a method reaches a number of blocks."""

import dataclasses
import math

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import check_count, check_number, check_type
from ferrum_jax.codecs import CODECS
from ferrum_jax.compression.scores import needs_queries
from ferrum_jax.types import TokenFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionMethod:
    """How a cache may be compressed.

    Attributes:
      token_format: Format of the compressed tokens. If absent, the format of most bits that reaches
        the ratio, of `Native`, `Int8` and `Int8Int4`; if none does, tokens are also dropped, which
        costs less than to round keys to 4 bits. `Int4` is chosen only if no token may be dropped.
      scorer: Name of the scorer (`compression.scores`) by which tokens are dropped if the format
        alone does not reach the ratio; None if no token may be dropped. Of the scorers without
        queries, "window" costs the least perplexity, and drops the middle of the sequence;
        `docs/benchmarks.md` has the figures.
      num_sinks: First tokens that are never dropped: they get much attention whatever they are.
      num_recent: Last tokens that are never dropped.
      fit_steps: If tokens are dropped, optimisation steps that fit the kept tokens, so that
        attention to them is as it was to all tokens. Needs reference queries.
      learning_rate: Learning rate of these steps, in units of the root mean square of keys and
        values.
      scale: Factor of the logits in the model's attention; `head_dim ** -0.5` if absent.

    Example:
      >>> CompressionMethod(token_format=TokenFormat.Native, scorer="window").num_sinks
      4
    """

    token_format: TokenFormat | None = None
    scorer: str | None = "window"
    num_sinks: int = 4
    num_recent: int = 32
    fit_steps: int = 0
    learning_rate: float = 0.02
    scale: float | None = None

    def __post_init__(self) -> None:
        """Checks each field."""
        if self.token_format is not None:
            check_type("token_format", self.token_format, TokenFormat)
        check_count("num_sinks", self.num_sinks, minimum=0)
        check_count("num_recent", self.num_recent, minimum=0)
        check_count("fit_steps", self.fit_steps, minimum=0)
        if not 0 < check_number("learning_rate", self.learning_rate) < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}.")
        if self.scale is not None and not 0 < check_number("scale", self.scale) < math.inf:
            raise ValueError(f"scale must be above 0 and finite, got {self.scale}.")
        if self.scorer is not None:
            check_type("scorer", self.scorer, str)
            needs_queries(self.scorer)  # Refuses an unknown name.

    @property
    def needs_queries(self) -> bool:
        """Whether dropping tokens needs reference queries."""
        return self.scorer is not None and (self.fit_steps > 0 or needs_queries(self.scorer))


@dataclasses.dataclass(frozen=True)
class CompressionPlan:
    """Format and size of a compressed cache.

    Attributes:
      token_format: Format of the tokens.
      num_kept: Tokens that are kept, in each layer and head.
      num_blocks: Blocks that they need.
    """

    token_format: TokenFormat
    num_kept: int
    num_blocks: int


def plan_compression(
    method: CompressionMethod,
    num_tokens: int,
    token_format: TokenFormat,
    block_sizes: dict[TokenFormat, int],
    max_blocks: int,
) -> CompressionPlan | None:
    """Plans how a cache fits in `max_blocks`, with the least loss that the method allows.

    Args:
      method: How the cache may be compressed.
      num_tokens: Tokens that the cache's blocks hold, at least 1.
      token_format: Format of these tokens.
      block_sizes: Tokens per block of each available format.
      max_blocks: Most blocks that the compressed cache may need.

    Returns:
      The plan; None if the method cannot reach that size.

    Example:
      >>> sizes = {TokenFormat.Native: 16, TokenFormat.Int8: 31, TokenFormat.Int4: 60}
      >>> plan = plan_compression(CompressionMethod(), 160, TokenFormat.Native, sizes, 4)
      >>> plan.token_format.name, plan.num_kept, plan.num_blocks
      ('Int8', 124, 4)
    """
    formats = _formats_for(method, token_format, block_sizes)
    for candidate in formats:
        num_blocks = ceil_div(num_tokens, block_sizes[candidate])
        if num_blocks <= max_blocks:
            return CompressionPlan(candidate, num_tokens, num_blocks)
    if method.scorer is None:
        return None
    size = block_sizes[formats[-1]]
    num_kept = min(num_tokens, max_blocks * size)
    if num_kept < _least_kept(method, num_tokens):
        return None
    return CompressionPlan(formats[-1], num_kept, ceil_div(num_kept, size))


def smallest_num_blocks(
    method: CompressionMethod,
    num_tokens: int,
    token_format: TokenFormat,
    block_sizes: dict[TokenFormat, int],
) -> int:
    """Returns the fewest blocks that a method reaches; see `plan_compression`."""
    size = block_sizes[_formats_for(method, token_format, block_sizes)[-1]]
    num_kept = num_tokens if method.scorer is None else _least_kept(method, num_tokens)
    return ceil_div(num_kept, size)


def _formats_for(
    method: CompressionMethod, token_format: TokenFormat, block_sizes: dict[TokenFormat, int]
) -> list[TokenFormat]:
    """Returns the formats that a method may use, the one of most bits first."""
    if method.token_format is not None:
        return [method.token_format]
    formats = [f for f in sorted(block_sizes) if f >= token_format]
    if method.scorer is None:
        return formats
    return [f for f in formats if not CODECS[f].is_coarse] or formats


def _least_kept(method: CompressionMethod, num_tokens: int) -> int:
    """Returns the least number of tokens that are kept."""
    return min(num_tokens, max(1, method.num_sinks + method.num_recent))
