"""Many threads on one manager: nothing is lost, nothing is mixed up, nobody waits for ever."""

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from ferrum_jax.errors import (
    DuplicateRequestError,
    FerrumError,
    OutOfBlocksError,
    OutOfRowsError,
    UnknownRequestError,
)
from tests.support.managers import MAX_TOKENS, make_manager, refused, start, tokens_of, write_tokens

PATIENCE_SECONDS = 120  # Far beyond what any test here takes: only a deadlock reaches it.


@pytest.fixture(autouse=True)
def hurried_switches():
    """Lets threads take turns as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def manager():
    return make_manager(initial_blocks=6, geometry={"max_seqs": 8})


def run_together(jobs: Iterable[Callable[[], object]]) -> list:
    """Runs each job in a thread of its own, and returns their results in order."""
    jobs = list(jobs)
    results, failures, barrier = [None] * len(jobs), [], threading.Barrier(len(jobs))

    def work(i):
        try:
            barrier.wait(PATIENCE_SECONDS)
            results[i] = jobs[i]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if failures:
        raise failures[0]
    return results


class Client:
    """One thread's requests: it knows every token that it wrote."""

    def __init__(self, manager, number: int, num_steps: int):
        self.manager, self.number, self.num_steps = manager, number, num_steps
        self.random = random.Random(number)
        self.handles, self.tokens, self.blocks = {}, {}, []
        self.num_allocated = self.num_dropped = self.num_refused = self.num_collected = 0

    def __call__(self) -> "Client":
        actions = [
            *[self.allocate] * 3,
            *[self.extend] * 3,
            self.deallocate,
            self.drop,
            self.collect,
            self.read,
            self.take_blocks,
            self.free_blocks,
            self.manager.defragment,
            self.manager.stats,
        ]
        for _ in range(self.num_steps):
            self.random.choice(actions)()
        return self

    def allocate(self):
        request_id = (self.number, self.random.randrange(3))
        if request_id in self.handles:
            request = self.manager.new_request(request_id, 1)
            assert refused(self.manager.allocate, request) is DuplicateRequestError
            self.num_refused += 1
            return
        try:
            handle = start(self.manager, request_id, self.random.randrange(8))
        except (OutOfBlocksError, OutOfRowsError, DuplicateRequestError):
            self.num_refused += 1  # A duplicate: dropped, and not yet collected.
            return
        self.handles[request_id], self.tokens[request_id] = handle, []
        self.num_allocated += 1
        self.write(request_id, handle.num_tokens())

    def extend(self):
        for request_id, handle in self.handles.items():
            count = self.random.randrange(4)
            if len(self.tokens[request_id]) + count > MAX_TOKENS:
                continue
            if refused(self.manager.extend, handle, count) is None:
                self.write(request_id, count)

    def deallocate(self):
        if self.handles:
            request_id = self.random.choice(list(self.handles))
            self.manager.deallocate(request_id)
            assert not self.handles.pop(request_id).is_valid()

    def drop(self):
        if self.handles:
            self.handles.popitem()
            self.num_dropped += 1

    def collect(self):
        self.num_collected += self.manager.gc().caches_freed

    def read(self):
        for request_id, handle in self.handles.items():
            assert handle.num_tokens() == len(self.tokens[request_id])
            assert tokens_of(handle) == self.tokens[request_id]

    def write(self, request_id, count: int):
        tokens = [self.random.randrange(1, 60_000) for _ in range(count)]
        begin = len(self.tokens[request_id])
        if tokens:
            write_tokens(self.manager, self.handles[request_id], tokens, begin)
        self.tokens[request_id] = self.tokens[request_id] + tokens

    def take_blocks(self):
        if len(self.blocks) < 2:
            with contextlib.suppress(OutOfBlocksError):
                self.blocks += self.manager.allocate_blocks(1)

    def free_blocks(self):
        self.manager.free_blocks(self.blocks)
        self.blocks = []


