"""What is refused, and in which words: the checks before a manager changes anything."""

from collections.abc import Sequence

from ferrum_jax.errors import (
    CompressionError,
    DoubleFreeError,
    FerrumError,
    ForeignBlockError,
    GeometryMismatchError,
    OutOfBlocksError,
    OutOfRowsError,
    PrefixMismatchError,
    RequestTooLargeError,
    SequenceTooLongError,
)
from ferrum_jax.manager.handle import Entry
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId


def require_open(is_closed: bool) -> None:
    """Raises RuntimeError if a manager is closed."""
    if is_closed:
        raise RuntimeError(
            "The manager is closed: its requests have ended, and it takes no others. Make another."
        )


def refusal(
    request: AllocationRequest, pattern: AllocationRequest, cache: DevicePool
) -> FerrumError | None:
    """Returns why a cache can never take a request, or None.

    Args:
      request: What is asked.
      pattern: A request as the cache can take it.
      cache: Where it would go.
    """
    name, geometry = request.request_id, cache.geometry
    num_blocks = cache.counts.blocks_for(request.initial_tokens)
    if _geometry_of(request) != _geometry_of(pattern):
        return GeometryMismatchError(
            f"Request {name!r} asks for {_geometry_of(request)}; the pool has "
            f"{_geometry_of(pattern)}. Ask for that, or make a manager for this model."
        )
    if request.max_sequence_length > geometry.max_sequence_length:
        return SequenceTooLongError(
            f"Request {name!r} may grow to {request.max_sequence_length} tokens; a row holds "
            f"{geometry.max_sequence_length}. Ask for less, or raise the geometry's "
            "max_sequence_length."
        )
    if num_blocks > cache.counts.max_blocks:
        return _too_large(f"Request {name!r}", num_blocks, cache)
    return None


def shortage(
    request: AllocationRequest, num_blocks: int, num_obtainable: int, cache: DevicePool
) -> FerrumError:
    """Returns the error for a request that there is no room for just now."""
    if not cache.counts.num_free_rows:
        return OutOfRowsError(
            f"Request {request.request_id!r} needs a row; all {cache.geometry.max_seqs} are in "
            "use. Deallocate a request, or raise max_seqs."
        )
    return out_of_blocks(f"Request {request.request_id!r}", num_blocks, num_obtainable, cache)


def out_of_blocks(
    asked: str, num_blocks: int, num_obtainable: int, cache: DevicePool
) -> OutOfBlocksError:
    """Returns the error for want of blocks."""
    return OutOfBlocksError(
        f"{asked}: {num_blocks} blocks are needed, and {num_obtainable} of "
        f"{cache.counts.max_blocks} can be had on {cache.device}. Deallocate a request, or raise "
        "max_blocks."
    )


def require_ever(asked: str, num_blocks: int, cache: DevicePool) -> None:
    """Raises RequestTooLargeError if so many blocks could never be had."""
    if num_blocks > cache.counts.max_blocks:
        raise _too_large(asked, num_blocks, cache)


def require_length(entry: Entry, additional_tokens: int) -> None:
    """Raises SequenceTooLongError if a sequence would pass its limit."""
    limit = entry.request.max_sequence_length
    if entry.num_tokens + additional_tokens > limit:
        raise SequenceTooLongError(
            f"Request {entry.request_id!r} holds {entry.num_tokens} tokens and asks for "
            f"{additional_tokens} more; its max_sequence_length is {limit}. "
            "Stop it, or allocate it with more."
        )


