"""Checks before a manager changes anything, and the errors that they raise."""

from collections.abc import Container, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.errors import (
    CompressionError,
    DoubleFreeError,
    DuplicateRequestError,
    FerrumError,
    ForeignBlockError,
    GeometryMismatchError,
    OutOfBlocksError,
    OutOfRowsError,
    PrefixMismatchError,
    RefusedError,
    RequestTooLargeError,
    SequenceTooLongError,
)
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId, DataType, Device, RequestId


def require_open(is_closed: bool) -> None:
    """Raises RuntimeError if a manager is closed."""
    if is_closed:
        raise RuntimeError(
            "The manager is closed: its requests have ended, and it takes no others. Make another."
        )


def require_acceptable(request: AllocationRequest, pool: DevicePool) -> None:
    """Raises an error if a pool can never hold a request.

    Args:
      request: The request to allocate.
      pool: The pool.

    Raises:
      GeometryMismatchError: If the geometry or the device is another one than the pool's.
      SequenceTooLongError: If the request may grow longer than a row.
      RequestTooLargeError: If the request does not fit in an empty pool.
    """
    name, geometry = request.request_id, pool.geometry
    asked = request.num_layers, request.num_heads, request.head_dim, request.dtype, request.device
    offered = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.dtype
    if asked != (*offered, pool.device):
        raise GeometryMismatchError(
            f"Request {name!r} asks for {_describe(*asked)}; the pool has "
            f"{_describe(*offered, pool.device)}. Ask for that, or make a manager for this model."
        )
    if request.max_sequence_length > geometry.max_sequence_length:
        raise SequenceTooLongError(
            f"Request {name!r} may grow to {request.max_sequence_length} tokens; a row holds "
            f"{geometry.max_sequence_length}. Ask for less, or raise the geometry's "
            "max_sequence_length."
        )
    num_tokens = max(request.initial_tokens, len(request.prompt_token_ids or ()))
    num_blocks = pool.counts.blocks_for(num_tokens, step=request.initial_tokens)
    require_possible(f"Request {name!r}", num_blocks, pool)


def shortage_error(
    request: AllocationRequest, num_blocks: PerPool, obtainable: PerPool, pool: DevicePool
) -> FerrumError:
    """Returns the error for a request that finds no row or too few blocks at present."""
    if not pool.counts.num_free_rows:
        return OutOfRowsError(
            f"Request {request.request_id!r} needs a row; all {pool.geometry.max_seqs} are in "
            "use. Deallocate a request, or raise max_seqs."
        )
    return out_of_blocks_error(f"Request {request.request_id!r}", num_blocks, obtainable, pool)


def out_of_blocks_error(
    asked: str, num_blocks: PerPool, obtainable: PerPool, pool: DevicePool
) -> OutOfBlocksError:
    """Returns the error for a call that finds too few blocks at present."""
    return OutOfBlocksError(
        f"{asked}: {num_blocks} blocks are needed, and {obtainable} of "
        f"{pool.counts.max_blocks} are available on {pool.device}. Deallocate a request, or raise "
        "max_blocks."
    )


def out_of_room_error(
    asked: str, num_blocks: PerPool, num_rows: int, obtainable: PerPool, pool: DevicePool
) -> FerrumError:
    """Returns the error for a call that finds too few rows or blocks at present."""
    if num_rows > pool.counts.num_free_rows:
        return OutOfRowsError(
            f"{asked}: {num_rows} rows are needed, and {pool.counts.num_free_rows} of "
            f"{pool.geometry.max_seqs} are free on {pool.device}. Deallocate a request, or raise "
            "max_seqs."
        )
    return out_of_blocks_error(asked, num_blocks, obtainable, pool)


def require_possible(asked: str, num_blocks: PerPool, pool: DevicePool) -> None:
    """Raises RequestTooLargeError if the pools can never have this many blocks."""
    if not num_blocks.fits_in(pool.counts.max_blocks):
        pools = "pool" if len(num_blocks) == 1 else "pools"
        raise RequestTooLargeError(
            f"{asked} needs {num_blocks} blocks at once; the {pools} can have "
            f"{pool.counts.max_blocks}. Ask for less, or raise max_blocks."
        )


def require_length(request: LiveRequest, additional_tokens: int) -> None:
    """Raises SequenceTooLongError if a sequence would pass its limit."""
    limit = request.allocation.max_sequence_length
    if request.num_tokens + additional_tokens > limit:
        raise SequenceTooLongError(
            f"Request {request.request_id!r} holds {request.num_tokens} tokens and asks for "
            f"{additional_tokens} more; its max_sequence_length is {limit}. "
            "Stop it, or allocate it with more."
        )


