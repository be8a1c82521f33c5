"""Attention methods of other packages, with their products on a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.integrations.products import with_attention


class Dense:
    """An attention method as other packages write it."""

    def block(self, q, k, v, *, scale=1.0):
        logits = jnp.einsum("btkgd,bskd->btkgs", q * scale, k)
        out = jnp.einsum("btkgs,bskd->btkgd", jax.nn.softmax(logits), v)
        return 2 * out


def test_a_method_runs_with_another_attention_and_stays_as_it_is():
    seen = []

    def attend(q, k, v):
        seen.append((q, k, v))
        return q + 1

    q = jnp.arange(48.0).reshape(1, 2, 3, 2, 4)
    k = v = jnp.ones((1, 2, 3, 4))
    own = Dense().block(q, k, v, scale=0.5)
    out = with_attention(Dense.block, attend)(Dense(), q, k, v, scale=0.5)
    np.testing.assert_array_equal(out, 2 * (0.5 * q + 1))
    (got,) = seen
    np.testing.assert_array_equal(got[0], 0.5 * q.reshape(1, 2, 6, 4))
    assert got[1] is k and got[2] is v
    np.testing.assert_array_equal(Dense().block(q, k, v, scale=0.5), own)


@pytest.mark.parametrize("method", [lambda q: q, lambda q: jnp.einsum("btd,btd->btd", q, q)])
def test_a_method_with_other_products_is_refused(method):
    with pytest.raises(RuntimeError, match="lambda> computed [01] products of activations; 2 are"):
        with_attention(method, lambda q, k, v: q)(jnp.ones((1, 2, 3)))
