"""Many threads on one manager: no update is lost, no data is mixed up, no call hangs."""

import functools
import sys
import threading

import numpy as np
import pytest

from ferrum_jax import errors
from tests.support.managers import make_manager, refused, start, write_tokens
from tests.support.threads import run_together


@pytest.fixture(autouse=True)
def hurried_switches():
    """Makes threads switch as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def manager():
    return make_manager(initial_blocks=6, geometry={"max_seqs": 8})


def test_key_cache_never_shows_half_a_step_of_run(manager):
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


def test_pressure_callbacks_that_call_gc_from_many_threads_do_not_deadlock(manager):
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


def test_each_id_is_allocated_and_deallocated_by_one_of_many_threads(manager):
    handles = []
    for call, error in (
        (lambda i: handles.append(start(manager, i, 1)), errors.DuplicateRequestError),
        (manager.deallocate, errors.UnknownRequestError),
    ):
        compete = functools.partial(lambda call: [refused(call, i) for i in range(8)], call)
        results = run_together([compete] * 4)
        assert [sum(result[i] is None for result in results) for i in range(8)] == [1] * 8
        assert set().union(*results) - {None} == {error}
        manager.check()
    assert not any(handle.is_valid() for handle in handles)
    assert manager.free_block_count() == manager.total_block_count()
