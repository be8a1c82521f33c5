"""What a random life of a manager of several devices stands on: how it is made, and looked at.

`check` holds all there is against a dull model, every byte of every request included. What is
done in a life is in `facade_operations.py`.
"""

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import Device, FerrumError, PrefixCacheConfig
from ferrum_jax.config import TierConfig
from ferrum_jax.ops import transfer
from ferrum_jax.tiers.disk import _name_of
from ferrum_jax.types import TokenFormat
from tests.facade_model import FacadeModel, Tiers
from tests.managers import BLOCK_SIZE, Clock, refused
from tests.multi_device import (
    CPU,
    BrokenCopyError,
    all_of,
    fill_disk,
    make_multi,
)

DEVICES, MAX_BLOCKS, MAX_ROWS, NUM_IDS = CPU[:3], 6, 3, 9
NUM_LAYERS, HEAD_DIM, TTL_SECONDS = 2, 8, 20.0
LENGTHS = (12, 9, 15, 7, 3, 0, 2)
PREFIXES = PrefixCacheConfig(
    max_prefixes=99,
    min_prefix_length=1,
    prefix_ttl_seconds=TTL_SECONDS,
    enable_cross_request_sharing=True,
)


class Draw(Protocol):
    """Who decides."""

    def one_of(self, options: Sequence[Any]) -> Any:
        """Returns one of some options."""
        ...

    def number(self, low: int, high: int) -> int:
        """Returns a number from `low` to `high`, both included."""
        ...


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How a manager is made."""

    caches_prefixes: bool = True
    grows: bool = False
    max_host_blocks: int = MAX_BLOCKS
    has_disk: bool = False
    dtype: str = "float32"
    compresses: bool = False
    token_formats: Sequence[TokenFormat] = ()


SCENARIOS = {
    # Formats are enabled as they come, and every program is compiled for each set of them.
    "plain": Scenario(caches_prefixes=False, compresses=True),
    "prefixes": Scenario(grows=True),
    "disk": Scenario(
        max_host_blocks=4, has_disk=True, compresses=True, token_formats=tuple(TokenFormat)
    ),
    "disk alone": Scenario(
        caches_prefixes=False, max_host_blocks=0, has_disk=True, dtype="bfloat16"
    ),
}


class FacadeLife:
    """A manager and a model of it.

    Args:
      scenario: How the manager is made.
      directory: Where its disk tier is, if it has one.

    Attributes:
      counts: How often each operation ended how.
      refusals: How often each error was met.
      faults: How often each fault was.
      num_compared_bytes: Bytes that were read and compared with the model's.
    """

    def __init__(self, scenario: Scenario, directory: pathlib.Path):
        self.scenario, self.directory, self.clock = scenario, directory, Clock()
        item_bytes = np.dtype(scenario.dtype).itemsize
        self.block_bytes = 2 * NUM_LAYERS * BLOCK_SIZE * HEAD_DIM * item_bytes
        self.manager = make_multi(
            len(DEVICES),
            geometry={"max_seqs": MAX_ROWS, "dtype": scenario.dtype, "head_dim": HEAD_DIM},
            max_blocks=MAX_BLOCKS,
            initial_blocks=MAX_BLOCKS // 2 if scenario.grows else MAX_BLOCKS,
            enable_prefix_caching=scenario.caches_prefixes,
            prefix_cache_config=PREFIXES,
            clock=self.clock,
            token_formats=scenario.token_formats,
            tiers=TierConfig(
                host_budget_bytes=scenario.max_host_blocks * self.block_bytes,
                disk_directory=directory if scenario.has_disk else None,
            ),
        )
        self.model = FacadeModel(
            DEVICES,
            max_blocks=MAX_BLOCKS,
            max_rows=MAX_ROWS,
            caches_prefixes=scenario.caches_prefixes,
            tiers={d: Tiers(scenario.max_host_blocks, scenario.has_disk) for d in DEVICES},
        )
        self.requests = self.model.requests
        self.counts, self.refusals, self.faults = (collections.Counter[str]() for _ in range(3))
        self.num_compared_bytes = 0
        self.prompts = collections.deque[list[int]]([[]], maxlen=5)
        self.next_token = 1
        self.told: list[fj.MemoryPressure] = []
        self.level = fj.MemoryPressure.Low
        self.manager.set_pressure_callback(self.told.append)

    # What must be true.

    def check(self) -> None:
        """Holds everything against the model."""
        self.manager.check()
        model, handles = self.model, dict(self.manager.list_handles())
        assert handles.keys() == self.requests.keys()
        for i, request in self.requests.items():
            assert self.manager.get_cache_device(i) == request.device
            self.read(i)
        whole = self.manager.stats()
        assert whole.active_caches == len(self.requests)
        assert whole.allocation_count == model.num_allocated
        assert whole.allocation_failures == model.num_refused
        parts = self.manager.device_stats()
        for field in dataclasses.fields(whole):
            if field.name != "cache_hit_rate":
                numbers = [getattr(part, field.name) for part in parts.values()]
                assert getattr(whole, field.name) == sum(numbers), field.name
        for device, part in parts.items():
            in_use = part.total_blocks - part.free_blocks - part.evictable_blocks
            assert in_use == model.used(device)
            self.check_tiers(device, part.host_bytes)
            self.check_sharing(device)

    def check_tiers(self, device: Device, host_bytes: int) -> None:
        tiers, files = self.model.tiers[device], set(self.directory_of(device).glob("*.kvblocks"))
        sound = {self.file_of(i) for i in tiers.disk if not self.requests[i].is_damaged}
        assert sound <= files <= {self.file_of(i) for i in tiers.disk}
        away = [r for r in self.requests.values() if r.device == device and r.is_away]
        assert len(away) == len(tiers.disk) + len(tiers.host)
        if not any(request.is_damaged for request in away):
            num_bytes = sum(path.stat().st_size for path in files)
            assert host_bytes == num_bytes + sum(tiers.host.values()) * self.block_bytes

    def check_sharing(self, device: Device) -> None:
        """Requests share blocks exactly where the model's do."""
        pairs = set()
        for i, request in self.requests.items():
            if request.device == device and not request.is_away:
                real = self.handle(i).block_table().physical_blocks
                pairs |= set(zip(request.blocks, real, strict=True))
        assert len(pairs) == len({block for block, _ in pairs}) == len({x for _, x in pairs})

    def check_pressure(self) -> None:
        """The callback was told of the pressure that there is."""
        level = self.model.pressure()
        assert not self.told or self.told[-1] == level
        assert self.told or self.level == level
        self.level = level
        self.told.clear()

    def read(self, i: int) -> None:
        """Reads what a request holds, and compares every bit of it."""
        if i not in self.requests:
            assert self.manager.get_handle(i) is None
            return
        request, handle = self.requests[i], self.handle(i)
        assert handle.num_tokens() == len(request.tokens)
        if request.is_away:
            assert handle.key_cache(0) is None
            return
        assert handle.device() == request.device
        want = request.adopted or self.contents(request.cells)
        for got, expected in zip(self.layers_of(i), want, strict=True):
            for have, wanted in zip(got, expected, strict=True):
                assert have.shape == wanted.shape
                assert have.tobytes() == wanted.tobytes()
                self.num_compared_bytes += have.nbytes

    def adopt(self, i: int) -> None:
        """Lets the model believe what a request reads now; see `FacadeModel.adopt`."""
        self.model.adopt(i, self.layers_of(i))

    def adopt_what_follows(self, i: int, num_tokens: int) -> None:
        """Believes a request's tokens behind some, if its bytes are its own; these must stay."""
        request = self.requests[i]
        if request.adopted is None:
            return
        num_kept, before = num_tokens - request.num_pruned, request.adopted
        self.adopt(i)
        for old, new in zip(before, request.adopted, strict=True):
            for then, now in zip(old, new, strict=True):
                assert then[:num_kept].tobytes() == now[:num_kept].tobytes()

    def end(self) -> None:
        """Ends all requests; nothing may be left of them."""
        self.check()
        for i in list(self.requests):
            self.manager.deallocate(i)
            self.model.end(i)
        self.check()

    # How it is done.

    def id_of(self, draw: Draw, likely) -> int:
        """Draws one of the likely ids, and sometimes any."""
        is_likely = likely and draw.number(0, 9) < 9
        return draw.one_of(sorted(likely) if is_likely else range(NUM_IDS))

    def usable_ids(self) -> list[int]:
        return [i for i, request in self.requests.items() if not request.is_away]

    def is_away(self, i: int) -> bool:
        return i in self.requests and self.requests[i].is_away

    def handle(self, i: int) -> Any:
        return self.requests[i].handle or self.manager.get_handle(i)

    def new_tokens(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def contents(self, cells: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values [T, H, D] of each layer, by what was written; zeros for nothing."""
        dtype = ml_dtypes.bfloat16 if self.scenario.dtype == "bfloat16" else np.float32
        ids = np.asarray(cells, np.int64).reshape(-1, 1, 1)
        digits = np.concatenate([ids % 256, ids // 256], axis=2)  # Exact even in bfloat16.
        digits = np.pad(digits, ((0, 0), (0, 0), (0, HEAD_DIM - 2)))
        scales = [(2.0**layer, 2.0 ** (layer + 4)) for layer in range(NUM_LAYERS)]
        return [((digits * k).astype(dtype), (digits * v).astype(dtype)) for k, v in scales]

    def layers_of(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        handle = self.handle(i)
        layers = [handle.kv_cache(layer) for layer in range(NUM_LAYERS)]
        return [(np.asarray(k), np.asarray(v)) for k, v in layers]

    def directory_of(self, device: Device) -> pathlib.Path:
        return self.directory / f"{device.platform}-{device.index}"

    def file_of(self, i: int) -> pathlib.Path:
        name = _name_of(self.handle(i).cache_id())
        return self.directory_of(self.requests[i].device) / name

    @contextlib.contextmanager
    def full_disk(self, draw: Draw) -> Iterator[bool]:
        """A time in which the disk may be full."""
        is_full = self.scenario.has_disk and draw.number(0, 3) == 0
        with pytest.MonkeyPatch.context() as monkeypatch:
            if is_full:
                fill_disk(monkeypatch)
                self.faults["the disk is full"] += 1
            yield is_full

    @contextlib.contextmanager
    def broken_copies(self, draw: Draw, what: str, breaks: Sequence[Any], num_chunks: int = 1):
        """A call whose copy fails, perhaps with some chunks arrived; nothing may be lost."""
        break_it, was_broken = draw.one_of(breaks), False
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(transfer, "CHUNK_BYTES", self.block_bytes)
            break_it(monkeypatch, draw.number(0, num_chunks - 1))
            try:
                yield
            except BrokenCopyError:
                was_broken = True
        assert was_broken, f"{what} has swallowed a fault"
        self.faults[f"{what}: {break_it.__name__}"] += 1
        self.check()

    def call(self, name: str, want: type[FerrumError] | None, call) -> None:
        """Makes a call, which must be refused as foretold, without any effect."""
        before = all_of(self.manager) if want else None
        got = refused(call)
        assert got is want, f"{name}: {got} instead of {want}"
        self.note(name, want.__name__ if want else "ok")
        if want is not None:
            self.refusals[want.__name__] += 1
            assert all_of(self.manager) == before, f"{name} changed something"

    def note(self, name: str, outcome: str) -> None:
        self.counts[f"{name}: {outcome}"] += 1
