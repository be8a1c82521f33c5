"""Random calls of a multi-device manager against a simple model, compared after each call.

`soak.py` draws the same operations, those of `random_operations.py`, for longer.
"""

import pytest
from hypothesis import settings

from tests.soak import Life, run_life
from tests.support.random_scenarios import SCENARIOS

pytestmark = pytest.mark.state_machine


def check_life(**life):
    ended = run_life(Life(**life))
    assert ended.failure is None, ended.failure
    assert ended.num_steps == life["num_steps"] and ended.num_compared_bytes > 0


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=SCENARIOS)
def test_random_calls_of_a_multi_device_manager_agree_with_the_model(number):
    for seed in range(1, 1 + -(-settings.default.max_examples // 250)):
        check_life(seed=seed, number=number, num_steps=60)


@pytest.mark.slow  # By default, the test above draws the same operations.
@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=SCENARIOS)
def test_soak_run_life_finds_no_difference(number):
    check_life(seed=0, number=number, num_steps=160)
