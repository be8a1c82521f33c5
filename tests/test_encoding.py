"""Storage of numbers: every bit pattern survives, and rounding is to the nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.encoding import decode, decode_f32, encode, round_to, storage_dtype
from ferrum_jax.types import DataType

DTYPES = [member.jnp_dtype for member in DataType]
PLATFORMS = ["cpu", "gpu", "tpu"]


def every_number(dtype: np.dtype) -> np.ndarray:
    """Every bit pattern of a narrow dtype; patterns of all exponents of float32."""
    if dtype.itemsize == 4:
        return (np.arange(2**16, dtype=np.uint32) * 65537).view(dtype)
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    return np.arange(2 ** (8 * dtype.itemsize)).astype(bits).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_storage_is_as_wide_as_the_numbers(dtype, platform):
    assert storage_dtype(dtype, platform).itemsize == dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accelerators_store_numbers_as_they_are(dtype):
    assert storage_dtype(dtype, "gpu") == storage_dtype(dtype, "tpu") == dtype


def test_only_cpu_pools_of_narrow_floats_hold_bits():
    stored = {str(dtype): str(storage_dtype(dtype, "cpu")) for dtype in DTYPES}
    assert stored == {
        "float32": "float32",
        "float16": "float16",
        "bfloat16": "uint16",
        "float8_e4m3fn": "uint8",
        "int8": "int8",
    }


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encode_and_decode_keep_every_bit_pattern(dtype, platform):
    numbers = every_number(dtype)
    storage = storage_dtype(dtype, platform)
    stored = jax.jit(encode, static_argnums=(1, 2))(numbers, dtype, storage)
    back = jax.jit(decode, static_argnums=1)(stored, dtype)
    assert stored.dtype == storage and back.dtype == dtype
    assert np.asarray(back).tobytes() == numbers.tobytes()


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What a pool is to make of numbers: the nearest ones, narrow dtypes saturating."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.kind in "iu":
            info, values = np.iinfo(dtype), values.astype(np.float64)
            whole = np.clip(np.rint(np.where(np.isnan(values), 0, values)), info.min, info.max)
            return whole.astype(dtype)
        if dtype.itemsize == 1 and dtype != values.dtype:
            largest = float(jnp.finfo(dtype).max)
            values = np.clip(values.astype(np.float32), -largest, largest)
        return values.astype(dtype)


ROUNDED = [*DTYPES, *map(jnp.dtype, ("float8_e5m2", "uint8", "int16", "int32"))]
FROM = [*map(jnp.dtype, ("float32", "bfloat16", "float16", "float8_e5m2", "int32", "int8"))]


@pytest.mark.parametrize("given", FROM, ids=str)
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_encode_rounds_to_the_nearest_and_saturates_narrow_dtypes(dtype, given):
    numbers = every_number(given)
    if given == np.float32:
        near = np.random.default_rng(0).normal(scale=200, size=10_000).astype(np.float32)
        numbers = np.concatenate([numbers, near, np.arange(-600, 600, 0.25, np.float32)])
    with np.errstate(invalid="ignore"):
        size = np.abs(numbers.astype(np.float64))
        numbers = numbers[(size == 0) | ~(size < 2.0**-126)]  # XLA may take these for zeros.
    for storage in {storage_dtype(dtype, "cpu"), dtype}:
        stored = jax.jit(encode, static_argnums=(1, 2))(numbers, dtype, storage)
        got, want = np.asarray(decode(stored, dtype)), rounded(numbers, dtype)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def test_round_to_saturates_infinity_in_narrow_dtypes_and_keeps_nan():
    odd = jnp.asarray([np.inf, -np.inf, np.nan, 465, -1e30], jnp.float32)
    saturated = np.asarray(round_to(odd, jnp.dtype("float8_e4m3fn")), np.float32)
    np.testing.assert_array_equal(saturated, [448, -448, np.nan, 448, -448])
    assert round_to(odd, jnp.dtype("int8")).tolist() == [127, -128, 0, 127, -128]
    np.testing.assert_array_equal(np.asarray(round_to(odd, jnp.dtype("float16")))[:3], odd[:3])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_f32_is_exact(dtype, platform):
    numbers = every_number(dtype)
    stored = encode(jnp.asarray(numbers), dtype, storage_dtype(dtype, platform))
    got = np.asarray(jax.jit(decode_f32, static_argnums=1)(stored, dtype))
    assert got.dtype == np.float32
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got, numbers.astype(np.float32))
