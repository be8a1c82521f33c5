"""Random async calls against a simple model of the queue.

After every step, the model knows which calls are served, which are refused and why, and which
still wait.
"""

import asyncio
import dataclasses
from fractions import Fraction

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
from ferrum_jax.types import Priority
from tests.support.event_loops import SteppedLoop, make_async, settle
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, Clock

MAX_BLOCKS, MAX_SEQS, AGEING_SECONDS = 5, 4, 10
PRIORITIES = st.sampled_from(Priority)


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclasses.dataclass(eq=False)
class Call:
    """One call of `allocate`, `extend_all` or `allocate_blocks` that may have to wait."""

    task: asyncio.Task
    came: float
    priority: Priority
    number: int
    name: int | None = None  # The new request.
    extends: tuple[int, ...] = ()  # The requests to extend.
    count: int = 0  # Tokens; blocks for `allocate_blocks`.


class QueueMachine(RuleBasedStateMachine):
    """Async calls on one manager, in any order."""

    @initialize()
    def begin(self):
        self.runner = asyncio.Runner(loop_factory=SteppedLoop)
        self.clock, self.number = Clock(), 0
        self.manager = make_async(
            clock=self.clock,
            ageing_seconds=AGEING_SECONDS,
            max_blocks=MAX_BLOCKS,
            max_seqs=MAX_SEQS,
        )
        self.tokens: dict[int, int] = {}  # Of each live request.
        self.priorities: dict[int, Priority] = {}
        self.handles = {}
        self.taken: list[list[int]] = []
        self.num_taken = 0
        self.queue: list[Call] = []
        self.outcomes: list[tuple[Call, type[Exception] | None]] = []

    def teardown(self):
        if hasattr(self, "runner"):
            self.runner.close()

    # Calls.

    @rule(count=st.integers(0, 7), priority=PRIORITIES)
    def allocate(self, count, priority):
        name = self.number
        request = self.manager.new_request(name, count, priority=priority)
        is_first = self.manager.can_allocate(request)
        self.begin_call(self.manager.allocate(request), priority, name=name, count=count)
        assert is_first == (name in self.tokens)

    @rule(data=st.data(), count=st.sampled_from([0, 1, 2, 3, 3, 4, 6, 9]))
    def extend(self, data, count):
        if self.tokens:
            names = st.lists(
                st.sampled_from(sorted(self.tokens)), min_size=1, max_size=2, unique=True
            )
            self.extend_now(tuple(data.draw(names)), count)

    @rule(count=st.integers(1, 6), backwards=st.booleans())
    def extend_each(self, count, backwards):
        """Extends every request that does not wait."""
        waiting = {name for call in self.queue for name in call.extends}
        for name in sorted(self.tokens.keys() - waiting, reverse=backwards):
            self.extend_now((name,), count)

    def extend_now(self, names, count):
        handles = [self.handles[name] for name in names]
        priority = max(self.priorities[name] for name in names)
        call = self.manager.extend_all(handles, count)
        self.begin_call(call, priority, extends=names, count=count)

    @rule(count=st.integers(0, 2), priority=PRIORITIES)
    def allocate_blocks(self, count, priority):
        self.begin_call(
            self.manager.allocate_blocks(count, priority=priority), priority, count=count
        )

    @rule(data=st.data())
    def deallocate(self, data):
        if self.tokens:
            name = data.draw(st.sampled_from(sorted(self.tokens)))
            self.settle(self.manager.deallocate(name))
            del self.tokens[name], self.handles[name]
            self.serve()

    @rule()
    def free_blocks(self):
        if self.taken:
            blocks = self.taken.pop()
            self.settle(self.manager.free_blocks(blocks))
            self.num_taken -= len(blocks)
            self.serve()

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

    # Expected outcomes.

    def settle(self, call=None):
        async def go_on():
            result = None if call is None else await call
            await settle(60)
            return result

        return self.runner.run(go_on())

    def begin_call(self, coroutine, priority, **what):
        async def begin():
            return asyncio.ensure_future(coroutine)

        call = Call(self.runner.run(begin()), self.clock.now, priority, self.number, **what)
        self.number += 1
        self.settle()
        self.queue.append(call)
        if call.extends and (self.is_too_long(call) or self.num_needed(call) == 0):
            self.try_to_serve(call)
        self.serve()
        event("waits" if call in self.queue else "does not wait")

    def serve(self):
        """Serves or refuses calls until all others must wait."""
        while True:
            for call in [c for c in self.queue if not set(c.extends) <= self.tokens.keys()]:
                self.end_call(call, errors.InvalidHandleError)
            self.queue.sort(key=self.place)
            if not self.queue:
                return
            if not self.try_to_serve(self.queue[0]):
                extending = [call for call in self.queue if call.extends]
                asleep = {name for call in extending for name in call.extends}
                holders = {name for name, count in self.tokens.items() if count}
                if not extending or not holders <= asleep:
                    return
                useful = [call for call in extending if holders & set(call.extends)]
                self.end_call((useful or extending)[-1], errors.OutOfBlocksError)
                event("all wait")

    def place(self, call: Call):
        urgency = call.priority + Fraction(self.clock.now - call.came) / AGEING_SECONDS
        return not call.extends, -urgency, call.number

    def try_to_serve(self, call: Call) -> bool:
        """Serves or refuses a call, unless it has to wait."""
        if self.is_too_long(call):
            self.end_call(call, errors.SequenceTooLongError)
            return True
        has_row = call.name is None or len(self.tokens) < MAX_SEQS
        if not has_row or self.num_needed(call) > self.num_free:
            return False
        if call.name is not None:
            self.tokens[call.name] = call.count
            self.priorities[call.name] = call.priority
            self.handles[call.name] = call.task.result()
        elif call.extends:
            for name in call.extends:
                self.tokens[name] += call.count
        else:
            self.num_taken += call.count
            self.taken.append(call.task.result())
        self.end_call(call, None)
        return True

    def is_too_long(self, call: Call) -> bool:
        return any(self.tokens[name] + call.count > MAX_TOKENS for name in call.extends)

    def num_needed(self, call: Call) -> int:
        if call.name is not None:
            return blocks_for(call.count)
        if not call.extends:
            return call.count
        held = [self.tokens[name] for name in call.extends]
        return sum(blocks_for(tokens + call.count) - blocks_for(tokens) for tokens in held)

    @property
    def num_free(self) -> int:
        return MAX_BLOCKS - sum(map(blocks_for, self.tokens.values())) - self.num_taken

    def end_call(self, call: Call, error: type[Exception] | None):
        self.queue.remove(call)
        assert call.task.done()
        assert type(call.task.exception()) is (type(None) if error is None else error)

    @invariant()
    def the_same_calls_wait(self):
        if not hasattr(self, "runner"):
            return
        assert not any(call.task.done() for call in self.queue)
        assert self.manager.num_waiting == len(self.queue)

    @invariant()
    def the_same_tokens_are_held(self):
        if hasattr(self, "runner"):
            self.manager.manager.check()
            assert self.manager.free_block_count() == self.num_free
            live = {name: handle.num_tokens() for name, handle in self.manager.list_handles()}
            assert live == self.tokens


def test_allocate_extend_and_cancel_are_served_as_a_model_of_the_queue_says():
    run_state_machine_as_test(
        QueueMachine, settings=settings(max_examples=150, stateful_step_count=30)
    )
