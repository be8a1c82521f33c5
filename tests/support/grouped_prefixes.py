"""Managers that cache prefixes of several layer groups, and random lives of them."""

import random
from collections.abc import Sequence

import jax
import numpy as np

from ferrum_jax import FerrumError, KeyValue, KvCacheHandle, LayerGroup, PagedKvCacheManager
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.types import NULL_BLOCK
from tests.support.caches import payload
from tests.support.grouped_managers import PAYLOAD, first_needed, tokens_in
from tests.support.internals import (
    cached_blocks,
    device_of,
    pool_of,
    requests_of,
    state_of,
)
from tests.support.manager_pictures import picture
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, Clock, make_manager, write_tokens
from tests.support.prefix_managers import CONFIG, found
from tests.support.prepared_managers import extend_step, fork_step, truncate_step

FULL_AND_WINDOW, WINDOWS, MIXED = (None, 4), (7, 4), (4, None, 8)


def make(
    windows: Sequence[int | None], payloads: Sequence[KeyValue] = (PAYLOAD,), **config
) -> PagedKvCacheManager:
    """A manager of pools of 24 blocks of 3 tokens, that caches prefixes.

    Its groups have one layer each, and the payloads in turn: a pool for each payload.
    """
    groups = [
        LayerGroup(f"group{i}", [i], payloads[i % len(payloads)], w) for i, w in enumerate(windows)
    ]
    caching = {"enable_prefix_caching": True, "prefix_cache_config": CONFIG, "clock": Clock()}
    model = {"groups": groups, "num_layers": len(groups)}
    return make_manager(geometry=model, **{"max_blocks": 24, **caching, **config})


