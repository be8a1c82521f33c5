"""Rows of all formats in one pool."""

import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.types import NULL_SEQ, TokenFormat
from tests.support.compressed import COMPRESSED, empty_state

NATIVE, INT8, INT8_INT4, INT4 = TokenFormat
ROWS = {0: (NATIVE, 9), 1: (INT8, 15), 2: (INT8_INT4, 17), 3: (INT4, 23)}
SEQ_IDS = (3, 0, 4, 2, NULL_SEQ, 1)  # Row 4 is free.
Q_HEADS = 4  # Two for each KV head.
formats = pytest.mark.parametrize("token_format", COMPRESSED, ids=lambda x: x.name)


def new_state(dtype="float32"):
    return empty_state(dtype=dtype)


def pool_bits(pool):
    return [np.asarray(x).view(f"uint{8 * x.dtype.itemsize}") for x in pool.arrays.values()]


def queries(*lead, dtype="float32", seed=7):
    q = np.random.default_rng(seed).normal(size=(*lead, Q_HEADS, 16))
    return jnp.asarray(q, jnp.float32).astype(dtype)