def require_alike(source: Entry, target: Entry, num_tokens: int) -> None:
    """Raises PrefixMismatchError or ValueError unless one can hold the other's first tokens."""
    for entry in (source, target):
        if num_tokens > entry.num_tokens:
            raise ValueError(
                f"shared_tokens ({num_tokens}) must not exceed the {entry.num_tokens} tokens of "
                f"request {entry.request_id!r}."
            )
    if source is target:
        raise PrefixMismatchError(f"Request {source.request_id!r} is to share with itself.")
    for entry in (source, target):
        if entry.shape.is_compressed:
            raise CompressionError(
                f"Request {entry.request_id!r} is compressed: its blocks cannot be shared. Share "
                "first, and compress then."
            )
    if source.request.cache_salt != target.request.cache_salt:
        raise PrefixMismatchError(
            f"Requests {source.request_id!r} and {target.request_id!r} have different salts. "
            "Share between requests of one tenant."
        )
    known = min(num_tokens, len(source.known_tokens), len(target.known_tokens))
    if source.known_tokens[:known] != target.known_tokens[:known]:
        raise PrefixMismatchError(
            f"The first {known} tokens of {source.request_id!r} and {target.request_id!r} differ. "
            "Share at most those with which both begin."
        )


def require_as_known(entry: Entry, tokens: TokenIds) -> TokenIds:
    """Returns the tokens that are committed of a request.

    Raises:
      PrefixMismatchError: If the request is known to begin with other tokens.
      ValueError: If these are more tokens than the request holds.
    """
    if len(tokens) > entry.num_tokens:
        raise ValueError(
            f"{len(tokens)} tokens of request {entry.request_id!r} are committed, and it holds "
            f"{entry.num_tokens}. Extend it first, or commit each token once."
        )
    known = entry.known_tokens[: len(tokens)]
    if tokens[: len(known)] != known:
        raise PrefixMismatchError(
            f"The first {len(known)} tokens of {entry.request_id!r} are known, from the prefix "
            "cache or from a request with which it shares, and are not the tokens that are "
            "committed. Commit those that share_prefix gave to it."
        )
    return tokens


def require_computed(entry: Entry, num_claimed: int, num_known: int, num_computed: int) -> None:
    """Raises ValueError if a commit says that more tokens are computed than are.

    Args:
      entry: The request.
      num_claimed: Tokens that are said to be computed.
      num_known: Tokens that are known of the request.
      num_computed: Those of them that are computed.
    """
    if num_claimed > num_known:
        raise ValueError(
            f"num_tokens must be at most the {num_known} tokens that are known of request "
            f"{entry.request_id!r}, got {num_claimed}. Name the others by token_ids."
        )
    if num_claimed > num_computed:
        raise ValueError(
            f"{num_claimed} tokens of request {entry.request_id!r} are committed as computed; the "
            f"first {num_computed} are: behind them no step has written keys and values. Run the "
            "step first, or pass num_tokens for what is computed so far."
        )


def require_taken(blocks: Sequence[BlockId], cache: DevicePool) -> None:
    """Raises DoubleFreeError or ForeignBlockError unless all were taken by themselves."""
    if len(set(blocks)) < len(blocks):
        raise DoubleFreeError(f"A block is named twice in {list(blocks)}. Free it once.")
    for block_id in blocks:
        if block_id in cache.counts.taken:
            continue
        if not 0 <= block_id < cache.counts.num_blocks:
            raise ForeignBlockError(
                f"Block {block_id} is not in the pool, which has {cache.counts.num_blocks} blocks. "
                "Free ids that allocate_blocks returned."
            )
        if cache.queries.is_free(block_id):
            raise DoubleFreeError(f"Block {block_id} is free already. Free it once.")
        raise ForeignBlockError(
            f"Block {block_id} belongs to a request. Deallocate the request instead."
        )


def _geometry_of(request: AllocationRequest) -> str:
    return (
        f"{request.num_layers} layers, {request.num_heads} heads, head_dim {request.head_dim}, "
        f"{request.dtype.value} on {request.device}"
    )


def _too_large(asked: str, num_blocks: int, cache: DevicePool) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"{asked} needs {num_blocks} blocks at once; the pool can have "
        f"{cache.counts.max_blocks}. Ask for less, or raise max_blocks."
    )
