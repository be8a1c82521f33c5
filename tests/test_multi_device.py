"""The manager of several devices."""

from tests.devices import run_cases


def test_a_manager_keeps_caches_on_several_devices_and_moves_them():
    run_cases("multi_device_cases", num_devices=4)
