"""A manager of several devices beside its model, and the comparison of both.

`check` compares everything that the manager holds with the model, every byte of every request
included. The operations of a random program are in `random_operations.py`.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

import ferrum_jax as fj
from ferrum_jax import Device, FerrumError
from ferrum_jax.config import TierConfig
from ferrum_jax.prefix.tree import TreeBlock
from ferrum_jax.types import NULL_BLOCK
from tests.support.bad_policies import BadBlockPolicy, BadRequestPolicy, complaints
from tests.support.internals import (
    cached_blocks,
    devices_of,
    file_name_of,
    group_blocks,
    state_of,
    taken_blocks,
)
from tests.support.manager_model import ManagerModel
from tests.support.manager_model_records import Block, Name, version_of
from tests.support.managers import BLOCK_SIZE, Clock
from tests.support.multi_device import all_of, make_multi
from tests.support.random_scenarios import (
    DEVICES,
    HEAD_DIM,
    NUM_IDS,
    NUM_LAYERS,
    Draw,
    Scenario,
)


class ManagerBesideModel:
    """A manager and a model of it.

    Args:
      scenario: How the manager is made.
      directory: The directory of the disk tier, if there is one.

    Attributes:
      counts: How often each operation ended how.
      refusals: How often each error was raised.
      faults: How often each fault was injected.
      num_compared_bytes: Bytes that were read and compared with the model's.
    """

    def __init__(self, scenario: Scenario, directory: pathlib.Path):
        self.scenario, self.directory, self.clock = scenario, directory, Clock()
        item_bytes = np.dtype(scenario.dtype).itemsize
        num_layers = NUM_LAYERS // scenario.num_groups
        self.block_bytes = 2 * num_layers * BLOCK_SIZE * HEAD_DIM * item_bytes
        self.bad_policy = BadRequestPolicy("nothing")
        policies = {None: None, "lru": fj.LruEvictionPolicy(), "bad": self.bad_policy}
        self.block_policies: list[BadBlockPolicy] = []
        self.manager = make_multi(
            len(DEVICES),
            geometry=scenario.geometry,
            max_blocks=scenario.max_blocks,
            initial_blocks=scenario.max_blocks // 2 if scenario.grows else scenario.max_blocks,
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
        self.pools = devices_of(self.manager)
        self.model = ManagerModel(scenario)
        self.model.now = self.clock.now
        self.requests = self.model.requests
        self.counts, self.refusals, self.faults = (collections.Counter[str]() for _ in range(3))
        self.num_compared_bytes = 0
        self.prompts = collections.deque[list[int]]([[]], maxlen=5)
        self.next_token = 1
        self.told: list[fj.MemoryPressure] = []
        self.level = fj.MemoryPressure.Low
        self.callback_raises = False
        self.manager.set_pressure_callback(self.be_called)
        self.listening = complaints()
        self.listening.__enter__()

    def close(self) -> None:
        self.manager.close()
        self.listening.__exit__(None, None, None)

    def be_called(self, level: fj.MemoryPressure) -> None:
        self.told.append(level)
        if self.callback_raises:
            raise RuntimeError("The callback is broken.")

    def make_block_policy(self, capacity: int) -> BadBlockPolicy:
        self.block_policies.append(BadBlockPolicy(capacity))
        return self.block_policies[-1]

    # What must be true.

    def check(self) -> None:
        """Compares everything with the model."""
        self.manager.check()
        model, handles = self.model, dict(self.manager.list_handles())
        assert handles.keys() == self.requests.keys()
        for i, request in self.requests.items():
            assert self.manager.get_cache_device(i) == request.device
            assert handles[i].num_tokens() == len(request.tokens)
            stats = handles[i].stats()
            assert stats.blocks_allocated == len(request.held)
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
            if field.name not in ("cache_hit_rate", "group_blocks"):
                numbers = [getattr(part, field.name) for part in parts.values()]
                assert getattr(whole, field.name) == sum(numbers), field.name
        names = parts[DEVICES[0]].group_blocks
        sums = {name: sum(part.group_blocks[name] for part in parts.values()) for name in names}
        assert whole.group_blocks == sums
        held = [[len(r.blocks), len(r.held) - len(r.blocks)] for r in self.requests.values()]
        of_groups = np.sum([[0, 0], *held], axis=0)[: self.scenario.num_groups]
        assert list(sums.values()) == of_groups.tolist()
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
        """Checks that blocks are shared as in the model, and that each holds the same bits."""
        manager, cached = self.pools[device], self.cached_on(device)
        assert cached.keys() == self.model.cached[device].keys()
        pairs = [(kept.block, cached[n].block_id) for n, kept in self.model.cached[device].items()]
        for kept in self.model.cached[device].values():
            assert self.model.writes.is_sound(kept), (
                f"{kept.tokens} are cached in a block with other bytes"
            )
        rows = group_blocks(manager)
        for i, request in self.model.on(device).items():
            pairs += zip(request.blocks, rows[i][0], strict=True)
            for block, block_id in zip(request.local, sum(rows[i][1:], []), strict=True):
                assert (block is None) == (block_id == NULL_BLOCK), "released other blocks"
                pairs += [(block, block_id)] if block else []
        block_of = {block_id: block for block, block_id in pairs}
        assert len(set(pairs)) == len(block_of) == len({block for block, _ in pairs})
        taken = self.model.taken[device]
        assert taken_blocks(manager) == sorted(taken) and not block_of.keys() & set(taken)
        pool = state_of(manager).pool
        blocks = [block_of.get(block_id, Block()) for block_id in range(pool.num_blocks)]
        for layer in range(NUM_LAYERS):
            # Each layer is in all blocks, or in those of its group alone.
            group, index = (0, layer) if self.scenario.window is None else (layer, 0)
            natives = [n for n, b in enumerate(blocks) if b.is_native and b.group == group]
            wanted = self.contents([cell for n in natives for cell in blocks[n].cells])[layer]
            for array, want in zip(pool.arrays.values(), wanted, strict=True):
                have = np.asarray(array)[natives, index]  # [N, 1, B, D]
                assert have.tobytes() == want.tobytes(), "a block does not hold what was written"
                self.num_compared_bytes += have.nbytes

    def check_pressure(self) -> None:
        """Checks the last level that the pressure callback was given."""
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
        if request.window is not None:
            want = [want[0], self.contents(request.local_cells)[1]]
        for got, expected in zip(self.layers_of(i), want, strict=True):
            for have, wanted in zip(got, expected, strict=True):
                assert have.shape == wanted.shape
                assert have.tobytes() == wanted.tobytes()
                self.num_compared_bytes += have.nbytes

    # What the manager has chosen to evict or preempt.

    def note_choices(self) -> None:
        """Copies to the model which requests were preempted and which cached blocks evicted."""
        for device, manager in self.pools.items():
            for i in self.model.on(device):
                handle = manager.get_handle(i)  # None once it was deallocated or moved.
                if handle is not None and not handle.is_resident:
                    self.model.swap_out(i)
                    self.model.num_preempted += 1
                    self.note("preempt", "ok")
            self.note_evictions(device)

    def note_evictions(self, device: Device) -> None:
        real, in_use = self.cached_on(device), self.model.in_use(device)
        is_any_of_now = False
        for name, kept in list(self.model.cached[device].items()):
            if kept.real is not None and real.get(name) is not kept.real:
                assert kept.block not in in_use, "a block in use was evicted"
                is_of_now = version_of(name) == self.model.version
                is_any_of_now |= is_of_now and self.model.is_alive(device, kept)
                self.model.uncache_one(device, name)
                self.note("evict or expire", "ok" if is_of_now else "outdated")
        if is_any_of_now:
            assert not self.model.has_idle_outdated(device), "outdated blocks are evicted first"

    def settle(self) -> None:
        """Compares what is cached with the model, and copies which blocks are new."""
        for device in DEVICES:
            self.note_evictions(device)
            real, cached = self.cached_on(device), self.model.cached[device]
            assert real.keys() == cached.keys(), "other blocks are cached than should be"
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
        cached = cached_blocks(self.pools[device])
        return {name: block for name, (_, block) in cached.items()}

    def note_tail(self, i: int, prompt: Sequence[int], num_found: int) -> None:
        """Copies to the model what was copied into the first block of a new request."""
        request, num_full = self.requests[i], num_found // BLOCK_SIZE
        if not (num_tail := num_found % BLOCK_SIZE):
            return
        beginnings = {
            tuple(kept.block.cells[:num_tail])
            for kept in self.model.cached[request.device].values()
            if kept.salt == request.key
            and len(kept.tokens) == (num_full + 1) * BLOCK_SIZE
            and kept.tokens[:num_found] == tuple(prompt[:num_found])
        }
        got = self.layers_of(i)[0][0][num_full * BLOCK_SIZE : num_found]
        cells = [c for c in beginnings if self.contents(c)[0][0].tobytes() == got.tobytes()]
        assert len(cells) == 1, "the copied tail is not that of a cached block"
        request.blocks[num_full].cells[:num_tail] = cells[0]

    def adopt(self, i: int) -> None:
        """Makes the model take over the bytes and the number of blocks of a request.

        For a lossy compression, whose bytes the model cannot predict. The bytes must not change
        from now on, wherever the request is moved.
        """
        request, read = self.requests[i], self.adoptable_layers_of(i)
        handle = request.handle
        request.num_pruned = len(request.tokens) - len(read[0][0])
        request.adopted, request.block_size = read, handle.live_request().tokens_per_block
        num_blocks = handle.stats().blocks_allocated - (len(request.held) - len(request.blocks))
        request.blocks = [Block(is_native=False) for _ in range(num_blocks)]

    def adopt_after(self, i: int, num_tokens: int) -> None:
        """Takes over bytes after `num_tokens` of an adopted request; the others must not change."""
        request = self.requests[i]
        if request.adopted is None:
            return
        num_kept, before = num_tokens - request.num_pruned, request.adopted
        request.adopted = self.adoptable_layers_of(i)
        for old, new in zip(before, request.adopted, strict=True):
            for then, now in zip(old, new, strict=True):
                assert then[:num_kept].tobytes() == now[:num_kept].tobytes()

    def end(self) -> None:
        """Deallocates all requests, and checks that nothing is left of them."""
        self.check()
        for i in list(self.requests):
            self.manager.deallocate(i)
            self.model.end(i)
        self.check()

    # How operations are done.

    def id_of(self, draw: Draw, likely) -> int:
        """Draws one of the likely ids, and sometimes any id."""
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
        """The next `count` tokens of a known prompt that begins with `tokens`; else new tokens."""
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

    def adoptable_layers_of(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Keys and values of the layers that compression changes: those that keep all tokens."""
        return self.layers_of(i)[: NUM_LAYERS // self.scenario.num_groups]

    def directory_of(self, device: Device) -> pathlib.Path:
        return self.directory / f"{device.platform}-{device.index}"

    def file_of(self, i: int) -> pathlib.Path:
        name = file_name_of(self.handle(i).cache_id())
        return self.directory_of(self.requests[i].device) / name

    def call(self, name: str, want: type[Exception] | None, call: Callable[[], Any]) -> Any:
        """Makes a call, and copies to the model what the manager has evicted or preempted."""
        result = self.attempt(name, want, call)
        if want is None:
            self.note_choices()
        return result

    def attempt(self, name: str, want: type[Exception] | None, call: Callable[[], Any]) -> Any:
        """Makes a call, which must raise the error that the model predicts, without any effect."""
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
