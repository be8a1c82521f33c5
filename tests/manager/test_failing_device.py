"""Tests of `failing_device`: it observes every call of a device, and fails as told."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.failing_device import Fault, observed_device

COPIED = jax.jit(lambda x: x + 1)
DONATED = jax.jit(lambda x: x + 1, donate_argnums=0)
CALLS = [
    (COPIED, ["jit(<lambda>)"]),
    (lambda x: DONATED(x + 0), ["jit(add)", "jit(<lambda>)"]),
    (jnp.negative, ["jit(negative)"]),
    (lambda x: x[2], ["jit(dynamic_slice)", "jit(squeeze)"]),
    (lambda x: np.asarray(x), ["read"]),
    (lambda x: np.array(x, copy=True), ["read"]),
    (lambda x: x.tolist(), ["read"]),
    (lambda x: int(x.sum()), ["jit(_reduce_sum)", "read"]),
    (lambda x: jax.device_get((x, x)), ["device_get"]),
    (lambda x: jax.device_put(np.arange(3)), ["device_put"]),
    (lambda x: jax.block_until_ready((x, x)), ["block_until_ready"]),
]


@pytest.fixture(scope="module")
def device():
    with observed_device() as device:
        yield device


def test_observed_device_records_every_call_the_first_time_and_later(device):
    x = jnp.arange(6)
    for (call, expected), _ in itertools.product(CALLS, range(2)):
        with device.failing(0, Fault.BEFORE) as failure:
            call(x)
        assert failure.calls == expected and not failure.has_happened


def test_each_fault_raises_and_deletes_donated_arrays_as_it_says(device):
    for fault, is_consumed in ((Fault.BEFORE, False), (Fault.AFTER, True), (Fault.INTERRUPT, True)):
        x, y = jnp.arange(6), jnp.arange(6)
        with device.failing(2, fault) as failure, pytest.raises(fault.errors[0]):
            for array in (x, y):
                DONATED(array)
        assert failure.has_happened and x.is_deleted()
        assert y.is_deleted() == is_consumed
