"""Random calls of a multi-device manager against a simple model, compared after each call.

The rules are the operations of `random_operations.py`, which `soak.py` draws too, for longer.
"""

import functools
import pathlib
import tempfile

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

from tests.soak import Life, run_life
from tests.support.manager_model_records import Request
from tests.support.random_operations import OPERATIONS, Operations
from tests.support.random_scenarios import DEVICES, LENGTHS, SCENARIOS, Scenario

pytestmark = pytest.mark.state_machine


class Drawn:
    """Choices that Hypothesis draws."""

    def __init__(self, data):
        self.data = data

    def one_of(self, options):
        return self.data.draw(st.sampled_from(options))

    def number(self, low, high):
        return self.data.draw(st.integers(low, high))


class MultiDeviceMachine(RuleBasedStateMachine):
    """All operations, in any order, with arguments that are often wrong, and faults."""

    def __init__(self, scenario: Scenario):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.life = Operations(scenario, pathlib.Path(self.directory.name))

    def teardown(self):
        for name in (*self.life.counts, *self.life.faults):
            event(name)
        self.life.close()
        self.directory.cleanup()

    @initialize(lengths=st.lists(st.sampled_from(LENGTHS), min_size=2, max_size=7), data=st.data())
    def begin(self, lengths, data):
        draw = Drawn(data)
        for i, length in enumerate(lengths):
            new = Request(None, draw.one_of(DEVICES), tokens=self.life.new_tokens(length))
            if self.life.allocate_one(i, new, length):
                self.life.write_some(draw, i)
                self.life.commit_some(draw, i)

    @invariant()
    def agrees_with_the_model(self):
        self.life.check_pressure()
        self.life.check()


def rule_for(operation):
    """Returns a rule that performs an operation."""

    def run(self, data):
        operation(self.life, Drawn(data))

    return rule(data=st.data())(run)


for operation in OPERATIONS:
    setattr(MultiDeviceMachine, operation.__name__, rule_for(operation))


@pytest.mark.parametrize("name", SCENARIOS)
def test_random_calls_of_a_multi_device_manager_agree_with_the_model(name):
    examples = max(1, settings.default.max_examples // 120)
    run_state_machine_as_test(
        functools.partial(MultiDeviceMachine, SCENARIOS[name]),
        settings=settings(settings.default, max_examples=examples, stateful_step_count=30),
    )


@pytest.mark.slow  # By default, the rules above draw the same operations.
@pytest.mark.parametrize("number", range(len(SCENARIOS)))
def test_soak_run_life_finds_no_difference(number):
    ended = run_life(Life(seed=0, number=number, num_steps=160))
    assert ended.failure is None, ended.failure
    assert ended.num_steps == 160 and ended.num_compared_bytes > 0
