"""Small managers of several CPU devices, all that a call could change, and what goes wrong."""

import dataclasses
import errno
import pathlib
from collections.abc import Mapping

import jax

from ferrum_jax import CacheConfig, CacheGeometry, Device
from ferrum_jax.manager import ManagerOptions
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.manager.pool import queries, transfer
from ferrum_jax.state import BlockPool
from tests.support.helpers import snapshot
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS

CPU = [Device("cpu", index) for index in range(4)]


def make_multi(
    num_devices: int = 3, *, geometry: Mapping | None = None, **config
) -> MultiDevicePagedKvCacheManager:
    """On each device, 8 blocks of 3 tokens for 4 requests of at most 15 tokens.

    What is no field of `CacheConfig` is one of `ManagerOptions`.
    """
    fields = {field.name for field in dataclasses.fields(ManagerOptions)}
    options = {name: config.pop(name) for name in fields & config.keys()}
    max_blocks = config.get("max_blocks", 8)
    sizes = {"block_size": BLOCK_SIZE, "max_blocks": max_blocks, "initial_blocks": max_blocks}
    devices = {"target_devices": tuple(CPU[:num_devices]), "enable_multi_device": True}
    model = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 2, "dtype": "float32"}
    limits = {"max_seqs": 4, "max_sequence_length": MAX_TOKENS}
    return MultiDevicePagedKvCacheManager(
        CacheConfig(**{**sizes, **devices, **config}),
        CacheGeometry(**{**model, **limits, **(geometry or {})}),
        ManagerOptions(**options),
    )


def all_of(manager: MultiDevicePagedKvCacheManager) -> tuple:
    """All that a call could change, every bit of it, but for the count of refusals."""
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


class BrokenCopyError(Exception):
    """What a failing device says."""


def break_export(monkeypatch, after):
    """The bytes cannot be read."""

    def fail(*args):
        raise BrokenCopyError

    monkeypatch.setattr(queries.PoolQueries, "stream_row", fail)


def break_import(monkeypatch, after):
    """The copy fails after some chunks have arrived."""
    whole, calls = transfer.import_blocks, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) > after:
            raise BrokenCopyError
        return whole(*args)

    monkeypatch.setattr(transfer, "import_blocks", fail_later)


def break_arrival(monkeypatch, after):
    """The copy was ordered, and fails on the device."""
    wait = jax.block_until_ready

    def fail(tree):
        if isinstance(tree, BlockPool):
            raise BrokenCopyError
        return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", fail)


def fill_disk(monkeypatch):
    """The disk takes the beginning of a file, and no more."""

    def write_some(file, *_):
        file.write(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ferrum_jax.tiers.disk.write_entry", write_some)


DAMAGES = {
    "a bit flips at the end": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "the last byte is lost": lambda data: data[:-1],
    "a bit flips in the header": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "half is lost": lambda data: data[: len(data) // 2],
    "all is lost": lambda data: b"",
    "the file is gone": None,
}
"""What becomes of a file's bytes."""


def damage(path: pathlib.Path, how: str) -> bytes:
    """Damages a file, and returns what it was."""
    before, change = path.read_bytes(), DAMAGES[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(before))
    return before
