"""Random calls on the async manager over two devices, beside a model that looks at all of them.

After each step the model knows which calls must have been served and on which device, which must
have been refused and why, and which still wait.
"""

import asyncio
import dataclasses
from fractions import Fraction

import jax
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

from ferrum_jax import errors
from ferrum_jax.manager import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.event_loops import SteppedLoop, settle
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, Clock
from tests.support.multi_device import CPU, make_multi

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 2, reason="needs two CPU devices")

DEVICES = range(2)
MAX_BLOCKS, MAX_SEQS, AGEING_SECONDS = 4, 3, 10  # Of each device.


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
    """One call that may have to wait: for a new request, or for more tokens of some."""

    task: asyncio.Task
    arrival: int
    priority: Priority
    number: int
    device: int = 0  # The device that a new request names.
    name: int | None = None  # Of the new request.
    extends: tuple[int, ...] = ()
    num_tokens: int = 0


class TwoDevices(RuleBasedStateMachine):
    """Whatever tasks do with a manager of two devices, in any order."""

    @initialize()
    def begin(self):
        self.runner = asyncio.Runner(loop_factory=SteppedLoop)
        self.clock, self.number = Clock(), 0
        self.manager = AsyncKvCacheManager(
            make_multi(2, max_blocks=MAX_BLOCKS, geometry={"max_seqs": MAX_SEQS}),
            ageing_seconds=AGEING_SECONDS,
            clock=self.clock,
        )
        self.requests: dict[int, Request] = {}
        self.queue: list[Call] = []

    def teardown(self):
        if hasattr(self, "runner"):
            self.runner.close()

    # Calls.

    @rule(
        num_tokens=st.integers(0, 7),
        priority=st.sampled_from(Priority),
        device=st.sampled_from(DEVICES),
    )
    def allocate(self, num_tokens, priority, device):
        name = self.number
        request = self.manager.new_request(name, num_tokens, priority=priority, device=CPU[device])
        call = self.manager.allocate(request)
        self.arrive(call, priority, name=name, num_tokens=num_tokens, device=device)

    @rule(data=st.data(), num_tokens=st.sampled_from([0, 1, 2, 3, 3, 4, 6, 9]))
    def extend(self, data, num_tokens):
        if self.requests:
            names = st.sampled_from(sorted(self.requests))
            names = data.draw(st.lists(names, min_size=1, max_size=2, unique=True))
            self.extend_now(names, num_tokens)

    @rule(num_tokens=st.integers(1, 6), backwards=st.booleans())
    def extend_each(self, num_tokens, backwards):
        """Every request waits for more tokens, unless there is room."""
        waiting = {name for call in self.queue for name in call.extends}
        for name in sorted(self.requests.keys() - waiting, reverse=backwards):
            self.extend_now([name], num_tokens)

    def extend_now(self, names, num_tokens):
        requests = [self.requests[name] for name in names]
        call = self.manager.extend_all([request.handle for request in requests], num_tokens)
        priority = max(request.priority for request in requests)
        self.arrive(call, priority, extends=tuple(names), num_tokens=num_tokens)

    @rule(data=st.data())
    def deallocate(self, data):
        if self.requests:
            name = data.draw(st.sampled_from(sorted(self.requests)))
            self.settle(self.manager.deallocate(name))
            del self.requests[name]
            self.serve()

    @rule(data=st.data())
    def move_cache(self, data):
        if self.requests:
            name = data.draw(st.sampled_from(sorted(self.requests)))
            request = self.requests[name]
            num_blocks, target = blocks_for(request.num_tokens), 1 - request.device
            if num_blocks <= self.num_free(target) and self.num_rows(target) < MAX_SEQS:
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
            self.try_to_serve(call, DEVICES)
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
                return self.try_to_serve(call, DEVICES)
        claimed: set[int] = set()
        for call in self.queue:
            if self.try_to_serve(call, [d for d in self.devices_of(call) if d not in claimed]):
                return True
            claimed.update(self.devices_of(call))
        return any(self.refuse_if_stalled(device) for device in DEVICES)

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
        return [call.device, 1 - call.device]

    def try_to_serve(self, call: Call, devices) -> bool:
        """Serves or refuses a call, unless it has to wait."""
        if error := self.error_of(call):
            self.end_call(call, error)
            return True
        if call.extends:
            (home,) = self.devices_of(call)
            if home not in devices or self.num_needed(call) > self.num_free(home):
                return False
            for name in call.extends:
                self.requests[name].num_tokens += call.num_tokens
        else:
            num_blocks = blocks_for(call.num_tokens)
            fitting = (d for d in devices if num_blocks <= self.num_free(d))
            device = next((d for d in fitting if self.num_rows(d) < MAX_SEQS), None)
            if device is None:
                return False
            self.requests[call.name] = Request(
                call.task.result(), device, call.num_tokens, call.priority
            )
            event("goes to the other device" if device != call.device else "goes where it asked")
        self.end_call(call, None)
        return True

    def error_of(self, call: Call) -> type[Exception] | None:
        if not set(call.extends) <= self.requests.keys():
            return errors.InvalidHandleError
        if self.is_apart(call):
            return errors.GeometryMismatchError
        held = [self.requests[name].num_tokens for name in call.extends]
        is_too_long = any(tokens + call.num_tokens > MAX_TOKENS for tokens in held)
        return errors.SequenceTooLongError if is_too_long else None

    def is_apart(self, call: Call) -> bool:
        return len({self.requests[name].device for name in call.extends}) > 1

    def num_needed(self, call: Call) -> int:
        held = [self.requests[name].num_tokens for name in call.extends]
        return sum(blocks_for(tokens + call.num_tokens) - blocks_for(tokens) for tokens in held)

    def num_free(self, device: int) -> int:
        here = [r.num_tokens for r in self.requests.values() if r.device == device]
        return MAX_BLOCKS - sum(map(blocks_for, here))

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
                assert self.manager.get_cache_device(name) == CPU[request.device]


def test_calls_that_wait_on_two_devices_are_served_as_the_model_says():
    run_state_machine_as_test(
        TwoDevices, settings=settings(max_examples=100, stateful_step_count=30)
    )
