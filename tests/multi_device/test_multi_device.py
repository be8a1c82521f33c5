"""The manager of several devices."""

import pytest

from tests.support.devices import run_cases


@pytest.mark.parametrize("name", ["cases", "advanced_cases"])
def test_a_manager_keeps_caches_on_several_devices_and_moves_them(name):
    run_cases(name, num_devices=4)
