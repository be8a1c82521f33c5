"""How numbers are stored: every bit pattern survives, in the width that was promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.encoding import decode, decode_f32, encode, storage_dtype
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
def test_every_bit_pattern_survives_being_stored(dtype, platform):
    numbers = every_number(dtype)
    storage = storage_dtype(dtype, platform)
    stored = jax.jit(encode, static_argnums=(1, 2))(numbers, dtype, storage)
    back = jax.jit(decode, static_argnums=1)(stored, dtype)
    assert stored.dtype == storage and back.dtype == dtype
    assert np.asarray(back).tobytes() == numbers.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_stored_numbers_round_to_the_nearest(dtype):
    dtype = jnp.dtype(dtype)
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    got = decode(encode(values, dtype, storage_dtype(dtype, "cpu")), dtype)
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), values.astype(dtype).astype(np.float32)
    )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_as_float32_is_exact(dtype, platform):
    numbers = every_number(dtype)
    stored = encode(jnp.asarray(numbers), dtype, storage_dtype(dtype, platform))
    got = np.asarray(jax.jit(decode_f32, static_argnums=1)(stored, dtype))
    assert got.dtype == np.float32
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got, numbers.astype(np.float32))
