"""Each change of a manager is whole or not made, whatever fails on the device, whenever."""

import pytest

from tests.failing_device import Fault, observed_device
from tests.failure_situations import SITUATIONS
from tests.failures import check_failures


@pytest.fixture(scope="module")
def device():
    with observed_device() as device:
        yield device


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_call_that_fails_is_as_if_it_was_not_made(device, name, fault):
    check_failures(device, SITUATIONS[name], fault)