@pytest.mark.parametrize("enable_pooling", [True, False], ids=["pooling", "shrinking"])
def test_nothing_is_lost_when_many_threads_work_at_once(enable_pooling):
    manager = make_manager(
        initial_blocks=6, enable_pooling=enable_pooling, geometry={"max_seqs": 8}
    )
    told = []

    def call_back(level):
        told.append(level)
        assert manager.stats().total_blocks <= 12
        manager.get_handle((0, 0))

    manager.set_pressure_callback(call_back)
    clients = run_together(Client(manager, number, num_steps=120) for number in range(4))
    manager.check()
    for client in clients:
        client.read()
    clients[0].collect()
    manager.check()

    stats, live = manager.stats(), {}
    for client in clients:
        live |= client.handles
    assert dict(manager.list_handles()).keys() == live.keys()
    assert stats.active_caches == len(live)
    assert stats.allocation_count == sum(client.num_allocated for client in clients)
    assert stats.allocation_failures == sum(client.num_refused for client in clients)
    assert sum(c.num_collected for c in clients) == sum(c.num_dropped for c in clients) > 0
    held = sum(handle.block_table().num_blocks() for handle in live.values())
    taken = [block for client in clients for block in client.blocks]
    assert len(set(taken)) == len(taken)
    assert stats.free_blocks == stats.total_blocks - held - len(taken)
    assert told and stats.growth_count > 0

    for request_id in live:
        manager.deallocate(request_id)
    manager.free_blocks(taken)
    manager.check()
    assert manager.free_block_count() == manager.total_block_count()


def test_one_of_many_wins_an_id(manager):
    handles = []

    def compete():
        return [refused(lambda i=i: handles.append(start(manager, i, 1))) for i in range(8)]

    results = run_together([compete] * 4)
    assert [sum(result[i] is None for result in results) for i in range(8)] == [1] * 8
    assert sorted(handle.request_id for handle in handles) == list(range(8))
    assert {error for result in results for error in result if error} == {DuplicateRequestError}
    manager.check()


def test_one_of_many_ends_a_request(manager):
    handles = [start(manager, i, 2) for i in range(6)]

    def compete():
        return [refused(manager.deallocate, i) for i in range(6)]

    results = run_together([compete] * 4)
    wins = [sum(result[i] is None for result in results) for i in range(6)]
    assert wins == [1] * 6
    assert {error for result in results for error in result if error} == {UnknownRequestError}
    assert not any(handle.is_valid() for handle in handles)
    assert manager.free_block_count() == 6
    manager.check()


def test_the_last_blocks_are_not_given_out_twice(manager):
    def compete():
        blocks = []
        while True:
            try:
                blocks += manager.allocate_blocks(1)
            except FerrumError:
                return blocks

    taken = [block for blocks in run_together([compete] * 4) for block in blocks]
    assert sorted(taken) == list(range(12))
    manager.check()


def test_reading_and_writing_at_once_never_shows_half_a_step(manager):
    handle = start(manager, "a", 6)
    write_tokens(manager, handle, [1] * 6)
    stop = threading.Event()

    def write():
        for token in range(2, 40):
            write_tokens(manager, handle, [token] * 6)
        stop.set()

    def read():
        seen = set()
        while not stop.is_set():
            keys = np.asarray(handle.key_cache(0))[:, 0, 0]
            seen.add(tuple(keys.tolist()))
        return seen

    _, *seen = run_together([write, read, read])
    assert all(len(set(keys)) == 1 for keys in set.union(*seen))


def test_callbacks_that_change_the_level_from_many_threads_do_not_deadlock(manager):
    told = []

    def relieve(level):
        told.append(level)
        manager.gc()

    manager.set_pressure_callback(relieve)

    def work(number):
        for i in range(15):
            refused(manager.allocate, manager.new_request((number, i), 9))

    run_together([lambda number=number: work(number) for number in range(4)])
    assert told
    manager.gc()
    assert manager.free_block_count() == manager.total_block_count()
    manager.check()
