"""Threads that use a multi-device manager at the same time."""

import threading

from ferrum_jax.errors import DuplicateRequestError, FerrumError, UnknownRequestError
from tests.support.managers import start, tokens_of, write_tokens
from tests.support.multi_device import CPU, begin, make_multi, tokens_for, used, where
from tests.support.threads import PATIENCE_SECONDS, run_together


def test_a_long_run_on_one_device_does_not_delay_another_device():
    manager = make_multi(2)
    a, b = begin(manager, "a", 3, CPU[0]), begin(manager, "b", 3, CPU[1])
    has_begun, may_end = threading.Event(), threading.Event()

    def long_step(state, seq_ids):
        has_begun.set()
        assert may_end.wait(PATIENCE_SECONDS)
        return state, None

    def meanwhile():
        assert has_begun.wait(PATIENCE_SECONDS)
        manager.extend(b, 2)
        write_tokens(manager, b, [7, 8], begin=3)
        assert tokens_of(manager.get_handle("b")) == [*tokens_for("b", 3), 7, 8]
        manager.deallocate("b")
        may_end.set()

    run_together([lambda: manager.run(long_step, [a]), meanwhile])
    manager.check()


def test_threads_may_use_requests_while_move_cache_moves_them():
    manager = make_multi(3, geometry={"max_seqs": 8}, max_blocks=12)
    names, finished = ["a", "b", "c"], threading.Event()

    def live(name):
        try:
            for _ in range(2):
                handle = begin(manager, name, 5)
                for length in range(5, 10):
                    manager.extend(handle, 1)
                    write_tokens(manager, handle, [60_000 + length], begin=length)
                    want = [*tokens_for(name, 5), *range(60_005, 60_001 + length)]
                    assert tokens_of(handle)[:length] == want[:length]
                    assert manager.get_cache_device(name) in CPU
                    assert handle.stats().tokens_stored == handle.num_tokens() == length + 1
                manager.deallocate(name)
        finally:
            finished.set()

    def move():
        for turn in range(10_000):
            if finished.is_set():
                return
            try:
                manager.move_cache(names[turn % 3], CPU[turn // 3 % 3])
            except UnknownRequestError:
                pass
            if turn % 50 == 0:
                manager.rebalance_devices(0.3)

    run_together([move, *(lambda name=name: live(name) for name in names)])
    assert where(manager) == {} and used(manager) == [0, 0, 0]
    manager.check()


def test_allocate_of_one_id_in_several_threads_succeeds_once():
    manager, winners = make_multi(3), []

    def want(device):
        try:
            winners.append(start(manager, "a", 3, device=device))
        except FerrumError as error:
            assert isinstance(error, DuplicateRequestError)

    run_together([lambda device=device: want(device) for device in CPU[:3]])
    assert len(winners) == 1
