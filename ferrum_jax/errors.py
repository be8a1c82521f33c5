"""Exceptions of managers: one per kind of wrong use or shortage.

A wrong configuration or argument is a `ValueError`, a wrong shape an `AssertionError` at trace
time. Every message says what was asked, what there is, and what to do.
"""


class FerrumError(Exception):
    """Base class of the exceptions in this module."""


class RefusedError(FerrumError):
    """An operation's `ok` was false. Free rows, ask for less, or make the cache larger."""


class UnknownRequestError(FerrumError):
    """No live request has this id. Allocate it first, or free it only once."""


class DuplicateRequestError(FerrumError):
    """The id of a live request was allocated again. Deallocate it first, or use another id."""


class RequestTooLargeError(FerrumError):
    """A request would not fit in an empty pool. Ask for less, or raise `max_blocks`."""


class SequenceTooLongError(FerrumError):
    """A sequence would exceed its `max_sequence_length`. End it, or allocate it with more."""


class GeometryMismatchError(FerrumError):
    """The layers, heads, head_dim, dtype or device of a request differ from the pool's.

    Use the pool's geometry, or create a manager for that model.
    """


class InvalidHandleError(FerrumError):
    """A handle was used after its request was deallocated. Get a new one from the manager."""


class SwappedOutError(FerrumError):
    """The cache of a request is not on the device now. Swap it in first."""


class PrefixMismatchError(FerrumError):
    """Two requests cannot share tokens: their prompts or their salts differ.

    Share at most the common prefix, between requests with the same `cache_salt`.
    """


class CompressionError(FerrumError):
    """A cache cannot be compressed as asked, or an operation does not support compressed caches.

    Use a ratio that the method reaches, or a cache that is not compressed.
    """


class LayerOutOfRangeError(FerrumError):
    """The cache has no such layer. Use 0 to `num_layers - 1`."""


class DoubleFreeError(FerrumError):
    """A free block was freed again. Free each block once."""


class ForeignBlockError(FerrumError):
    """A block id is outside the pool, or the block belongs to a request.

    Use only ids that `allocate_blocks` returned.
    """


class CacheLostError(FerrumError):
    """A step consumed a manager's cache and did not return it. Create a new manager."""


class UncountedTokensError(FerrumError):
    """A step changed the lengths of rows, but `run` was called without `extends=True`."""


class OutOfBlocksError(FerrumError):
    """Too few blocks are free now. Free or evict a request, or raise `max_blocks`."""


class OutOfRowsError(FerrumError):
    """All `max_seqs` rows are in use now. Free a request, or raise `max_seqs`."""


class OutOfHostMemoryError(FerrumError):
    """No tier has room now. Free a request that is swapped out, or raise a tier's budget."""


class CorruptFileError(FerrumError):
    """A file of the disk tier is damaged. Deallocate its request, and compute its tokens again.

    Args:
      path: Path of the file.
      reason: How the file differs from what was written.

    Attributes:
      path: As given.
      reason: As given.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # `args` are the arguments, so that it can be pickled.
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        """Returns what is wrong, and what to do."""
        return (
            f"{self.path} cannot be read back: {self.reason}. No part of it was used. Deallocate "
            "its request, or discard the entry, and compute its tokens again."
        )


class WaitTimeoutError(FerrumError, TimeoutError):
    """A call waited for room until its timeout. Use a longer timeout, or free a request.

    The `__cause__` is the last shortage, an `OutOfBlocksError` or `OutOfRowsError`; None if other
    waiting calls were always ahead.
    """
