"""The methods of a manager of several devices that one device's manager answers: the request's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.typing import ArrayLike

from ferrum_jax.checks import check_callable, check_count, check_flag, check_items, check_type
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.errors import UnknownRequestError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.compression import checked_compression
from ferrum_jax.manager.devices import DeviceManagers
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.types import Device, RequestId


class Routing(DeviceManagers):
    """What concerns requests of one device: it is asked there, while they stay there."""

    def extend(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """Makes room for more tokens where a sequence is; see `KvCacheManager.extend`."""
        self.extend_all([handle], additional_tokens)

    def extend_all(self, handles: Sequence[KvCacheHandle], additional_tokens: int) -> None:
        """Makes room for more tokens in several sequences of one device, or in none.

        Args:
          handles: Different sequences, all on one device.
          additional_tokens: How many more for each.

        Raises:
          GeometryMismatchError: If they are on several devices.
          FerrumError: What `PagedKvCacheManager.extend_all` raises.
        """
        additional_tokens = check_count("additional_tokens", additional_tokens, minimum=0)
        handles = check_items("handles", handles)
        if not handles:
            self._require_use()
            return
        with self._home_of(self._ids_of(handles)) as manager:
            manager.extend_all(handles, additional_tokens)

    def deallocate(self, request_id: RequestId) -> None:
        """Takes a sequence's room back; see `KvCacheManager.deallocate`."""
        with self._home_of([request_id]) as manager:
            manager.deallocate(request_id)

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        try:
            with self._home_of([request_id]) as manager:
                return manager.get_handle(request_id)
        except UnknownRequestError:
            return None

    def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[KvCacheHandle | None],
        *args: Any,
        device: Device | None = None,
        extends: bool = False,
        reserve_tokens: int = 0,
    ) -> Any:
        """Lets a jitted step compute on one device's cache; see `PagedKvCacheManager.run`.

        Args:
          step: A function, jitted with `donate_argnums=0`.
          handles: Whose rows the step gets, all on one device; None for a padded row.
          *args: Handed on; what lies on a device must lie on that one.
          device: Whose cache it is, if there may be no handle.
          extends: Whether the step changes lengths.
          reserve_tokens: Tokens that the step may add to each row.

        Returns:
          The step's output.

        Raises:
          GeometryMismatchError: If the requests are on several devices, or not on `device`.
          FerrumError: What `PagedKvCacheManager.run` raises.
        """
        check_callable("step", step)
        handles = check_items("handles", handles)  # An iterator would be used up by the first look.
        check_flag("extends", extends)
        num_reserved = check_count("reserve_tokens", reserve_tokens, minimum=0)
        with self._home_of(self._ids_of(handles), device) as manager:
            self._this_thread.is_in_step = True  # It holds its device's manager.
            try:
                return manager.run(
                    step, handles, *args, extends=extends, reserve_tokens=num_reserved
                )
            finally:
                self._this_thread.is_in_step = False

    def commit(
        self,
        handle: KvCacheHandle,
        token_ids: Sequence[int] = (),
        *,
        num_tokens: int | None = None,
        retention: Retention | None = None,
    ) -> int:
        """Keeps what was computed for later prompts; see `PagedKvCacheManager.commit`."""
        if retention is not None:
            check_type("retention", retention, Retention)
        if num_tokens is not None:
            num_tokens = check_count("num_tokens", num_tokens, minimum=0)
        with self._home_of(self._ids_of([handle])) as manager:
            return manager.commit(handle, token_ids, num_tokens, retention)

    def share_prefix(self, source: RequestId, target: RequestId, shared_tokens: int) -> None:
        """Lets a sequence hold the beginning of another one on the same device.

        See `PagedKvCacheManager.share_prefix`.

        Raises:
          GeometryMismatchError: If they are on different devices.
          FerrumError: What `PagedKvCacheManager.share_prefix` raises.
        """
        shared_tokens = check_count("shared_tokens", shared_tokens, minimum=0)
        with self._home_of([source, target]) as manager:
            manager.share_prefix(source, target, shared_tokens)

    def swap_out(self, request_id: RequestId) -> None:
        """Moves a cache to host memory; see `PagedKvCacheManager.swap_out`."""
        with self._home_of([request_id]) as manager:
            manager.swap_out(request_id)

    def swap_in(self, request_id: RequestId) -> None:
        """Moves a cache back to its device; see `PagedKvCacheManager.swap_in`."""
        with self._home_of([request_id]) as manager:
            manager.swap_in(request_id)

    def compress_cache(
        self,
        request_id: RequestId,
        compression_ratio: float,
        method: CompressionMethod | None = None,
        queries: ArrayLike | None = None,
    ) -> None:
        """Makes a cache smaller, at some loss; see `PagedKvCacheManager.compress_cache`."""
        ratio, method, reference = checked_compression(
            compression_ratio, method, queries, next(iter(self._managers.values())).geometry
        )
        with self._home_of([request_id]) as manager:
            manager.compress_cache(request_id, ratio, method, reference)
