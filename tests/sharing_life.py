"""What the random life of a manager stands on: how it is made, used, and looked at."""

import dataclasses

import numpy as np
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant

import ferrum_jax as fj
from ferrum_jax import PrefixCacheConfig
from ferrum_jax.config import TierConfig
from ferrum_jax.types import MemoryPressure
from tests.bad_policies import BadBlockPolicy, BadRequestPolicy, complaints
from tests.helpers import put
from tests.managers import MAX_TOKENS, Clock, make_manager, refused, rows_of, tokens_of, whole
from tests.sharing_model import SharingModel

MAX_BLOCKS, INITIAL_BLOCKS, MAX_SEQS, TTL_SECONDS = 16, 4, 5, 20.0
KEEP_ALL = PrefixCacheConfig(
    max_prefixes=100,
    min_prefix_length=1,
    prefix_ttl_seconds=TTL_SECONDS,
    enable_cross_request_sharing=True,
)
KEEP_FEW = dataclasses.replace(KEEP_ALL, max_prefixes=2, min_prefix_length=5)
SALTED_ONLY = dataclasses.replace(KEEP_ALL, enable_cross_request_sharing=False)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How a manager is made, and what it is switched to later."""

    config: PrefixCacheConfig | None = KEEP_ALL
    later: PrefixCacheConfig = KEEP_ALL
    enable_pooling: bool = True
    block_policy: str = "lru"
    request_policy: str | None = None


SCENARIOS = {
    "plain": Scenario(),
    "preempting, shrinking": Scenario(request_policy="lru", enable_pooling=False),
    "bad policies": Scenario(block_policy="bad", request_policy="bad"),
    "few prefixes, then all": Scenario(config=KEEP_FEW, block_policy="bad", request_policy="lru"),
    "switched on later": Scenario(config=None, enable_pooling=False, request_policy="lru"),
    "salted only, after all": Scenario(later=SALTED_ONLY, request_policy="bad"),
}


class SharingLife(RuleBasedStateMachine):
    """A manager, a model of it, and what must be true of both after every step."""

    def __init__(self, scenario: Scenario):
        super().__init__()
        self.scenario = scenario
        self.listening = complaints()
        self.listening.__enter__()

    def teardown(self):
        self.listening.__exit__(None, None, None)

    def make(self):
        scenario, clock = self.scenario, Clock()
        config = scenario.config
        self.block_policy, self.request_policy = BadBlockPolicy(MAX_BLOCKS), None
        if scenario.request_policy is not None:
            is_bad = scenario.request_policy == "bad"
            self.request_policy = BadRequestPolicy() if is_bad else fj.LruEvictionPolicy()
        self.manager = make_manager(
            clock=clock,
            max_blocks=MAX_BLOCKS,
            initial_blocks=INITIAL_BLOCKS,
            enable_pooling=scenario.enable_pooling,
            enable_prefix_caching=config is not None,
            prefix_cache_config=config,
            block_policy="lru" if scenario.block_policy == "lru" else lambda _: self.block_policy,
            preemption_policy=self.request_policy,
            tiers=TierConfig(host_budget_bytes=10**9),
        )
        self.model = SharingModel(self.manager, clock, MAX_SEQS, MAX_BLOCKS)
        self.model.config, self.clock = config, clock
        self.requests, self.told, self.level = self.model.requests, [], MemoryPressure.Low
        self.callback_raises = False
        self.manager.set_pressure_callback(self.be_told)
        self.num_prompt_tokens = self.num_reused_tokens = self.num_refused = 0
        self.num_preempted = 0

    def be_told(self, level):
        self.told.append(level)
        if self.callback_raises:
            raise RuntimeError("The callback is broken.")

    @property
    def policy(self) -> str | None:
        """How whoever chooses a request to swap out answers."""
        return getattr(self.request_policy, "mode", self.request_policy and "lru")

    # What must be true.

    @invariant()
    def agrees_with_the_model(self):
        self.manager.check()
        self.model.check_bytes()
        stats, rows = self.manager.stats(), rows_of(self.manager)
        cached = {self.model.block_of(name) for name in self.model.kept}
        held = {block for blocks in rows.values() for block in blocks} | set(self.model.taken)
        assert rows.keys() == self.model.residents().keys()
        assert stats.total_blocks - stats.free_blocks == len(held | cached)
        assert stats.cached_blocks == len(self.model.kept) == len(cached)
        assert stats.evictable_blocks == len(cached - self.model.in_use())
        assert stats.cache_hit_rate == self.num_reused_tokens / max(1, self.num_prompt_tokens)
        assert stats.allocation_failures == self.num_refused
        assert stats.preemption_count == self.num_preempted
        for i, handle in self.manager.list_handles():
            assert handle.num_tokens() == len(self.requests[i].tokens)

    @invariant()
    def pressure_was_told_when_it_changed(self):
        level = self.model.level()
        assert self.told == ([] if level == self.level else [level])
        self.level = level
        self.told.clear()

    # How it is done.

    def id_of(self, data, likely) -> int:
        """Draws one of the likely ids, and sometimes any."""
        is_likely = likely and data.draw(st.sampled_from([True] * 9 + [False]))
        return data.draw(st.sampled_from(sorted(likely) if is_likely else range(8)))

    def is_usable(self, i) -> bool:
        return i in self.requests and bool(self.requests[i].handle) and not self.requests[i].is_away

    def some_ids(self, data, most) -> list[int]:
        """Draws some of the requests on the device that have a handle."""
        ids = [i for i, request in self.model.residents().items() if request.handle]
        some = st.lists(st.sampled_from(ids or [0]), min_size=1, max_size=most, unique=True)
        return data.draw(some) if ids else []

    def some_id(self, data) -> int | None:
        return next(iter(self.some_ids(data, 1)), None)

    def some_tokens(self, data, num_tokens) -> list[int]:
        return data.draw(st.lists(st.integers(1, 2), min_size=num_tokens, max_size=num_tokens))

    def padded(self, handles, counts):
        padding = 2 - len(handles)
        return [*handles, *[None] * padding], np.asarray([*counts, *[0] * padding], np.int32)

    def call(self, name, want, call):
        """Makes a call, which must be refused as foretold, without any effect."""
        event(f"{name}: {want.__name__ if want else 'ok'}")
        before = whole(self.manager) if want else None
        assert refused(call) is want
        assert want is None or whole(self.manager) == before, f"{name} changed something"

    def num_gone(self) -> int:
        stats = self.manager.stats()
        return stats.eviction_count + stats.expiration_count

    def note_preempted(self):
        """Finds out who was swapped out for another's sake."""
        rows = rows_of(self.manager)
        for i, request in self.model.residents().items():
            if i not in rows:
                event("preempted")
                self.model.end([i])
                request.is_away = True
                self.num_preempted += 1

    def after_a_call(self):
        self.note_preempted()
        self.model.learn()

    def read(self, i):
        """Reads a request's bytes as a user would."""
        if not self.requests[i].is_away:
            want = self.requests[i].cells[: len(self.requests[i].tokens)]
            assert tokens_of(self.manager.get_handle(i)) == want

    def write(self, i, num_tokens):
        """Writes the payloads of a request's next tokens."""
        request = self.requests[i]
        begin = self.model.num_written(i)
        end = min(begin + num_tokens, len(request.tokens))
        payloads = self.model.payloads_of(request.salt, request.tokens[:end])[begin:]

        def step(state, seq_ids):
            places = {(int(seq_ids[0]), begin + n): x for n, x in enumerate(payloads)}
            return put(state, places, num_slots=MAX_TOKENS), None

        if payloads:
            self.manager.run(step, [request.handle])
            request.cells[begin:end] = payloads
