"""Random lives of a manager of several devices."""

from tests.support.devices import run_cases


def test_random_lives_on_three_devices_agree_with_the_model():
    run_cases("machine", num_devices=4)
