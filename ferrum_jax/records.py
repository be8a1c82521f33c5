"""The contract's values: block tables, requests, and statistics. All frozen.

Names and fields are those of the Rust crate ferrum-interfaces 0.6, module kv_cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import (
    check_count,
    check_integer,
    check_items,
    check_key,
    check_type,
    settle_count,
)
from ferrum_jax.errors import OutOfBlocksError, SequenceTooLongError
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId, DataType, Device, Priority, RequestId, TokenFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTable:
    """Which blocks hold one sequence: an immutable view for the host.

    Attributes:
      physical_blocks: Block ids, in the order of the tokens that they hold.
      sequence_length: Tokens held.
      block_size: Tokens of one block.

    Example:
      >>> table = BlockTable.new(block_size=4).add_blocks([7, 2]).extend_sequence(5)
      >>> table.logical_to_physical(1), table.free_tokens()
      (2, 3)
    """

    physical_blocks: tuple[BlockId, ...] = ()
    sequence_length: int = 0
    block_size: int

    def __post_init__(self) -> None:
        """Checks that the blocks are distinct and have room for the tokens."""
        given = check_items("physical_blocks", self.physical_blocks)
        blocks = tuple(check_count("physical_blocks", block, minimum=0) for block in given)
        object.__setattr__(self, "physical_blocks", blocks)
        settle_count(self, "block_size")
        settle_count(self, "sequence_length", minimum=0)
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"physical_blocks must not repeat a block, got {blocks}.")
        room = len(blocks) * self.block_size
        if self.sequence_length > room:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) must not exceed the {room} tokens "
                f"for which {len(blocks)} blocks of {self.block_size} have room."
            )

    @classmethod
    def new(cls, block_size: int) -> BlockTable:
        """Returns an empty table for blocks of `block_size` tokens."""
        return cls(block_size=block_size)

    @staticmethod
    def blocks_needed_for_length(length: int, block_size: int) -> int:
        """Returns how many blocks of `block_size` tokens hold `length` tokens."""
        length = check_count("length", length, minimum=0)
        return ceil_div(length, check_count("block_size", block_size))

    def num_blocks(self) -> int:
        """Returns how many blocks are held."""
        return len(self.physical_blocks)

    def has_free_space(self) -> bool:
        """Says whether one more token fits into the blocks held."""
        return self.free_tokens() > 0

    def free_tokens(self) -> int:
        """Returns how many more tokens fit into the blocks held."""
        return self.num_blocks() * self.block_size - self.sequence_length

    def logical_to_physical(self, logical_index: int) -> BlockId:
        """Finds the block at a place in the sequence.

        Args:
          logical_index: Which block of the sequence, from 0.

        Returns:
          Its id in the pool.

        Raises:
          IndexError: If the table holds no such block.
          ValueError: If `logical_index` is not an integer.
        """
        check_integer("logical_index", logical_index)
        if not 0 <= logical_index < self.num_blocks():
            raise IndexError(
                f"There is no block at logical index {logical_index}; the table holds "
                f"{self.num_blocks()} blocks, counted from 0."
            )
        return self.physical_blocks[logical_index]

    def add_blocks(self, blocks: Iterable[BlockId]) -> BlockTable:
        """Appends blocks.

        Args:
          blocks: Ids of blocks which the table does not hold yet.

        Returns:
          The longer table; this one stays as it is.

        Raises:
          ValueError: If a block is held already, or is no block id.
        """
        more = check_items("blocks", blocks)
        return dataclasses.replace(self, physical_blocks=(*self.physical_blocks, *more))

    def extend_sequence(self, additional_tokens: int) -> BlockTable:
        """Counts more tokens into the blocks held.

        Args:
          additional_tokens: How many more; at least 0.

        Returns:
          The fuller table; this one stays as it is.

        Raises:
          OutOfBlocksError: If the blocks held have too little room.
          ValueError: If `additional_tokens` is negative.
        """
        additional_tokens = check_count("additional_tokens", additional_tokens, minimum=0)
        if additional_tokens > self.free_tokens():
            needed = self.blocks_needed_for_length(
                self.sequence_length + additional_tokens, self.block_size
            )
            raise OutOfBlocksError(
                f"{additional_tokens} more tokens need {needed} blocks; the table holds "
                f"{self.num_blocks()}. Add blocks first."
            )
        return dataclasses.replace(self, sequence_length=self.sequence_length + additional_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheHandleStats:
    """What one request's cache costs.

    Attributes:
      memory_bytes: Bytes of its blocks.
      blocks_allocated: Blocks held.
      tokens_stored: Tokens held.
      utilization: Tokens held over tokens that the blocks have room for, in [0, 1].
      last_access: When it was used last, in seconds of `time.monotonic()`.
    """

    memory_bytes: int
    blocks_allocated: int
    tokens_stored: int
    utilization: float
    last_access: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheManagerStats:
    """What a manager holds, and what it has done since it was made.

    Attributes:
      total_memory_bytes: Bytes of the pool.
      used_memory_bytes: Bytes of the blocks in use.
      active_caches: Requests held.
      total_blocks: Blocks in the pool.
      free_blocks: Blocks free.
      cache_hit_rate: Prompt tokens that were found cached, and so need not be computed, over all
        tokens of the prompts that were looked up, in [0, 1].
      eviction_count: Cached blocks that went for want of room.
      allocation_count: Allocations that succeeded.
      allocation_failures: Allocations that failed.
      growth_count: How often the pool was copied into a larger one.
      cached_blocks: Blocks in use that the prefix cache keeps.
      evictable_blocks: Those of them that no request uses, so that they count as room.
      expiration_count: Cached blocks that went because nobody used them for too long.
      preemption_count: Requests that were swapped out for a more urgent one.
      host_bytes: Bytes of the requests that are swapped out.
    """

    total_memory_bytes: int
    used_memory_bytes: int
    active_caches: int
    total_blocks: int
    free_blocks: int
    cache_hit_rate: float
    eviction_count: int
    allocation_count: int
    allocation_failures: int
    growth_count: int = 0
    cached_blocks: int = 0
    evictable_blocks: int = 0
    expiration_count: int = 0
    preemption_count: int = 0
    host_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheGcStats:
    """What one garbage collection freed.

    Attributes:
      memory_freed: Bytes freed.
      caches_freed: Caches collected.
      gc_time_ms: How long it took, in milliseconds.
    """

    memory_freed: int
    caches_freed: int
    gc_time_ms: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionStats:
    """What compression has won, of the caches on the device; what is swapped out takes none of it.

    Attributes:
      compressed_caches: Caches that are compressed.
      memory_saved_bytes: Bytes that compressing them has freed.
      avg_compression_ratio: Mean of the bytes that they take now over those that they would take
        uncompressed.
      avg_compression_time_ms: Mean time of one compression, in milliseconds.
    """

    compressed_caches: int
    memory_saved_bytes: int
    avg_compression_ratio: float
    avg_compression_time_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """What compressing one cache has done, as it was then: tokens that came later are not in it.

    Attributes:
      token_format: How its tokens are written since.
      num_tokens: Tokens of its sequence.
      num_kept_tokens: Those of them that stayed, in each layer and head.
      ratio: Bytes that it then took, over those that it would have taken uncompressed.
      freed_bytes: Bytes of blocks that could be had afterwards and not before, over all its
        compressions: free ones, and cached ones that nobody uses any more. Below 0 if it took
        some in place of blocks that others hold too.
      seconds: How long the last compression took.
      attention_error: Relative L2 error of attention outputs that the last one has brought, on
        the queries given or on sampled ones; mean over layers.
      pruning_error: The same of dropping tokens alone.
      fitting_error: The same of dropping tokens and fitting those kept.
    """

    token_format: TokenFormat
    num_tokens: int
    num_kept_tokens: int
    ratio: float
    freed_bytes: int
    seconds: float
    attention_error: float
    pruning_error: float
    fitting_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationRequest:
    """What a new sequence asks for.

    Attributes:
      request_id: The caller's key: hashable, and equal to itself.
      initial_tokens: Tokens to have room for at once; at most `max_sequence_length`.
      max_sequence_length: Tokens that it may grow to.
      num_layers: Layers to cache.
      num_heads: Heads to cache: the key/value heads.
      head_dim: Numbers of one head.
      device: Where the cache should live.
      dtype: What a number is; anything that `DataType.of` reads.
      priority: How urgent it is.
      prompt_token_ids: The tokens that it begins with, at most `initial_tokens`: what is cached of
        them need not be computed. None if prefixes are not to be shared.
      cache_salt: Only requests of an equal salt share prefixes. A server sets it, one a tenant.

    Raises:
      SequenceTooLongError: If it begins with more tokens than it may grow to.
      ValueError: If a field is not what it should be.
    """

    request_id: RequestId
    initial_tokens: int
    max_sequence_length: int
    num_layers: int
    num_heads: int
    head_dim: int
    device: Device
    dtype: DataType
    priority: Priority = Priority.Normal
    prompt_token_ids: Sequence[int] | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        """Checks each field."""
        check_key("request_id", self.request_id)
        object.__setattr__(self, "dtype", DataType.of(self.dtype))
        settle_count(self, "initial_tokens", minimum=0)
        object.__setattr__(self, "prompt_token_ids", self._checked_prompt())
        for name in ("max_sequence_length", "num_layers", "num_heads", "head_dim"):
            settle_count(self, name)
        if self.initial_tokens > self.max_sequence_length:
            raise SequenceTooLongError(
                f"Request {self.request_id!r} begins with {self.initial_tokens} tokens, and its "
                f"max_sequence_length is {self.max_sequence_length}. Shorten its prompt, or allow "
                "it more."
            )
        check_type("device", self.device, Device)
        check_type("priority", self.priority, Priority)

    def _checked_prompt(self) -> TokenIds | None:
        if self.cache_salt is not None:
            check_type("cache_salt", self.cache_salt, str)
        if self.prompt_token_ids is None:
            return None
        prompt = TokenIds(self.prompt_token_ids)
        if len(prompt) > self.initial_tokens:
            raise ValueError(
                f"prompt_token_ids ({len(prompt)} tokens) must not exceed initial_tokens "
                f"({self.initial_tokens})."
            )
        return prompt

    def estimated_memory_bytes(self) -> int:
        """Returns the bytes of keys and values at `max_sequence_length` tokens."""
        numbers = self.num_layers * self.num_heads * self.max_sequence_length * self.head_dim
        return 2 * numbers * self.dtype.size_bytes()
