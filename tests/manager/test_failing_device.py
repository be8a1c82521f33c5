"""The device that fails on demand sees every call of a device, the first time and again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.failing_device import Fault, observed_device

COPIED = jax.jit(lambda x: x + 1)
DONATED = jax.jit(lambda x: x + 1, donate_argnums=0)
CALLS = {
    "a program": (COPIED, ["jit(<lambda>)"]),
    "a program in place": (lambda x: DONATED(x + 0), ["jit(add)", "jit(<lambda>)"]),
    "an operation": (jnp.negative, ["jit(negative)"]),
    "an index": (lambda x: x[2], ["jit(dynamic_slice)", "jit(squeeze)"]),
    "a slice": (lambda x: x[1:3], ["jit(dynamic_slice)"]),
    "asarray": (lambda x: np.asarray(x), ["read"]),
    "array": (lambda x: np.array(x, copy=True), ["read"]),
    "tolist": (lambda x: x.tolist(), ["read"]),
    "int": (lambda x: int(x.sum()), ["jit(_reduce_sum)", "read"]),
    "bool": (lambda x: bool(x.sum()), ["jit(_reduce_sum)", "read"]),
    "get": (lambda x: jax.device_get((x, x)), ["device_get"]),
    "put": (lambda x: jax.device_put(np.arange(3)), ["device_put"]),
    "wait": (lambda x: jax.block_until_ready((x, x)), ["block_until_ready"]),
}


@pytest.fixture(scope="module")
def device():
    with observed_device() as device:
        yield device


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_seen_the_first_time_and_again(device, name):
    call, expected = CALLS[name]
    x = jnp.arange(6)
    for _ in range(3):
        with device.failing(0, Fault.BEFORE) as failure:
            call(x)
        assert failure.calls == expected and not failure.has_happened


def test_each_fault_is_what_it_says(device):
    for fault, is_consumed in ((Fault.BEFORE, False), (Fault.AFTER, True), (Fault.INTERRUPT, True)):
        x, y = jnp.arange(6), jnp.arange(6)
        with device.failing(2, fault) as failure, pytest.raises(fault.errors[0]):
            for array in (x, y):
                DONATED(array)
        assert failure.has_happened and x.is_deleted()
        assert y.is_deleted() == is_consumed
