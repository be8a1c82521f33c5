"""Attention methods of other packages, run with their two products of activations on a paged cache.

Some packages compute projections, norms, rotary embedding and attention in one method, for which
there is no substitute to pass. Its two products of activations, queries with keys and probabilities
with values, are calls of `jnp.einsum`. So a copy of the method is run that finds another `jnp`
under that name: the method and its module stay as they are, and its other lines are run as written.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Attend: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Attention: queries [R, T, Hq, D], keys and values [R, T, H, D] to [R, T, Hq, D]."""


def with_attention(method: Callable[..., Any], attend: Attend) -> Callable[..., Any]:
    """Returns a copy of an attention method in which `attend` takes the place of its products.

    What the method computes of its own products (masks, a softmax) is read by nothing, so that it
    is not compiled.

    Args:
      method: A function, or a method of a class, that calls `jnp.einsum` twice: for queries
        ([R, T, Hq, D] or [R, T, H, Hq / H, D]) and keys, and for probabilities and values.
      attend: Computes attention of the queries to keys and values, and to what came before.

    Returns:
      A function of the same arguments.

    Raises:
      RuntimeError: When it is called, the method computes other products.
    """
    method = inspect.unwrap(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        products = _Products(attend)
        names = {**method.__globals__, "jnp": products}
        copy = types.FunctionType(
            method.__code__, names, method.__name__, method.__defaults__, method.__closure__
        )
        copy.__kwdefaults__ = method.__kwdefaults__
        result = copy(*args, **kwargs)
        products.check(method)
        return result

    return call


class _Products:
    """`jax.numpy` for a copy of a method, in which the second product is another attention."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend
        self._queries_and_keys: tuple[jax.Array, jax.Array] | None = None
        self._num_products = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def einsum(self, subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
        """Returns the product, or the attention's output in place of the second one."""
        self._num_products += 1
        if self._queries_and_keys is None:
            self._queries_and_keys = left, right
            return jnp.einsum(subscripts, left, right)
        q, k = self._queries_and_keys
        rows, num_tokens, _, head_dim = k.shape
        return self._attend(q.reshape(rows, num_tokens, -1, head_dim), k, right).reshape(q.shape)

    def check(self, method: Callable[..., Any]) -> None:
        """Raises RuntimeError unless there were two products: attention is computed otherwise."""
        if self._num_products != 2:
            raise RuntimeError(
                f"{method.__module__}.{method.__qualname__} computed {self._num_products} products "
                "of activations; 2 are known, queries with keys and probabilities with values. Use "
                "the version of the package that the extras of ferrum-jax ask for."
            )
