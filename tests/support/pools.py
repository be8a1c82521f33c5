"""Pools of keys and values, as tests make them and look into them."""

import dataclasses

import jax
from jax.typing import DTypeLike

from ferrum_jax.payload import KeyValue
from ferrum_jax.state import BlockPool


def kv_pool(k: jax.Array, v: jax.Array, dtype: DTypeLike | None = None, **fields) -> BlockPool:
    """A pool of arrays [N, L, H, B, D], which hold numbers of a dtype, their own if absent."""
    payload = KeyValue(k.shape[2], k.shape[4], k.dtype if dtype is None else dtype)
    return BlockPool(payload.join(k, v), payload, **fields)


def keys(pool: BlockPool) -> jax.Array:
    """The array of a pool's keys."""
    return pool.payload.split(pool.arrays).k


def values(pool: BlockPool) -> jax.Array:
    """The array of a pool's values."""
    return pool.payload.split(pool.arrays).v


def with_arrays(pool: BlockPool, k: jax.Array, v: jax.Array) -> BlockPool:
    """The pool with other keys and values."""
    return dataclasses.replace(pool, arrays=pool.payload.join(k, v))


def pool_bytes(pool: BlockPool) -> int:
    """Bytes of a pool's arrays."""
    return sum(array.nbytes for array in pool.arrays.values())
