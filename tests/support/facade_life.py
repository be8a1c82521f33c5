"""What a random life of a manager of several devices stands on: how it is made, and looked at.

`check` holds all there is against a dull model, every byte of every request included. What is
done in a life is in `facade_operations.py`.
"""

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import Device, FerrumError
from ferrum_jax.config import TierConfig
from ferrum_jax.ops import transfer
from ferrum_jax.prefix.tree import TreeBlock
from ferrum_jax.tiers.disk import _name_of
from ferrum_jax.tokens import TokenIds
from tests.support.bad_policies import BadBlockPolicy, BadRequestPolicy, complaints
from tests.support.facade_model import FacadeModel
from tests.support.facade_records import Block, Name, Tiers
from tests.support.facade_scenarios import (
    DEVICES,
    HEAD_DIM,
    MAX_BLOCKS,
    MAX_ROWS,
    NUM_IDS,
    NUM_LAYERS,
    Draw,
    Scenario,
)
from tests.support.managers import BLOCK_SIZE, Clock
from tests.support.multi_device import (
    BrokenCopyError,
    all_of,
    fill_disk,
    make_multi,
)
from tests.support.parts import devices_of, pool_of, requests_of


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
        policies = {None: None, "lru": fj.LruEvictionPolicy(), "bad": BadRequestPolicy("nothing")}
        self.block_policies: list[BadBlockPolicy] = []
        self.manager = make_multi(
            len(DEVICES),
            geometry={"max_seqs": MAX_ROWS, "dtype": scenario.dtype, "head_dim": HEAD_DIM},
            max_blocks=MAX_BLOCKS,
            initial_blocks=MAX_BLOCKS // 2 if scenario.grows else MAX_BLOCKS,
            enable_pooling=not scenario.grows,
            enable_prefix_caching=scenario.config is not None,
            prefix_cache_config=scenario.config,
            preemption_policy=policies[scenario.request_policy],
            block_policy="lru" if scenario.block_policy == "lru" else self.make_block_policy,
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
            config=scenario.config,
            policy=scenario.request_policy,
            tiers={d: Tiers(scenario.max_host_blocks, scenario.has_disk) for d in DEVICES},
        )
        self.model.now = self.clock.now
        self.requests = self.model.requests
        self.counts, self.refusals, self.faults = (collections.Counter[str]() for _ in range(3))
        self.num_compared_bytes = 0
        self.prompts = collections.deque[list[int]]([[]], maxlen=5)
        self.next_token = 1
        self.told: list[fj.MemoryPressure] = []
        self.level = fj.MemoryPressure.Low
        self.callback_raises = False
        self.manager.set_pressure_callback(self.be_told)
        self.listening = complaints()
        self.listening.__enter__()

    def close(self) -> None:
        self.manager.close()
        self.listening.__exit__(None, None, None)

    def be_told(self, level: fj.MemoryPressure) -> None:
        self.told.append(level)
        if self.callback_raises:
            raise RuntimeError("The callback is broken.")

    def make_block_policy(self, capacity: int) -> BadBlockPolicy:
        self.block_policies.append(BadBlockPolicy(capacity))
        return self.block_policies[-1]

    # What must be true.

    def check(self) -> None:
        """Holds everything against the model."""
        self.manager.check()
        model, handles = self.model, dict(self.manager.list_handles())
        assert handles.keys() == self.requests.keys()
        for i, request in self.requests.items():
            assert self.manager.get_cache_device(i) == request.device
            assert handles[i].num_tokens() == len(request.tokens)
            stats = handles[i].stats()
            assert stats.blocks_allocated == len(request.blocks)
            assert stats.tokens_stored == len(request.tokens) - request.num_pruned
            if request.adopted is not None:
                self.read(i)
        whole = self.manager.stats()
        assert whole.active_caches == len(self.requests)
        assert whole.allocation_count == model.num_allocated
        assert whole.allocation_failures == model.num_refused
        assert whole.preemption_count == model.num_preempted
        rate = model.num_reused_tokens / max(1, model.num_prompt_tokens)
        assert abs(whole.cache_hit_rate - rate) < 1e-9
        parts = self.manager.device_stats()
        for field in dataclasses.fields(whole):
            if field.name != "cache_hit_rate":
                numbers = [getattr(part, field.name) for part in parts.values()]
                assert getattr(whole, field.name) == sum(numbers), field.name
        for device, part in parts.items():
            in_use = part.total_blocks - part.free_blocks - part.evictable_blocks
            assert in_use == model.used(device)
            self.check_tiers(device, part.host_bytes)
            self.check_pool(device)

    def check_tiers(self, device: Device, host_bytes: int) -> None:
        tiers, files = self.model.tiers[device], set(self.directory_of(device).glob("*.kvblocks"))
        sound = {self.file_of(i) for i in tiers.disk if not self.requests[i].is_damaged}
        assert sound <= files <= {self.file_of(i) for i in tiers.disk}
        away = [r for r in self.requests.values() if r.device == device and r.is_away]
        assert len(away) == len(tiers.disk) + len(tiers.host)
        if not any(request.is_damaged for request in away):
            num_bytes = sum(path.stat().st_size for path in files)
            assert host_bytes == num_bytes + sum(tiers.host.values()) * self.block_bytes

    def check_pool(self, device: Device) -> None:
        """Blocks are shared as the model's are, and each holds what it should, in every bit."""
        manager, cached = devices_of(self.manager)[device], self.cached_on(device)
        assert cached.keys() == self.model.cached[device].keys()
        pairs = [(kept.block, cached[n].block_id) for n, kept in self.model.cached[device].items()]
        for kept in self.model.cached[device].values():
            assert self.model.is_sound(kept), f"{kept.tokens} is cached, and not what it is"
        rows = pool_of(manager).queries.all_row_blocks()
        for i, request in self.model.on(device).items():
            real = rows.get(requests_of(manager).known(i).seq_id, [])
            pairs += zip(request.blocks, real, strict=True)
        block_of = {block_id: block for block, block_id in pairs}
        assert len(set(pairs)) == len(block_of) == len({block for block, _ in pairs})
        taken = self.model.taken[device]
        assert pool_of(manager).counts.taken == set(taken) and not block_of.keys() & set(taken)
        pool = pool_of(manager).state.pool
        blocks = [block_of.get(block_id, Block()) for block_id in range(pool.num_blocks)]
        natives = [n for n, block in enumerate(blocks) if block.is_native]
        contents = self.contents([cell for n in natives for cell in blocks[n].cells])
        for layer, wanted in enumerate(contents):
            for array, want in zip((pool.k, pool.v), wanted, strict=True):
                have = np.asarray(array)[natives, layer]  # [N, 1, B, D]
                assert have.tobytes() == want.tobytes(), "a block is not what was written"
                self.num_compared_bytes += have.nbytes

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

    # What the manager has chosen.

    def learn(self) -> None:
        """Takes note of who was swapped out for others, and of which cached blocks went."""
        for device, manager in devices_of(self.manager).items():
            for i in self.model.on(device):
                entry = requests_of(manager).get(i)  # None once it has ended, or moved.
                if entry is not None and not entry.is_resident:
                    self.model.leave(i)
                    self.model.num_preempted += 1
                    self.note("preempt", "ok")
            self.learn_what_went(device)

    def learn_what_went(self, device: Device) -> None:
        real, in_use = self.cached_on(device), self.model.in_use(device)
        for name, kept in list(self.model.cached[device].items()):
            if kept.real is not None and real.get(name) is not kept.real:
                assert kept.block not in in_use, "what is in use stays"
                self.model.forget(device, name)
                self.note("evict or expire", "ok")

    def settle(self) -> None:
        """Holds what is cached against the model, and takes note of what is new."""
        for device in DEVICES:
            self.learn_what_went(device)
            real, cached = self.cached_on(device), self.model.cached[device]
            assert real.keys() == cached.keys(), "just that is cached which should be"
            for name, kept in cached.items():
                kept.real = real[name]

    def held_on(self, device: Device) -> set[Block]:
        """Blocks of a device that are in use or cached."""
        cached = [kept.block for kept in self.model.cached[device].values()]
        return self.model.in_use(device, more=cached)

    def num_gone(self) -> int:
        stats = self.manager.stats()
        return stats.eviction_count + stats.expiration_count

    def cached_on(self, device: Device) -> dict[Name, TreeBlock]:
        """What the manager has cached on a device, by salt and tokens."""
        cached = {}
        for node in devices_of(self.manager)[device].prefixes.cache.forest.nodes():
            *_, root = path = list(node.path())
            tokens = TokenIds.from_packed(b"".join(n.packed for n in path[::-1]))
            for block in node.blocks:
                end = (block.logical_index + 1) * BLOCK_SIZE
                cached[root.salt, tuple(tokens[:end])] = block
        return cached

    def learn_tail(self, i: int, prompt: Sequence[int], num_found: int) -> None:
        """Takes what was copied into a new request's first own block, if it may be that."""
        request, num_full = self.requests[i], num_found // BLOCK_SIZE
        if not (num_tail := num_found % BLOCK_SIZE):
            return
        beginnings = {
            tuple(kept.block.cells[:num_tail])
            for kept in self.model.cached[request.device].values()
            if kept.salt == request.salt
            and len(kept.tokens) == (num_full + 1) * BLOCK_SIZE
            and kept.tokens[:num_found] == tuple(prompt[:num_found])
        }
        got = self.layers_of(i)[0][0][num_full * BLOCK_SIZE : num_found]
        cells = [c for c in beginnings if self.contents(c)[0][0].tobytes() == got.tobytes()]
        assert len(cells) == 1, "the tail is that of a cached block"
        request.blocks[num_full].cells[:num_tail] = cells[0]

    def adopt(self, i: int) -> None:
        """Lets the model believe what a request reads now, and how many blocks it has for it.

        It is for what changes bytes at a loss, so that no oracle knows them beforehand: they
        must stay as they are from now on, wherever they go.
        """
        request, read = self.requests[i], self.layers_of(i)
        handle = request.handle
        request.num_pruned = len(request.tokens) - len(read[0][0])
        request.adopted, request.block_size = read, handle.live_request().tokens_per_block
        request.blocks = [Block(is_native=False) for _ in range(handle.stats().blocks_allocated)]

    def adopt_what_follows(self, i: int, num_tokens: int) -> None:
        """Believes a request's tokens behind some, if its bytes are its own; these must stay."""
        request = self.requests[i]
        if request.adopted is None:
            return
        num_kept, before = num_tokens - request.num_pruned, request.adopted
        request.adopted = self.layers_of(i)
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

    def tokens_after(self, tokens: Sequence[int], count: int) -> list[int]:
        """What follows some tokens in a prompt that begins with them, or else is new."""
        known = next((p for p in self.prompts if p[: len(tokens)] == tokens), tokens)
        more = known[len(tokens) : len(tokens) + count]
        return more + self.new_tokens(count - len(more))

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
        self.learn()  # Room was made, though in vain.
        self.check()

    def call(self, name: str, want: type[Exception] | None, call: Callable[[], Any]) -> Any:
        """Makes a call, and takes note of what the manager has chosen for it."""
        result = self.attempt(name, want, call)
        if want is None:
            self.learn()
        return result

    def attempt(self, name: str, want: type[Exception] | None, call: Callable[[], Any]) -> Any:
        """Makes a call of the manager, which must be refused as foretold, without any effect.

        All calls that change something are made here, so that a fault can come before any.
        """
        before, got, result = all_of(self.manager) if want else None, None, None
        try:
            result = call()
        except (FerrumError, ValueError) as error:
            got = type(error)
            if got is not want:
                raise
        assert got is want, f"{name}: nothing instead of {want}"
        self.note(name, want.__name__ if want else "ok")
        if want is not None:
            self.refusals[want.__name__] += 1
            assert all_of(self.manager) == before, f"{name} changed something"
        return result

    def note(self, name: str, outcome: str) -> None:
        self.counts[f"{name}: {outcome}"] += 1
