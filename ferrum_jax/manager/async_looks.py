"""What the manager for an event loop tells without waiting."""

from collections.abc import Callable, Sequence

from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.manager.manager import PagedKvCacheManager
from ferrum_jax.manager.uncopied import Uncopied
from ferrum_jax.records import AllocationRequest, CacheManagerStats, CompressionStats
from ferrum_jax.types import MemoryPressure, Priority, RequestId


class AsyncLooks(Uncopied):
    """Methods that are quick, and no coroutines: looks at a manager as it is just now.

    Args:
      manager: What is looked at.
    """

    def __init__(self, manager: PagedKvCacheManager):
        self._manager = manager

    @property
    def manager(self) -> PagedKvCacheManager:
        """What is wrapped."""
        return self._manager

    def new_request(
        self,
        request_id: RequestId,
        initial_tokens: int | None = None,
        max_sequence_length: int | None = None,
        priority: Priority = Priority.Normal,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> AllocationRequest:
        """Returns a request that fits the pool; see `PagedKvCacheManager.new_request`."""
        return self._manager.new_request(
            request_id,
            initial_tokens,
            max_sequence_length,
            priority,
            prompt_token_ids=prompt_token_ids,
            cache_salt=cache_salt,
        )

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        return self._manager.get_handle(request_id)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        return self._manager.list_handles()

    def stats(self) -> CacheManagerStats:
        """Returns what is held at this moment; a wait counts as one failure at most."""
        return self._manager.stats()

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has won; see `PagedKvCacheManager.compression_stats`."""
        return self._manager.compression_stats()

    def free_block_count(self) -> int:
        """Returns how many blocks of the present pool are free; it may still grow."""
        return self._manager.free_block_count()

    def total_block_count(self) -> int:
        """Returns how many blocks the pool has at present."""
        return self._manager.total_block_count()

    def block_size(self) -> int:
        """Returns the tokens of one block."""
        return self._manager.block_size()

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets what is called with the new level on every change of pressure.

        Args:
          callback: Called on the loop or in the thread that made the change.
        """
        self._manager.set_pressure_callback(callback)