def require_shareable(source: LiveRequest, target: LiveRequest, num_tokens: int) -> None:
    """Raises an error unless one request can hold another one's first tokens.

    Args:
      source: The request that has the tokens.
      target: The request that is to hold them.
      num_tokens: Leading tokens to share.

    Raises:
      PrefixMismatchError: If both are one request, have different salts or versions of the weights,
        or are known to begin with different tokens.
      CompressionError: If one of them is compressed.
      RefusedError: If a sliding window of the source has passed what the next token would see.
      ValueError: If `num_tokens` is more than one of them holds.
    """
    for request in (source, target):
        if num_tokens > request.num_tokens:
            raise ValueError(
                f"shared_tokens ({num_tokens}) must not exceed the {request.num_tokens} tokens of "
                f"request {request.request_id!r}."
            )
    if source is target:
        raise PrefixMismatchError(f"Request {source.request_id!r} cannot share with itself.")
    for request in (source, target):
        if request.shape.is_compressed:
            raise CompressionError(
                f"Request {request.request_id!r} is compressed: its blocks cannot be shared. Share "
                "first, and compress then."
            )
    if source.allocation.cache_salt != target.allocation.cache_salt:
        raise PrefixMismatchError(
            f"Requests {source.request_id!r} and {target.request_id!r} have different salts. "
            "Share between requests of one tenant."
        )
    if source.lease.key.version != target.lease.key.version:
        raise PrefixMismatchError(
            f"Requests {source.request_id!r} and {target.request_id!r} have started under "
            "different versions of the weights. Share between requests of one version."
        )
    known = min(num_tokens, len(source.known.longest), len(target.known.longest))
    if source.known.longest[:known] != target.known.longest[:known]:
        raise PrefixMismatchError(
            f"The first {known} tokens of {source.request_id!r} and {target.request_id!r} differ. "
            "Share at most those with which both begin."
        )
    if not source.pool.counts.holds_needed(source.seq_id, num_tokens):
        raise RefusedError(
            f"The first {num_tokens} tokens of {source.request_id!r} cannot be shared: a sliding "
            "window has passed tokens that the next one would see, and their blocks are released. "
            f"Share more of its {source.num_tokens} tokens, or share before it is extended."
        )


def require_new(request_ids: Sequence[RequestId], live: Container[RequestId]) -> None:
    """Raises an error unless request ids are different, and none of them is live.

    Raises:
      ValueError: If an id is a handle.
      DuplicateRequestError: If an id is live, or named twice.
    """
    for i, request_id in enumerate(request_ids):
        if isinstance(request_id, KvCacheHandle):
            raise ValueError(
                f"request_id must be an id of your own, got {request_id!r}. Choose a key that no "
                "live request has."
            )
        if request_id in live or request_id in request_ids[:i]:
            raise DuplicateRequestError(
                f"Request {request_id!r} is live already, or named twice. Deallocate it first, or "
                "use another id."
            )


def require_forkable(source: LiveRequest) -> None:
    """Raises RefusedError if a full block of a request holds tokens that no step has computed."""
    num_shared = source.num_tokens - min(source.pool.counts.tails(source.seq_id))
    if num_shared > source.known.max_computed:
        raise RefusedError(
            f"Request {source.request_id!r} cannot be forked: no step has computed its tokens from "
            f"{source.known.max_computed} on, and the first {num_shared} are in blocks that all "
            "would write. Run the step that computes them first."
        )


def require_decodable(request: LiveRequest) -> None:
    """Raises RefusedError if a request cannot go on: not all that it holds is computed."""
    held, num_computed = request.num_tokens, request.known.max_computed
    if not held or num_computed < held:
        raise RefusedError(
            f"Request {request.request_id!r} cannot be decoded: it holds {held} tokens, and steps "
            f"have computed at most the first {num_computed}. Prefill the others first."
        )


def require_as_known(request: LiveRequest, tokens: TokenIds) -> TokenIds:
    """Returns the tokens of a commit, checked against what is known of the request.

    Raises:
      PrefixMismatchError: If the request is known to begin with other tokens.
      ValueError: If these are more tokens than the request holds.
    """
    if len(tokens) > request.num_tokens:
        raise ValueError(
            f"{len(tokens)} tokens of request {request.request_id!r} are committed, and it holds "
            f"{request.num_tokens}. Extend it first, or commit each token once."
        )
    known = request.known.longest[: len(tokens)]
    if tokens[: len(known)] != known:
        raise PrefixMismatchError(
            f"The first {len(known)} tokens of {request.request_id!r} are known, from the prefix "
            "cache or from a request with which it shares, and are not the tokens that are "
            "committed. Commit those that share_prefix gave to it."
        )
    return tokens


def require_computed(
    request: LiveRequest, num_claimed: int, num_known: int, num_computed: int
) -> None:
    """Raises ValueError if a commit claims more computed tokens than there are.

    Args:
      request: The request.
      num_claimed: Leading tokens that the commit says are computed.
      num_known: Leading tokens that are known.
      num_computed: Leading tokens that are computed.
    """
    if num_claimed > num_known:
        raise ValueError(
            f"num_tokens must be at most the {num_known} tokens that are known of request "
            f"{request.request_id!r}, got {num_claimed}. Name the others by token_ids."
        )
    if num_claimed > num_computed:
        raise ValueError(
            f"{num_claimed} tokens of request {request.request_id!r} are committed as computed; "
            f"the first {num_computed} are: past them no step has written keys and values. Run the "
            "step first, or pass num_tokens for what is computed so far."
        )


def require_taken(blocks: Sequence[BlockId], pool: DevicePool) -> None:
    """Raises DoubleFreeError or ForeignBlockError unless `allocate_blocks` returned all blocks."""
    if len(set(blocks)) < len(blocks):
        raise DoubleFreeError(f"A block is named twice in {list(blocks)}. Free it once.")
    for block_id in blocks:
        if block_id in pool.counts.taken:
            continue
        num_blocks = pool.counts.num_blocks[0]
        if not 0 <= block_id < num_blocks:
            raise ForeignBlockError(
                f"Block {block_id} is not in the pool, which has {num_blocks} blocks. "
                "Free ids that allocate_blocks returned."
            )
        if pool.queries.is_free(block_id):
            raise DoubleFreeError(f"Block {block_id} is free already. Free it once.")
        raise ForeignBlockError(
            f"Block {block_id} belongs to a request. Deallocate the request instead."
        )


def _describe(
    num_layers: int, num_heads: int, head_dim: int, dtype: DataType, device: Device
) -> str:
    return f"{num_layers} layers, {num_heads} heads, head_dim {head_dim}, {dtype.value} on {device}"
