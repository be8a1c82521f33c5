"""Moves requests between the managers of two devices."""

from __future__ import annotations

from ferrum_jax.errors import DuplicateRequestError, GeometryMismatchError
from ferrum_jax.manager.balance import CacheLoad, PoolLoad
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.handle import RequestLike
from ferrum_jax.manager.pool import stored_for
from ferrum_jax.manager.refusals import shortage_error
from ferrum_jax.manager.requests import LiveRequest


def move_request(
    named: RequestLike,
    source: DeviceManager,
    target: DeviceManager,
    *,
    must_be_resident: bool = False,
) -> None:
    """Moves a request with all its handles to another device, bit for bit, or not at all.

    See `PagedKvCacheManager.move_to`.

    Args:
      named: The request, by id or handle.
      source: The device of the request.
      target: The device to move it to.
      must_be_resident: Whether to raise SwappedOutError if the request is swapped out.
    """
    first, second = sorted((source, target), key=id)  # So that no two moves wait for each other.
    with first.access.changing(), second.access.changing():
        request = source.requests.known(named)
        if must_be_resident:
            request.require_resident()
        if target is source:
            return
        _require_fit(request, source, target)
        if request.is_resident:
            _copy_row(request, source, target)
        else:
            target.swapping.take_over(request, source.swapping)
        source.reclaimer.discard(request)
        target.requests.adopt(request)
        source.requests.remove(request)
        target.reclaimer.note_use([request], request.last_access)


def load_of(device: DeviceManager) -> PoolLoad:
    """Returns how full a device's pool is, and what moving each request would change."""
    with device.access.reading():
        pool, prefixes = device.pool, device.prefixes
        pool.device_state.require()
        caches = []
        for request in device.requests:
            if not any(request.num_blocks):
                continue
            freed = pool.queries.num_freed_by([request.seq_id]) + prefixes.num_idle_without(
                [request]
            )
            caches.append(
                CacheLoad(
                    request_id=request.request_id,
                    num_bytes=pool.bytes_of(request.num_blocks),
                    freed_bytes=pool.bytes_of(freed),
                )
            )
        return PoolLoad(
            capacity_bytes=pool.bytes_of(pool.counts.max_blocks),
            used_bytes=pool.bytes_of(device.access.blocks_in_use),
            num_free_rows=pool.counts.num_free_rows,
            caches=tuple(caches),
        )


def _copy_row(request: LiveRequest, source: DeviceManager, target: DeviceManager) -> None:
    """Copies a request's blocks to another device, and frees them here."""
    num_new, obtainable = request.num_blocks, target.reclaimer.obtainable
    if not num_new.fits_in(obtainable) or not target.pool.counts.num_free_rows:
        raise shortage_error(request.allocation, num_new, obtainable, target.pool)
    payloads = [it.gathered() for it in source.pool.queries.stream_seq(request.seq_id)]
    payloads = [it.gathered() for it in stored_for(target.pool.state, payloads)]
    target.reclaimer.make_room(num_new)
    seq_id = target.pool.restore_row(request.shape, payloads, wait=True)
    with target.pool.freed_on_error(seq_id):
        lease = target.prefixes.recache(request, seq_id)
        try:
            source.pool.free([request.seq_id])
        except BaseException:
            target.prefixes.release(lease)
            raise
    source.prefixes.release(request.lease)
    request.note_row(seq_id, lease)


def _require_fit(request: LiveRequest, source: DeviceManager, target: DeviceManager) -> None:
    """Raises an error unless another device can take a request, if it has room."""
    name = request.request_id
    if name in target.requests:
        raise DuplicateRequestError(
            f"Another request {name!r} is live on the target device. Deallocate it first."
        )
    sizes = source.pool.counts.block_size, target.pool.counts.block_size
    if source.geometry != target.geometry or sizes[0] != sizes[1]:
        raise GeometryMismatchError(
            f"Request {name!r} of {source.geometry} in blocks of {sizes[0]} tokens cannot move to "
            f"a pool of {target.geometry} in blocks of {sizes[1]}. Make both managers alike."
        )