def ask(manager, name, prompt: Sequence[int], chunk: int = 3, **limits) -> KvCacheHandle:
    """Starts a request, and computes and commits what is not cached of its prompt by chunks.

    Room is allocated chunk by chunk, so that windows release what they pass.
    """
    first = found(manager, prompt, limits.get("cache_salt")) + 1
    first = min(len(prompt), -(-first // chunk) * chunk)
    handle = manager.allocate(manager.new_request(name, prompt_token_ids=prompt[:first], **limits))
    write(manager, handle, prompt[:first], handle.num_cached_tokens)
    manager.commit(handle)
    for begin in range(first, len(prompt), chunk):
        more = prompt[begin : begin + chunk]
        manager.extend(handle, len(more))
        write(manager, handle, prompt[: begin + chunk], begin)
        manager.commit(handle, more)
    return handle


def write(manager, handle, tokens: Sequence[int], begin: int) -> None:
    """Writes the tokens of a request from position `begin` on."""
    write_tokens(manager, handle, tokens[begin:], begin)


def released(manager, handle: KvCacheHandle) -> list[int]:
    """Blocks that a request has released in each group."""
    seq_id = requests_of(manager).known(handle.request_id).seq_id
    return pool_of(manager).counts.released(seq_id)


def require_contents(manager, handle: KvCacheHandle, tokens: Sequence[int]) -> None:
    """Asserts that each group holds these tokens, and 0 where its window has passed them."""
    places = state_of(manager).layers.by_pool()  # `write_tokens` numbers layers in this order.
    groups = zip(places, released(manager, handle), strict=True)
    for number, (place, num_released) in enumerate(groups):
        num_gone, (layer,) = num_released * BLOCK_SIZE, place.group.layers
        assert num_released <= first_needed(len(tokens), place.group.sliding_window)
        assert tokens_in(handle, layer, number) == [0] * num_gone + list(tokens[num_gone:])


def require_cached_contents(manager) -> None:
    """Asserts that each cached block holds, in each group, the tokens under which it is found."""
    pools, counts = jax.device_get(state_of(manager).pools), pool_of(manager).counts
    for (_, tokens), (_, block) in cached_blocks(manager).items():
        for group, block_id in enumerate(block.block_ids):
            pool, first = pools[counts.pools[group]], counts.ids.firsts[counts.pools[group]]
            wanted = payload(pool, group, tokens[-BLOCK_SIZE:])
            for array, want in zip(pool.arrays.values(), wanted, strict=True):
                if block_id != NULL_BLOCK:
                    np.testing.assert_array_equal(array[block_id - first, 0].swapaxes(0, 1), want)


class RandomLife:
    """A manager that random calls change, beside the tokens that each request should hold."""

    weights = {
        "start": 6,
        "grow": 6,
        "commit": 3,
        "end": 3,
        "swap_out": 1,
        "swap_in": 2,
        "share": 1,
        "fork": 1,
        "truncate": 1,
        "grow_in_a_step": 2,
        "take_blocks": 1,
        "upkeep": 1,
    }

    def __init__(self, windows: Sequence[int | None], seed: int, **config):
        self.random, self.manager = random.Random(seed), make(windows, **config)
        self.handles: dict[str, KvCacheHandle] = {}
        self.tokens: dict[str, list[int]] = {}
        self.names, self.num_hits = (f"r{i}" for i in range(10**6)), 0
        self.refused = 0

    def run(self, num_steps: int) -> None:
        """Makes random calls, checks everything after each, and ends all requests."""
        for _ in range(num_steps):
            (call,) = self.random.choices(list(self.weights), self.weights.values())
            try:
                getattr(self, call)()
            except FerrumError:
                self.refused += 1
            self.check()
        for name in list(self.handles):
            self.end_request(name)
        stats = self.manager.stats()
        assert stats.free_blocks + stats.evictable_blocks >= stats.total_blocks - self.num_pinned()
        self.manager.reset_prefixes()
        picture(self.manager)
        assert self.manager.free_block_count() == stats.total_blocks

    def check(self) -> None:
        picture(self.manager)
        require_cached_contents(self.manager)
        for name, handle in self.handles.items():
            assert handle.num_tokens() == len(self.tokens[name])
            if handle.is_resident:
                require_contents(self.manager, handle, self.tokens[name])

    def num_pinned(self) -> int:
        nodes = [node for node, _ in cached_blocks(self.manager).values()]
        pinned = [node for node in nodes if any(n.is_pinned for n in node.subtree())]
        return len(pinned) * len(pool_of(self.manager).counts.windows)

    def pick(self, *, resident: bool = True) -> str | None:
        names = [n for n, handle in self.handles.items() if handle.is_resident == resident]
        return self.random.choice(names) if names else None

    def start(self) -> None:
        name, rng = next(self.names), self.random
        prompt = [1] * rng.randint(1, MAX_TOKENS - 1)
        if rng.random() < 0.3:
            prompt[rng.randrange(len(prompt))] = 2
        salt = rng.choice((None, None, None, "tenant"))
        num_found, length = found(self.manager, prompt, salt), len(prompt)
        room = rng.choice((length, length, rng.randint(0, length)))
        request = self.manager.new_request(name, room, prompt_token_ids=prompt, cache_salt=salt)

        def first_length(num_found: int) -> int:
            return room if room == length else min(length, num_found + max(room, num_found > 0))

        can_start = self.manager.can_allocate(request)
        obtainable = device_of(self.manager).reclaimer.obtainable
        try:
            handle = self.manager.allocate(request)
        except FerrumError:
            assert not can_start
            num_blocks = -(-first_length(num_found) // BLOCK_SIZE)
            num_new = [num_blocks * n for n in pool_of(self.manager).counts.num_groups]
            is_short = any(new > left for new, left in zip(num_new, obtainable, strict=True))
            assert is_short or len(self.handles) >= 5, "no prefix would fit"
            raise
        assert can_start
        assert handle.num_cached_tokens <= num_found
        if num_found % BLOCK_SIZE == 0:
            assert handle.num_cached_tokens == num_found
        num_tokens = handle.num_tokens()
        assert first_length(handle.num_cached_tokens) <= num_tokens <= first_length(num_found)
        prompt = prompt[:num_tokens]
        self.num_hits += handle.num_cached_tokens > 0
        self.handles[name], self.tokens[name] = handle, prompt
        write(self.manager, handle, prompt, handle.num_cached_tokens)
        if rng.random() < 0.6:
            self.manager.commit(handle)

    def more(self, name: str) -> list[int]:
        """Tokens to add to a request: first those of its prompt."""
        held, rng = len(self.tokens[name]), self.random
        prompt = list(self.handles[name].request.prompt_token_ids or ())
        known = requests_of(self.manager).known(name).known.longest
        planned = max(prompt, list(known), key=len)[held:]
        count = rng.randint(0, min(5, MAX_TOKENS - held))
        return [*planned, *(rng.choice((1, 1, 1, 1, 2)) for _ in range(count))][:count]

    def grow(self) -> None:
        name = self.pick()
        if name is not None:
            more = self.more(name)
            self.manager.extend(self.handles[name], len(more))
            self.write_more(name, more)

    def grow_in_a_step(self) -> None:
        name = self.pick()
        if name is not None:
            more = self.more(name)[:4]
            counts = np.asarray([len(more)], np.int32)
            counts_of_pools = pool_of(self.manager).counts
            if not counts_of_pools.num_groups.times(2).fits_in(counts_of_pools.num_free):
                return
            ok = self.manager.run(extend_step, [self.handles[name]], counts, extends=True)
            assert bool(np.all(ok))
            self.write_more(name, more)

    def write_more(self, name: str, more: Sequence[int]) -> None:
        """Writes tokens for which a request has room."""
        held = len(self.tokens[name])
        self.tokens[name] += more
        write(self.manager, self.handles[name], self.tokens[name], held)

    def commit(self) -> None:
        name = self.pick()
        if name is not None:
            known = requests_of(self.manager).known(name).known.tokens
            pinned = Retention(is_pinned=self.random.random() < 0.3)
            retention = pinned if self.random.random() < 0.2 else None
            held = len(self.tokens[name])
            self.manager.commit(
                self.handles[name],
                self.tokens[name][len(known) :],
                retention=retention,
                num_tokens=self.random.randint(0, held) if self.random.random() < 0.3 else None,
            )

    def end(self) -> None:
        name = self.pick(resident=self.random.random() < 0.8)
        if name is not None:
            self.end_request(name)

    def end_request(self, name: str) -> None:
        self.manager.deallocate(name)
        del self.handles[name], self.tokens[name]

    def swap_out(self) -> None:
        name = self.pick()
        if name is not None:
            self.manager.swap_out(name)

    def swap_in(self) -> None:
        name = self.pick(resident=False)
        if name is not None:
            self.manager.swap_in(name)

    def share(self) -> None:
        source, target = self.pick(), self.pick()
        if source is None or target is None or source == target:
            return
        if not (self.tokens[source] and self.tokens[target]):
            return
        most = min(len(self.tokens[source]), len(self.tokens[target]))
        count = self.random.randint(1, most)
        self.manager.share_prefix(source, target, count)
        self.tokens[target][:count] = self.tokens[source][:count]

    def fork(self) -> None:
        parent, child = self.pick(), next(self.names)
        if parent is None or len(self.handles) >= 5:
            return
        salt = self.handles[parent].request.cache_salt
        salt = salt if self.random.random() < 0.9 else "other"
        request = self.manager.new_request(child, 0, cache_salt=salt)
        self.handles[child] = self.manager.allocate(request)
        self.tokens[child] = []
        handles = [self.handles[parent], self.handles[child]]
        if self.manager.run(fork_step, handles, extends=True):
            self.tokens[child] = list(self.tokens[parent])

    def truncate(self) -> None:
        name = self.pick()
        if name is not None:
            length = self.random.randint(0, len(self.tokens[name]))
            lengths = np.asarray([length], np.int32)
            if self.manager.run(truncate_step, [self.handles[name]], lengths, extends=True):
                del self.tokens[name][length:]

    def take_blocks(self) -> None:
        """Evicts what is cached, as far as a number of blocks says."""
        stats = self.manager.stats()
        count = self.random.randint(0, stats.free_blocks + min(3, stats.evictable_blocks))
        if count:
            self.manager.free_blocks(self.manager.allocate_blocks(count))

    def upkeep(self) -> None:
        call = self.random.choice(("defragment", "defragment", "gc", "reset_prefixes"))
        getattr(self.manager, call)(*(["tenant"] if call == "reset_prefixes" else []))
