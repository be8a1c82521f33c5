"""What can go wrong at the facade: one exception for each wrong use or shortage.

Wrong configuration is a `ValueError` and a wrong shape an `AssertionError` at trace time;
neither is here. Every message says what was asked, what there is, and what to do.
"""


class FerrumError(Exception):
    """Any error of the cache. Catch this one to catch them all."""


class RefusedError(FerrumError):
    """An operation's `ok` was false. Free rows, ask for less, or make the cache larger."""


class UnknownRequestError(FerrumError):
    """A request id names no live request. Allocate it first, or free it only once."""


class DuplicateRequestError(FerrumError):
    """A request id is allocated while it is live. Deallocate it first, or use another id."""


class RequestTooLargeError(FerrumError):
    """A request could not fit even in an empty pool. Ask for less, or raise `max_blocks`."""


class SequenceTooLongError(FerrumError):
    """A sequence would pass its `max_sequence_length`. Stop it, or allocate it with more."""


class GeometryMismatchError(FerrumError):
    """A request's layers, heads, head_dim, dtype or device are not the pool's.

    Ask with the pool's own numbers, or make a manager for that model.
    """


class InvalidHandleError(FerrumError):
    """A handle is used after its request was deallocated. Get a new one from the manager."""


class SwappedOutError(FerrumError):
    """A request's cache is not on the device just now. Swap it in first."""


class PrefixMismatchError(FerrumError):
    """Two requests cannot share: they begin differently, or have different salts.

    Share at most the tokens with which both begin, between requests of one tenant.
    """


class CompressionError(FerrumError):
    """A cache cannot be compressed as asked, or being compressed cannot do what is asked.

    Ask for a ratio that its method reaches, or use a cache that is not compressed.
    """


class LayerOutOfRangeError(FerrumError):
    """A layer is not among the cached ones. Use 0 to `num_layers - 1`."""


class DoubleFreeError(FerrumError):
    """A block is freed that is free already. Free each block once, by its one owner."""


class ForeignBlockError(FerrumError):
    """A block id is not the caller's to use: outside the pool, or held by a request.

    Use only ids which `allocate_blocks` returned.
    """


class CacheLostError(FerrumError):
    """A step consumed a manager's cache and did not return it. Make a new manager."""


class UncountedTokensError(FerrumError):
    """A step changed lengths, and nobody told the manager. Pass `extends=True` to `run`."""


class OutOfBlocksError(FerrumError):
    """Too few blocks are free just now. Free a request, evict one, or raise `max_blocks`."""


class OutOfRowsError(FerrumError):
    """All `max_seqs` rows are in use just now. Free a request, or raise `max_seqs`."""


class OutOfHostMemoryError(FerrumError):
    """No tier below the device has room just now. Free a swapped request, or raise a budget."""


class CorruptFileError(FerrumError):
    """A file of the disk tier is not what was written there. Drop its entry, and compute anew.

    Attributes:
      path: The file.
      reason: What is wrong with it.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # `args` are the arguments, so that it can be pickled.
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        """Returns what is wrong, and what to do."""
        return (
            f"{self.path} cannot be read back: {self.reason}. Nothing of it was used; deallocate "
            "its request, or drop the entry, and compute what it held anew."
        )


class WaitTimeoutError(FerrumError, TimeoutError):
    """A call waited for room as long as it was allowed to. Give it more time, or free a request.

    Its `__cause__` is the shortage that it met, an `OutOfBlocksError` or `OutOfRowsError`; None
    if others came first all the time.
    """
