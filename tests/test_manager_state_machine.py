"""Random lives of a manager against a dull model of it, every truth checked after every step.

Each token that is written is unique, so a byte that lands in the wrong place is seen. The
model counts blocks by looking at all requests each time, and names each refusal beforehand.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.types import MemoryPressure
from tests.helpers import put
from tests.managers import MAX_TOKENS, Clock, make_manager, refused, tokens_of, whole

BLOCK_SIZE, MAX_BLOCKS, INITIAL_BLOCKS, MAX_SEQS = 3, 12, 3, 5
MAX_ROWS, MAX_NEW = 3, 4  # Rows of a call, and tokens that a step may add to each.
LENGTHS = (12, 9, 15, 7, 3, 14, 0, 2)


@functools.partial(jax.jit, donate_argnums=0)
def extend_inside(state, seq_ids, num_tokens):
    """Lengthens rows without asking the host."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=MAX_NEW)


@dataclasses.dataclass
class Request:
    """What one request should hold."""

    max_sequence_length: int
    handle: fj.KvCacheHandle | None
    last_access: float
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return -(-len(self.tokens) // BLOCK_SIZE)

    def num_new(self, num_tokens: int) -> int:
        return -(-(len(self.tokens) + num_tokens) // BLOCK_SIZE) - self.num_blocks


class ManagerMachine(RuleBasedStateMachine):
    """Every method, in any order, with arguments that are often wrong."""

    def __init__(self, dtype: str, enable_pooling: bool):
        super().__init__()
        self.dtype, self.enable_pooling = dtype, enable_pooling
        self.next_token = 1

    @initialize(lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4))
    def begin(self, lengths):
        self.clock = Clock()
        self.manager = make_manager(
            clock=self.clock,
            geometry={"dtype": self.dtype},
            initial_blocks=INITIAL_BLOCKS,
            enable_pooling=self.enable_pooling,
        )
        self.told = []
        self.manager.set_pressure_callback(self.told.append)
        self.level = MemoryPressure.Low
        self.requests: dict[int, Request] = {}
        self.taken: list[int] = []
        self.num_blocks, self.growth_count = INITIAL_BLOCKS, 0
        self.num_allocated = self.num_refused = 0
        for i, length in enumerate(lengths):
            self.allocate_one(i, length, MAX_TOKENS)
            self.told.clear()
            self.level = self.level_now

    # The model.

    @property
    def level_now(self) -> MemoryPressure:
        share = self.num_used / MAX_BLOCKS
        return MemoryPressure(sum(share >= threshold for threshold in (0.6, 0.8, 0.95)))

    @property
    def num_used(self) -> int:
        return len(self.taken) + sum(request.num_blocks for request in self.requests.values())

    @property
    def num_available(self) -> int:
        return MAX_BLOCKS - self.num_used

    def size_for(self, num_blocks: int) -> int:
        return next(size for size in (3, 6, 12) if size >= num_blocks)

    def grow(self, num_new: int):
        if self.num_used + num_new > self.num_blocks:
            self.num_blocks = self.size_for(self.num_used + num_new)
            self.growth_count += 1

    # What is done.

    @rule(
        data=st.data(),
        length=st.sampled_from(LENGTHS),
        limit=st.sampled_from([15, 15, 15, 15, 8, 16]),
    )
    def allocate(self, data, length, limit):
        self.allocate_one(self.id_of(data, set(range(7)) - self.requests.keys()), length, limit)

    def allocate_one(self, i, length, limit):
        request = self.manager.new_request(i, min(length, limit), limit)
        num_new = -(-request.initial_tokens // BLOCK_SIZE)
        if i in self.requests:
            want = errors.DuplicateRequestError
        elif limit > MAX_TOKENS:
            want = errors.SequenceTooLongError
        elif len(self.requests) == MAX_SEQS:
            want = errors.OutOfRowsError
        else:
            want = errors.OutOfBlocksError if num_new > self.num_available else None
        assert self.manager.can_allocate(request) == (want is None)
        handles = []
        self.call("allocate", want, lambda: handles.append(self.manager.allocate(request)))
        if want:
            self.num_refused += 1
            return
        self.num_allocated += 1
        self.grow(num_new)
        self.requests[i] = Request(limit, handles.pop(), self.clock.now)
        self.write_new({i: request.initial_tokens})

    @rule(data=st.data(), count=st.sampled_from([0, 1, 1, 2, 4, 6, 8, 9]))
    def extend_all(self, data, count):
        requests = {i: self.requests[i] for i in self.some_ids(data)}
        num_new = sum(request.num_new(count) for request in requests.values())
        if any(len(r.tokens) + count > r.max_sequence_length for r in requests.values()):
            want = errors.SequenceTooLongError
        else:
            want = errors.OutOfBlocksError if num_new > self.num_available else None
        if len(requests) == 1:
            (only,) = requests.values()
            self.call("extend", want, lambda: self.manager.extend(only.handle, count))
        else:
            handles = [request.handle for request in requests.values()]
            self.call("extend_all", want, lambda: self.manager.extend_all(handles, count))
        if want is None:
            self.grow(num_new)
            self.write_new(dict.fromkeys(requests, count))

    @rule(data=st.data())
    def extend_in_a_step(self, data):
        counts = {i: data.draw(st.integers(0, MAX_NEW)) for i in self.some_ids(data)}
        num_new = sum(self.requests[i].num_new(count) for i, count in counts.items())
        fits = all(len(self.requests[i].tokens) + n <= MAX_TOKENS for i, n in counts.items())
        padding = MAX_ROWS - len(counts)
        handles = [*[self.handle(i) for i in counts], *[None] * padding]
        args = (np.asarray([*counts.values(), *[0] * padding], np.int32),)
        ok = bool(self.manager.run(extend_inside, handles, *args, extends=True))
        event(f"extend in a step: {'ok' if ok else 'no room'}")
        assert ok == (fits and num_new <= self.num_blocks - self.num_used)
        self.touch(counts)
        if ok:
            self.write_new(counts)

    @rule(data=st.data())
    def deallocate(self, data):
        i = self.id_of(data, self.requests)
        want = None if i in self.requests else errors.UnknownRequestError
        handle = self.handle(i)
        self.call("deallocate", want, lambda: self.manager.deallocate(i))
        if want is None:
            del self.requests[i]
            assert handle is None or refused(handle.num_tokens) is errors.InvalidHandleError

    @rule(data=st.data())
    def drop_handle(self, data):
        i = self.id_of(data, self.requests)
        if i in self.requests:
            self.requests[i].handle = None

    @rule(data=st.data(), is_clone=st.booleans())
    def get_handle(self, data, is_clone):
        i = self.id_of(data, self.requests)
        handle = self.manager.get_handle(i)
        assert (handle is None) == (i not in self.requests)
        if handle is not None:
            self.requests[i].handle = handle.clone_handle() if is_clone else handle

    @rule()
    def gc(self):
        gone = [i for i, request in self.requests.items() if request.handle is None]
        num_blocks = sum(self.requests.pop(i).num_blocks for i in gone)
        got = self.manager.gc()
        pool = self.manager.run(lambda state, _: (state, state.pool), [])
        block_bytes = 2 * pool.k[0].nbytes
        assert (got.caches_freed, got.memory_freed) == (len(gone), num_blocks * block_bytes)
        if not self.enable_pooling:
            lowest = max(self.num_used, max(self.taken, default=-1) + 1)
            self.num_blocks = min(self.num_blocks, self.size_for(lowest))

    @rule(count=st.integers(0, 4))
    def allocate_blocks(self, count):
        want = errors.OutOfBlocksError if count > self.num_available else None
        blocks = []
        self.call(
            "allocate_blocks", want, lambda: blocks.extend(self.manager.allocate_blocks(count))
        )
        if want is None:
            self.grow(count)
            assert len(set(blocks)) == count and not set(blocks) & set(self.taken)
            self.taken += blocks

    @rule(data=st.data())
    def free_blocks(self, data):
        blocks = data.draw(st.lists(st.sampled_from(self.taken or [0]), unique=True))
        blocks = [block for block in blocks if block in self.taken]
        self.manager.free_blocks(blocks)
        self.taken = [block for block in self.taken if block not in blocks]

    @rule(blocks=st.lists(st.integers(-1, MAX_BLOCKS), min_size=1, max_size=3))
    def free_any_blocks(self, blocks):
        held = {b for _, h in self.manager.list_handles() for b in h.block_table().physical_blocks}
        first = next((block for block in blocks if block not in self.taken), None)
        if len(set(blocks)) < len(blocks):
            want = errors.DoubleFreeError
        elif first is None:
            want = None
            self.taken = [block for block in self.taken if block not in blocks]
        else:
            is_free = 0 <= first < self.num_blocks and first not in held
            want = errors.DoubleFreeError if is_free else errors.ForeignBlockError
        self.call("free_blocks", want, lambda: self.manager.free_blocks(blocks))

    @rule()
    def defragment(self):
        self.manager.defragment()
        held = {b for _, h in self.manager.list_handles() for b in h.block_table().physical_blocks}
        homes = [i for i in range(self.num_blocks) if i not in self.taken]
        assert held == set(homes[: len(held)])

    @rule(data=st.data())
    def rewrite(self, data):
        i = self.id_of(data, self.requests)
        if self.handle(i) and self.requests[i].tokens:
            length = len(self.requests[i].tokens)
            self.write({i: [data.draw(st.integers(0, length - 1))]})

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds):
        self.clock.now += seconds

    # What must be true.

    @invariant()
    def agrees_with_the_model(self):
        self.manager.check()
        handles = dict(self.manager.list_handles())
        assert list(handles) == list(self.requests)
        for i, request in self.requests.items():
            assert tokens_of(handles[i]) == request.tokens
            stats = handles[i].stats()
            assert stats.blocks_allocated == request.num_blocks
            assert (stats.tokens_stored, stats.last_access) == (
                len(request.tokens),
                request.last_access,
            )
        stats = self.manager.stats()
        assert (stats.total_blocks, stats.growth_count) == (self.num_blocks, self.growth_count)
        assert stats.free_blocks == self.manager.free_block_count()
        assert stats.free_blocks == self.num_blocks - self.num_used
        assert stats.active_caches == len(self.requests)
        assert stats.allocation_count == self.num_allocated
        assert stats.allocation_failures == self.num_refused

    @invariant()
    def pressure_was_told_when_it_changed(self):
        assert self.told == ([] if self.level_now == self.level else [self.level_now])
        self.level = self.level_now
        self.told.clear()

    # How it is done.

    def id_of(self, data, likely) -> int:
        """Draws one of the likely ids, and sometimes any."""
        is_likely = likely and data.draw(st.integers(0, 9)) < 9
        return data.draw(st.sampled_from(sorted(likely) if is_likely else range(7)))

    def some_ids(self, data) -> list[int]:
        """Draws some of the requests that have a handle."""
        ids = [i for i in self.requests if self.handle(i)]
        some = st.lists(st.sampled_from(ids or [0]), min_size=1, max_size=MAX_ROWS, unique=True)
        return data.draw(some) if ids else []

    def handle(self, i) -> fj.KvCacheHandle | None:
        return self.requests[i].handle if i in self.requests else None

    def call(self, name, want, call):
        """Makes a call, which must be refused as foretold, without any effect."""
        event(f"{name}: {want.__name__ if want else 'ok'}")
        before = whole(self.manager) if want else None
        assert refused(call) is want
        assert want is None or whole(self.manager) == before, (
            f"{name} failed, yet changed something"
        )

    def touch(self, ids):
        for i in ids:
            self.requests[i].last_access = self.clock.now

    def write_new(self, counts):
        """Writes the tokens for which there is room now."""
        places = {}
        for i, count in counts.items():
            length = len(self.requests[i].tokens)
            self.requests[i].tokens += [0] * count
            places[i] = range(length, length + count)
        self.write(places)

    def write(self, places):
        """Writes a new token at each of some positions of each of some requests."""
        self.touch(places)
        writes = {}
        for row, (i, positions) in enumerate(places.items()):
            for position in positions:
                self.requests[i].tokens[position] = writes[row, position] = self.next_token
                self.next_token += 1

        def step(state, seq_ids):
            by_row = {(int(seq_ids[row]), p): token for (row, p), token in writes.items()}
            return put(state, by_row, num_slots=MAX_ROWS * MAX_TOKENS), None

        handles = [self.handle(i) for i in places]
        self.manager.run(step, [*handles, None])


@pytest.mark.parametrize("enable_pooling", [True, False], ids=["pooling", "shrinking"])
def test_random_lives_agree_with_the_model(enable_pooling):
    dtype = "bfloat16" if enable_pooling else "float32"
    examples = max(1, settings.default.max_examples // 12)
    run_state_machine_as_test(
        functools.partial(ManagerMachine, dtype, enable_pooling),
        settings=settings(settings.default, max_examples=examples, stateful_step_count=50),
    )
