"""Random lives of many coroutines: against a dull model, and in a crowd with real threads.

The model sorts and looks at all who wait. After every step it is known who must have been served,
who refused and why, and who still waits.
"""

import asyncio
import dataclasses
import random
from fractions import Fraction

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
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.loops import SteppedLoop, make_async, on_loop, settle
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, Clock

MAX_BLOCKS, MAX_SEQS, AGEING_SECONDS = 5, 4, 10
PRIORITIES = st.sampled_from(Priority)


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclasses.dataclass(eq=False)
class Call:
    """One call that may have to wait: for a new request, for more tokens, or for mere blocks."""

    task: asyncio.Task
    came: float
    priority: Priority
    number: int
    name: int | None = None  # The new request.
    extends: tuple[int, ...] = ()  # The requests that want more tokens each.
    count: int = 0  # Tokens; blocks, if it is for neither.


class LineMachine(RuleBasedStateMachine):
    """Whatever tasks do with a manager, in any order."""

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
        self.lent: list[list[int]] = []
        self.num_lent = 0
        self.line: list[Call] = []
        self.outcomes: list[tuple[Call, type[Exception] | None]] = []

    def teardown(self):
        if hasattr(self, "runner"):
            self.runner.close()

    # What may happen.

    @rule(count=st.integers(0, 7), priority=PRIORITIES)
    def allocate(self, count, priority):
        name = self.number
        request = self.manager.new_request(name, count, priority=priority)
        self.arrive(self.manager.allocate(request), priority, name=name, count=count)

    @rule(data=st.data(), count=st.sampled_from([0, 1, 2, 3, 3, 4, 6, 9]))
    def extend(self, data, count):
        if self.tokens:
            names = st.lists(
                st.sampled_from(sorted(self.tokens)), min_size=1, max_size=2, unique=True
            )
            self.extend_now(tuple(data.draw(names)), count)

    @rule(count=st.integers(1, 6), backwards=st.booleans())
    def extend_each(self, count, backwards):
        """Every request wants more, and none goes on meanwhile."""
        waiting = {name for call in self.line for name in call.extends}
        for name in sorted(self.tokens.keys() - waiting, reverse=backwards):
            self.extend_now((name,), count)

    def extend_now(self, names, count):
        handles = [self.handles[name] for name in names]
        priority = max(self.priorities[name] for name in names)
        call = self.manager.extend_all(handles, count)
        self.arrive(call, priority, extends=names, count=count)

    @rule(count=st.integers(0, 2), priority=PRIORITIES)
    def borrow(self, count, priority):
        self.arrive(self.manager.allocate_blocks(count, priority=priority), priority, count=count)

    @rule(data=st.data())
    def deallocate(self, data):
        if self.tokens:
            name = data.draw(st.sampled_from(sorted(self.tokens)))
            self.settle(self.manager.deallocate(name))
            del self.tokens[name], self.handles[name]
            self.serve()

    @rule()
    def give_back(self):
        if self.lent:
            blocks = self.lent.pop()
            self.settle(self.manager.free_blocks(blocks))
            self.num_lent -= len(blocks)
            self.serve()

    @rule(data=st.data())
    def cancel(self, data):
        if self.line:
            call = data.draw(st.sampled_from(self.line))
            call.task.cancel()
            self.settle()
            assert call.task.cancelled()
            self.line.remove(call)
            self.serve()

    @rule(seconds=st.integers(1, 15))
    def pass_time(self, seconds):
        self.clock.now += seconds

    # What must follow.

    def settle(self, call=None):
        async def go_on():
            result = None if call is None else await call
            await settle(60)
            return result

        return self.runner.run(go_on())

    def arrive(self, coroutine, priority, **what):
        async def begin():
            return asyncio.ensure_future(coroutine)

        call = Call(self.runner.run(begin()), self.clock.now, priority, self.number, **what)
        self.number += 1
        self.settle()
        self.line.append(call)
        if call.extends and (self.is_too_long(call) or self.num_needed(call) == 0):
            self.try_to_serve(call)
        self.serve()
        event("waits" if call in self.line else "does not wait")

    def serve(self):
        """Serves or refuses until nobody can be helped."""
        while True:
            for call in [c for c in self.line if not set(c.extends) <= self.tokens.keys()]:
                self.leave(call, errors.InvalidHandleError)
            self.line.sort(key=self.place)
            if not self.line:
                return
            if not self.try_to_serve(self.line[0]):
                extending = [call for call in self.line if call.extends]
                asleep = {name for call in extending for name in call.extends}
                holders = {name for name, count in self.tokens.items() if count}
                if not extending or not holders <= asleep:
                    return
                useful = [call for call in extending if holders & set(call.extends)]
                self.leave((useful or extending)[-1], errors.OutOfBlocksError)
                event("all wait")

    def place(self, call: Call):
        urgency = call.priority + Fraction(self.clock.now - call.came) / AGEING_SECONDS
        return not call.extends, -urgency, call.number

    def try_to_serve(self, call: Call) -> bool:
        """Serves or refuses a call, unless it has to wait."""
        if self.is_too_long(call):
            self.leave(call, errors.SequenceTooLongError)
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
            self.num_lent += call.count
            self.lent.append(call.task.result())
        self.leave(call, None)
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
        return MAX_BLOCKS - sum(map(blocks_for, self.tokens.values())) - self.num_lent

    def leave(self, call: Call, error: type[Exception] | None):
        self.line.remove(call)
        assert call.task.done()
        assert type(call.task.exception()) is (type(None) if error is None else error)

    @invariant()
    def the_same_wait(self):
        if not hasattr(self, "runner"):
            return
        assert not any(call.task.done() for call in self.line)
        assert self.manager.num_waiting == len(self.line)

    @invariant()
    def the_same_is_held(self):
        if hasattr(self, "runner"):
            self.manager.manager.check()
            assert self.manager.free_block_count() == self.num_free
            live = {name: handle.num_tokens() for name, handle in self.manager.list_handles()}
            assert live == self.tokens


