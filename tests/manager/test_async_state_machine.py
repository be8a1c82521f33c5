"""Random async calls, on one device and on two, beside a simple model of the queue.

After each step the model knows which calls must have been served and on which device, which must
have been refused and why, and which still wait.
"""

import asyncio
import dataclasses
import functools
from fractions import Fraction

import jax
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ferrum_jax import errors
from ferrum_jax.manager import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.event_loops import SteppedLoop, make_async, settle
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, Clock
from tests.support.multi_device import CPU, make_multi

AGEING_SECONDS = 10
PRIORITIES = st.sampled_from(Priority)


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclasses.dataclass(eq=False)
class Request:
    """One live request as the model knows it."""

    handle: object
    device: int
    num_tokens: int
    priority: Priority


@dataclasses.dataclass(eq=False)
class Call:
    """One call that may have to wait: for a new request, more tokens of some, or blocks."""

    task: asyncio.Task
    arrival: int
    priority: Priority
    number: int
    name: int | None = None  # Of the new request.
    device: int = 0  # The device that it names.
    extends: tuple[int, ...] = ()
    count: int = 0  # Tokens; blocks for `allocate_blocks`.


class QueueMachine(RuleBasedStateMachine):
    """Async calls on a manager, in any order."""

    def __init__(self, num_devices: int):
        super().__init__()
        self.devices = range(num_devices)
        self.max_blocks, self.max_seqs = (5, 4) if num_devices == 1 else (4, 3)  # Of a device.

    @initialize()
    def begin(self):
        self.runner = asyncio.Runner(loop_factory=SteppedLoop)
        self.clock, self.number = Clock(), 0
        options = {"ageing_seconds": AGEING_SECONDS, "clock": self.clock}
        sizes = {"max_blocks": self.max_blocks, "max_seqs": self.max_seqs}
        if len(self.devices) == 1:
            self.manager = make_async(**sizes, **options)
        else:
            geometry = {"max_seqs": sizes.pop("max_seqs")}
            self.manager = AsyncKvCacheManager(make_multi(2, geometry=geometry, **sizes), **options)
        self.requests: dict[int, Request] = {}
        self.taken: list[list[int]] = []
        self.queue: list[Call] = []

    def teardown(self):
        if hasattr(self, "runner"):
            self.runner.close()

    # Calls.

    @rule(count=st.integers(0, 7), priority=PRIORITIES, data=st.data())
    def allocate(self, count, priority, data):
        name, device = self.number, data.draw(st.sampled_from(self.devices))
        where = {"device": CPU[device]} if len(self.devices) > 1 else {}
        request = self.manager.new_request(name, count, priority=priority, **where)
        is_first = self.manager.can_allocate(request)
        call = self.manager.allocate(request)
        self.arrive(call, priority, name=name, count=count, device=device)
        assert is_first == (name in self.requests)

    @precondition(lambda self: len(self.devices) == 1)
    @rule(count=st.integers(0, 2), priority=PRIORITIES)
    def allocate_blocks(self, count, priority):
        call = self.manager.allocate_blocks(count, priority=priority)
        self.arrive(call, priority, count=count)

    @rule()
    def free_blocks(self):
        if self.taken:
            self.settle(self.manager.free_blocks(self.taken.pop()))
            self.serve()

    @rule(data=st.data(), count=st.sampled_from([0, 1, 2, 3, 3, 4, 6, 9]))
    def extend(self, data, count):
        if self.requests:
            names = st.sampled_from(sorted(self.requests))
            names = data.draw(st.lists(names, min_size=1, max_size=2, unique=True))
            self.extend_now(names, count)

    @rule(count=st.integers(1, 6), backwards=st.booleans())
    def extend_each(self, count, backwards):
        """Every request waits for more tokens, unless there is room."""
        waiting = {name for call in self.queue for name in call.extends}
        for name in sorted(self.requests.keys() - waiting, reverse=backwards):
            self.extend_now([name], count)

    def extend_now(self, names, count):
        requests = [self.requests[name] for name in names]
        call = self.manager.extend_all([request.handle for request in requests], count)
        priority = max(request.priority for request in requests)
        self.arrive(call, priority, extends=tuple(names), count=count)

    @rule(data=st.data())
    def deallocate(self, data):
        if self.requests:
            name = data.draw(st.sampled_from(sorted(self.requests)))
            self.settle(self.manager.deallocate(name))
            del self.requests[name]
            self.serve()

    @precondition(lambda self: len(self.devices) == 2)
    @rule(data=st.data())
    def move_cache(self, data):
        if self.requests:
            name = data.draw(st.sampled_from(sorted(self.requests)))
            request = self.requests[name]
            num_blocks, target = blocks_for(request.num_tokens), 1 - request.device
            if num_blocks <= self.num_free(target) and self.num_rows(target) < self.max_seqs:
                self.settle(self.manager.move_cache(name, CPU[target]))
                request.device = target
                self.serve()
                event("moves")

    @rule(data=st.data())
    def cancel(self, data):
        if self.queue:
            call = data.draw(st.sampled_from(self.queue))
            call.task.cancel()
            self.settle()
            assert call.task.cancelled()
            self.queue.remove(call)
            self.serve()

    @rule(seconds=st.integers(1, 15))
    def pass_time(self, seconds):
        self.clock.now += seconds

    # The model.

    def settle(self, call=None):
        async def go_on():
            if call is not None:
                await call
            await settle(60)

        self.runner.run(go_on())

    def arrive(self, coroutine, priority, **what):
        async def begin():
            return asyncio.ensure_future(coroutine)

        call = Call(self.runner.run(begin()), self.clock.now, priority, self.number, **what)
        self.number += 1
        self.settle()
        self.queue.append(call)
        if call.extends and (self.error_of(call) or not self.num_needed(call)):
            self.try_to_serve(call, self.devices)
        self.serve()
        event("waits" if call in self.queue else "does not wait")

    def serve(self):
        """Serves or refuses calls until all others must wait."""
        while self.serve_one():
            pass

    def serve_one(self) -> bool:
        self.queue.sort(key=self.place)
        for call in self.queue:
            if not set(call.extends) <= self.requests.keys() or self.is_apart(call):
                return self.try_to_serve(call, self.devices)
        claimed: set[int] = set()
        for call in self.queue:
            if self.try_to_serve(call, [d for d in self.devices_of(call) if d not in claimed]):
                return True
            claimed.update(self.devices_of(call))
        return any(self.refuse_if_stalled(device) for device in self.devices)

    def refuse_if_stalled(self, device: int) -> bool:
        here = {name for name, request in self.requests.items() if request.device == device}
        extending = [call for call in self.queue if call.extends and call.extends[0] in here]
        holders = {name for name in here if self.requests[name].num_tokens}
        if not extending or not holders <= {name for call in extending for name in call.extends}:
            return False
        useful = [call for call in extending if holders & set(call.extends)]
        self.end_call((useful or extending)[-1], errors.OutOfBlocksError)
        event("all of a device wait")
        return True

    def place(self, call: Call):
        urgency = call.priority + Fraction(self.clock.now - call.arrival) / AGEING_SECONDS
        return not call.extends, -urgency, call.number

    def devices_of(self, call: Call) -> list[int]:
        if call.extends:
            return [self.requests[call.extends[0]].device]
        return [call.device, *(device for device in self.devices if device != call.device)]

    def try_to_serve(self, call: Call, devices) -> bool:
        """Serves or refuses a call, unless it has to wait."""
        if error := self.error_of(call):
            self.end_call(call, error)
            return True
        fitting = [d for d in devices if self.num_needed(call) <= self.num_free(d)]
        if call.name is not None:
            fitting = [d for d in fitting if self.num_rows(d) < self.max_seqs]
        if not fitting:
            return False
        if call.extends:
            for name in call.extends:
                self.requests[name].num_tokens += call.count
        elif call.name is not None:
            new = Request(call.task.result(), fitting[0], call.count, call.priority)
            self.requests[call.name] = new
            event("goes where it asked" if new.device == call.device else "goes elsewhere")
        else:
            self.taken.append(call.task.result())
        self.end_call(call, None)
        return True

    def error_of(self, call: Call) -> type[Exception] | None:
        if not set(call.extends) <= self.requests.keys():
            return errors.InvalidHandleError
        if self.is_apart(call):
            return errors.GeometryMismatchError
        held = [self.requests[name].num_tokens for name in call.extends]
        is_too_long = any(tokens + call.count > MAX_TOKENS for tokens in held)
        return errors.SequenceTooLongError if is_too_long else None

    def is_apart(self, call: Call) -> bool:
        return len({self.requests[name].device for name in call.extends}) > 1

    def num_needed(self, call: Call) -> int:
        if not call.extends:
            return call.count if call.name is None else blocks_for(call.count)
        held = [self.requests[name].num_tokens for name in call.extends]
        return sum(blocks_for(tokens + call.count) - blocks_for(tokens) for tokens in held)

    def num_free(self, device: int) -> int:
        here = [r.num_tokens for r in self.requests.values() if r.device == device]
        return self.max_blocks - sum(map(blocks_for, here)) - sum(map(len, self.taken))

    def num_rows(self, device: int) -> int:
        return sum(request.device == device for request in self.requests.values())

    def end_call(self, call: Call, error: type[Exception] | None):
        self.queue.remove(call)
        assert call.task.done()
        assert type(call.task.exception()) is (type(None) if error is None else error)

    @invariant()
    def the_same_calls_wait(self):
        if hasattr(self, "runner"):
            assert not any(call.task.done() for call in self.queue)
            assert self.manager.num_waiting == len(self.queue)

    @invariant()
    def the_same_is_held(self):
        if hasattr(self, "runner"):
            self.manager.manager.check()
            live = {name: handle for name, handle in self.manager.list_handles()}
            assert live.keys() == self.requests.keys()
            for name, handle in live.items():
                request = self.requests[name]
                assert handle.num_tokens() == request.num_tokens
                assert handle.device() == CPU[request.device]
            free = sum(map(self.num_free, self.devices))
            assert self.manager.stats().free_blocks == free


@pytest.mark.parametrize("num_devices", [1, 2])
def test_allocate_extend_and_cancel_are_served_as_a_model_of_the_queue_says(num_devices):
    if len(jax.devices("cpu")) < num_devices:
        pytest.skip("needs two CPU devices")
    run_state_machine_as_test(
        functools.partial(QueueMachine, num_devices),
        settings=settings(max_examples=(150, 100)[num_devices - 1], stateful_step_count=30),
    )
