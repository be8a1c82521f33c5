"""Records of the contract: block tables, requests and statistics. All are frozen.

Names and fields are those of the Rust crate ferrum-interfaces 0.6, module kv_cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

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
    """The blocks of one sequence, as an immutable value on the host.

    Attributes:
      physical_blocks: Ids of the blocks, in the order of the sequence.
      sequence_length: Length of the sequence in tokens, dropped tokens included.
      block_size: Tokens per block.
      num_pruned: Tokens that were dropped: the blocks hold `sequence_length - num_pruned`.

    Raises:
      ValueError: A block is repeated or not a block id, or the tokens do not fit in the blocks.

    Example:
      >>> table = BlockTable.new(block_size=4).add_blocks([7, 2]).extend_sequence(5)
      >>> table.logical_to_physical(1), table.free_tokens()
      (2, 3)
    """

    physical_blocks: tuple[BlockId, ...] = ()
    sequence_length: int = 0
    block_size: int
    num_pruned: int = 0

    def __post_init__(self) -> None:
        """Checks that the blocks are distinct and have room for the tokens."""
        given = check_items("physical_blocks", self.physical_blocks)
        blocks = tuple(check_count("physical_blocks", block, minimum=0) for block in given)
        object.__setattr__(self, "physical_blocks", blocks)
        settle_count(self, "block_size")
        settle_count(self, "sequence_length", minimum=0)
        settle_count(self, "num_pruned", minimum=0, limit=self.sequence_length + 1)
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"physical_blocks must not repeat a block, got {blocks}.")
        room = len(blocks) * self.block_size
        if self.sequence_length - self.num_pruned > room:
            raise ValueError(
                f"sequence_length ({self.sequence_length}) less num_pruned ({self.num_pruned}) "
                f"must not exceed the {room} tokens that {len(blocks)} blocks of "
                f"{self.block_size} hold."
            )

    @classmethod
    def new(cls, block_size: int) -> BlockTable:
        """Returns an empty table for blocks of `block_size` tokens."""
        return cls(block_size=block_size)

    @staticmethod
    def blocks_needed_for_length(length: int, block_size: int) -> int:
        """Returns the number of blocks for a number of tokens.

        Args:
          length: Number of tokens.
          block_size: Tokens per block.

        Raises:
          ValueError: `length` is not an integer of at least 0, or `block_size` of at least 1.
        """
        length = check_count("length", length, minimum=0)
        return ceil_div(length, check_count("block_size", block_size))

    def num_blocks(self) -> int:
        """Returns the number of blocks."""
        return len(self.physical_blocks)

    def has_free_space(self) -> bool:
        """Returns whether the blocks have room for one more token."""
        return self.free_tokens() > 0

    def free_tokens(self) -> int:
        """Returns the number of tokens for which the blocks have room."""
        held_len = self.sequence_length - self.num_pruned
        return self.num_blocks() * self.block_size - held_len

    def logical_to_physical(self, logical_index: int) -> BlockId:
        """Returns the id of a block of the sequence.

        Args:
          logical_index: Index of the block in the sequence, from 0.

        Returns:
          The block's id in the pool.

        Raises:
          IndexError: The table has no such block.
          ValueError: `logical_index` is not an integer.
        """
        check_integer("logical_index", logical_index)
        if not 0 <= logical_index < self.num_blocks():
            raise IndexError(
                f"There is no block at logical index {logical_index}; the table holds "
                f"{self.num_blocks()} blocks, counted from 0."
            )
        return self.physical_blocks[logical_index]

    def add_blocks(self, blocks: Iterable[BlockId]) -> BlockTable:
        """Returns a table with more blocks at its end.

        Args:
          blocks: Ids of blocks that the table does not hold.

        Returns:
          The new table; this one is not changed.

        Raises:
          ValueError: The table holds a block already, or a block is not a block id.
        """
        more = check_items("blocks", blocks)
        return dataclasses.replace(self, physical_blocks=(*self.physical_blocks, *more))

    def extend_sequence(self, additional_tokens: int) -> BlockTable:
        """Returns a table with more tokens in the same blocks.

        Args:
          additional_tokens: Number of tokens to add, at least 0.

        Returns:
          The new table; this one is not changed.

        Raises:
          OutOfBlocksError: The blocks have too little room.
          ValueError: `additional_tokens` is not an integer of at least 0.
        """
        additional_tokens = check_count("additional_tokens", additional_tokens, minimum=0)
        if additional_tokens > self.free_tokens():
            needed = self.blocks_needed_for_length(
                self.sequence_length - self.num_pruned + additional_tokens, self.block_size
            )
            raise OutOfBlocksError(
                f"{additional_tokens} more tokens need {needed} blocks; the table holds "
                f"{self.num_blocks()}. Add blocks first."
            )
        return dataclasses.replace(self, sequence_length=self.sequence_length + additional_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheHandleStats:
    """Statistics of one request's cache.

    Attributes:
      memory_bytes: Bytes of the request's blocks, of all layer groups.
      blocks_allocated: Number of blocks, of all layer groups.
      tokens_stored: Number of tokens that the blocks hold, in the first group that keeps all
        tokens; if none does, in the first group.
      utilization: Tokens held over tokens for which the blocks of that group have room, in [0, 1].
      last_access: Time of the last use, in seconds of `time.monotonic()`.
    """

    memory_bytes: int
    blocks_allocated: int
    tokens_stored: int
    utilization: float
    last_access: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheManagerStats:
    """Statistics of a manager: its present contents, and counts since it was made.

    Attributes:
      total_memory_bytes: Bytes of the pool.
      used_memory_bytes: Bytes of the blocks in use.
      active_caches: Number of live requests.
      total_blocks: Number of blocks in all pools.
      free_blocks: Number of these that are free.
      cache_hit_rate: Share of prompt tokens that were found in the prefix cache, and were not
        computed, of all prompts that were looked up; in [0, 1].
      eviction_count: Number of cached blocks evicted to make room.
      allocation_count: Number of allocations that succeeded.
      allocation_failures: Number of allocations that failed.
      growth_count: Number of times the pool was copied into a larger one.
      cached_blocks: Number of blocks in the prefix cache; they count as in use.
      evictable_blocks: Number of cached blocks that no request uses, which can be evicted.
      expiration_count: Number of cached blocks that expired.
      preemption_count: Number of requests that were swapped out for a more urgent one.
      host_bytes: Bytes of the requests that are swapped out, in host memory and on disk.
      group_blocks: Blocks of the requests on the device, by the name of the layer group; a block
        that several requests share is counted for each.
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
    group_blocks: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheGcStats:
    """Result of one garbage collection.

    Attributes:
      memory_freed: Bytes freed.
      caches_freed: Number of caches freed.
      gc_time_ms: Duration in milliseconds.
    """

    memory_freed: int
    caches_freed: int
    gc_time_ms: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionStats:
    """Statistics of the compressed caches on the device; swapped-out ones are not counted.

    Attributes:
      compressed_caches: Number of compressed caches.
      memory_saved_bytes: Bytes that compression has freed.
      avg_compression_ratio: Mean ratio of a compressed cache's bytes to its uncompressed bytes.
      avg_compression_time_ms: Mean duration of one compression, in milliseconds.
    """

    compressed_caches: int
    memory_saved_bytes: int
    avg_compression_ratio: float
    avg_compression_time_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """Result of compressing one cache, at that time: later tokens are not included.

    Attributes:
      token_format: Format in which the cache's tokens are stored.
      num_tokens: Number of tokens of the sequence.
      num_kept_tokens: Number of tokens kept, per layer and head.
      ratio: Bytes of the compressed cache over its uncompressed bytes.
      freed_bytes: Bytes of blocks that became free or evictable, over all compressions of this
        cache. Below 0 if it took new blocks in place of blocks that others still use.
      seconds: Duration of the last compression.
      attention_error: Relative L2 error of attention outputs caused by the last compression, on
        the given queries or on sampled ones; mean over layers.
      pruning_error: The same error, caused by dropping tokens alone.
      fitting_error: The same error, caused by dropping tokens and fitting the kept ones.
      groups: Names of the layer groups that were compressed: those without a sliding window. The
        other fields, except `freed_bytes`, are about these.
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
    groups: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocationRequest:
    """A request for the cache of a new sequence.

    Attributes:
      request_id: The caller's key: hashable, and equal to itself.
      initial_tokens: Number of tokens to make room for at first; at most `max_sequence_length`. For
        a longer prompt, the number behind those that are cached.
      max_sequence_length: Maximum number of tokens of the sequence.
      num_layers: Number of cached layers.
      num_heads: Number of key/value heads.
      head_dim: Numbers per head.
      device: Wanted device of the cache.
      dtype: Dtype of the cache; anything that `DataType.of` accepts.
      priority: Priority of the request.
      prompt_token_ids: First tokens of the sequence; those that are in the prefix cache need not be
        computed. None to share no prefix.
      cache_salt: Tenant key; only requests with an equal salt share prefixes.

    Raises:
      SequenceTooLongError: `initial_tokens` or the prompt exceeds `max_sequence_length`.
      ValueError: Another field has a wrong type or value.
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
        num_tokens = max(self.initial_tokens, len(self.prompt_token_ids or ()))
        if num_tokens > self.max_sequence_length:
            raise SequenceTooLongError(
                f"Request {self.request_id!r} begins with {num_tokens} tokens, and its "
                f"max_sequence_length is {self.max_sequence_length}. Shorten its prompt, or raise "
                "max_sequence_length."
            )
        check_type("device", self.device, Device)
        check_type("priority", self.priority, Priority)

    def _checked_prompt(self) -> TokenIds | None:
        if self.cache_salt is not None:
            check_type("cache_salt", self.cache_salt, str)
        if self.prompt_token_ids is None:
            return None
        return TokenIds(self.prompt_token_ids)

    def estimated_memory_bytes(self) -> int:
        """Returns the bytes of keys and values of `max_sequence_length` tokens."""
        numbers = self.num_layers * self.num_heads * self.max_sequence_length * self.head_dim
        return 2 * numbers * self.dtype.size_bytes()