def test_who_waits_is_served_as_the_model_says():
    run_state_machine_as_test(
        LineMachine, settings=settings(max_examples=150, stateful_step_count=30)
    )


# Hundreds.


class Crowd:
    """Hundreds of tasks that want more than there is; some give up, some are cut off."""

    def __init__(self, manager: AsyncKvCacheManager, seed: int):
        self.manager, self.random = manager, random.Random(seed)
        self.outcomes: dict[str, int] = {}

    async def client(self, name: int):
        """One request's life; it checks what is its own."""
        rng = random.Random(name)
        timeout = rng.choice([None, None, None, 0, 0.01])
        request = self.manager.new_request(
            name, rng.randrange(7), priority=rng.choice(list(Priority))
        )
        async with self.manager.hold(request, timeout_seconds=timeout) as handle:
            for _ in range(rng.randrange(6)):
                count = rng.randrange(4)
                if handle.num_tokens() + count <= MAX_TOKENS:
                    num_tokens = handle.num_tokens()
                    await self.manager.extend(handle, count, timeout_seconds=timeout)
                    assert handle.num_tokens() == num_tokens + count
                await asyncio.sleep(rng.choice([0, 0, 0.001]))
                if rng.random() < 0.1:
                    await self.manager.run(lambda state, seq_ids: (state, None), [handle])

    async def borrower(self, name: int):
        """Takes blocks for a moment."""
        blocks = await self.manager.allocate_blocks(1 + name % 3, timeout_seconds=0.05)
        try:
            await asyncio.sleep(0.001)
        finally:
            await self.manager.free_blocks(blocks)

    async def keeper(self):
        """Tidies all the time."""
        while True:
            await self.manager.gc()
            await asyncio.sleep(0.005)
            await self.manager.check()

    async def life(self, name: int):
        kind = self.borrower if name % 10 == 0 else self.client
        try:
            await kind(name)
            outcome = "served"
        except (errors.WaitTimeoutError, errors.OutOfBlocksError) as error:
            outcome = type(error).__name__
        except asyncio.CancelledError:
            outcome = "cancelled"
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    async def run(self, num_tasks: int):
        keeper = asyncio.ensure_future(self.keeper())
        tasks = []
        for name in range(num_tasks):
            tasks.append(asyncio.ensure_future(self.life(name)))
            if name % 50 == 0:  # They come in bursts.
                await asyncio.sleep(0.002)
            if self.random.random() < 0.3:
                self.random.choice(tasks).cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError}
        keeper.cancel()
        await asyncio.wait([keeper])


@pytest.mark.parametrize("seed", range(3))
@on_loop
async def test_hundreds_of_tasks_leave_nothing_behind(seed):
    manager = make_async(initial_blocks=6, enable_pooling=seed != 0)

    def complain(level):
        raise RuntimeError("The callback is wrong.")

    manager.set_pressure_callback(complain)
    crowd = Crowd(manager, seed)
    await crowd.run(300)
    assert crowd.outcomes.keys() >= {"served", "cancelled", "WaitTimeoutError"}
    assert manager.num_waiting == 0 and not manager.list_handles()
    await manager.check()
    assert manager.free_block_count() == manager.total_block_count()
