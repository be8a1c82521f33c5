"""Small multi-device managers, pictures of their whole state, and faults."""

import dataclasses
import errno
import pathlib
from collections.abc import Mapping

import jax

from ferrum_jax import Device
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.manager.pool import queries, transfer
from ferrum_jax.state import BlockPool
from tests.support.caches import snapshot
from tests.support.managers import configuration, start, write_tokens

CPU = [Device("cpu", index) for index in range(4)]


def make_multi(
    num_devices: int = 3, *, geometry: Mapping | None = None, **config
) -> MultiDevicePagedKvCacheManager:
    """Returns a manager with, on each device, 8 blocks of 3 tokens for 4 requests of 15 tokens.

    Keywords are fields of `CacheConfig` or of `ManagerOptions`.
    """
    devices = {"target_devices": tuple(CPU[:num_devices]), "enable_multi_device": True}
    geometry = {"max_seqs": 4, **(geometry or {})}
    return MultiDevicePagedKvCacheManager(
        *configuration(geometry, **{"max_blocks": 8, **devices, **config})
    )


def all_of(manager: MultiDevicePagedKvCacheManager) -> tuple:
    """Returns all state that a call could change, bit by bit, except the count of refusals."""
    handles = [
        (name, h.device(), h.cache_id(), h.stats(), h.is_valid())
        for name, h in manager.list_handles()
    ]
    stats = {
        device: dataclasses.replace(part, allocation_failures=0)
        for device, part in manager.device_stats().items()
    }
    states = {}
    for device in manager.supported_devices():
        leaves = manager.run(lambda state, _: (state, snapshot(state)), [], device=device)
        states[device] = [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]
    return states, handles, stats


def begin(manager, request_id, num_tokens, device=None, **limits):
    """Allocates a request and writes tokens that are unique to it."""
    where = {} if device is None else {"device": device}
    handle = start(manager, request_id, num_tokens, **where, **limits)
    write_tokens(manager, handle, tokens_for(request_id, num_tokens))
    return handle


def begin_with(manager, request_id, prompt, device):
    """Allocates a request with a prompt, writes the prompt, and commits it to the prefix cache."""
    request = manager.new_request(request_id, prompt_token_ids=prompt, device=device)
    handle = manager.allocate(request)
    write_tokens(manager, handle, prompt)
    manager.commit(handle)
    return handle


def tokens_for(request_id, num_tokens):
    first = 1 + 100 * sum(map(ord, str(request_id)))
    return list(range(first, first + num_tokens))


def where(manager):
    """Returns the device of each request."""
    return {name: manager.get_cache_device(name) for name, _ in manager.list_handles()}


def used(manager):
    """Returns the blocks in use on each device."""
    stats = manager.device_stats().values()
    return [part.total_blocks - part.free_blocks for part in stats]


class BrokenCopyError(Exception):
    """Error of a copy that a test makes fail."""


def break_export(monkeypatch, after):
    """Makes reading the source fail."""

    def fail(*args):
        raise BrokenCopyError

    monkeypatch.setattr(queries.PoolQueries, "stream_seq", fail)


def break_import(monkeypatch, after):
    """Makes the copy fail after `after` chunks."""
    whole, calls = transfer.import_blocks, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) > after:
            raise BrokenCopyError
        return whole(*args)

    monkeypatch.setattr(transfer, "import_blocks", fail_later)


def break_arrival(monkeypatch, after):
    """Makes the copy fail on the device, after it was dispatched."""
    wait = jax.block_until_ready

    def fail(tree):
        trees = tree if isinstance(tree, tuple) else (tree,)
        if any(isinstance(part, BlockPool) for part in trees):
            raise BrokenCopyError
        return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", fail)


def fill_disk(monkeypatch):
    """Makes the disk full after the first bytes of a file."""

    def write_some(entry, file, payload):
        file.write(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ferrum_jax.tiers.files.EntryFile.write", write_some)


DAMAGES = {
    "a bit flips at the end": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "the last byte is lost": lambda data: data[:-1],
    "a bit flips in the header": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "half is lost": lambda data: data[: len(data) // 2],
    "all is lost": lambda data: b"",
    "the file is gone": None,
}
"""Damages of a file: from its bytes to the damaged bytes; None deletes the file."""


def damage(path: pathlib.Path, how: str) -> bytes:
    """Damages a file, and returns its bytes before."""
    before, change = path.read_bytes(), DAMAGES[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(before))
    return before
