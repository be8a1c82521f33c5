"""Basic types: devices, data types and levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.types import (
    NULL_BLOCK,
    NULL_SEQ,
    DataType,
    Device,
    MemoryPressure,
    Priority,
    to_dtype,
)


def test_null_block_and_null_seq_are_minus_one():
    assert NULL_BLOCK == NULL_SEQ == -1


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("cpu", Device("cpu", 0)),
        ("gpu:1", Device("gpu", 1)),
        ("CUDA:2", Device("gpu", 2)),
        ("rocm", Device("gpu", 0)),
        (" tpu:3 ", Device("tpu", 3)),
    ],
)
def test_a_device_is_read_from_text_and_written_back(text, want):
    device = Device.parse(text)
    assert device == want
    assert Device.parse(str(device)) == device
    assert hash(device) == hash(want)


@pytest.mark.parametrize("text", ["", "metal", "gpu:", "gpu:x", "gpu:-1", "gpu:1:2", "gpu:²"])
def test_an_invalid_device_name_is_refused(text):
    with pytest.raises(ValueError, match="platform must be one of|A device reads like"):
        Device.parse(text)


def test_a_device_and_its_jax_device_name_each_other():
    for jax_device in jax.local_devices():
        assert Device.of(jax_device).jax_device() is jax_device


@pytest.mark.parametrize("index", [-1, 1.0, True, "0"])
def test_a_device_index_is_a_whole_number(index):
    with pytest.raises(ValueError, match="index must be an integer"):
        Device("cpu", index)


def test_the_error_of_an_absent_device_lists_those_that_there_are():
    present = {device.platform for device in jax.local_devices()}
    absent = next(name for name in ("tpu", "gpu") if name not in present)
    for device in (Device("cpu", 999), Device(absent)):
        with pytest.raises(ValueError, match=rf"no device {device} .* there is [a-z]+:\d"):
            device.jax_device()


@pytest.mark.parametrize(
    ("member", "name", "size_bytes"),
    [
        (DataType.FP32, "float32", 4),
        (DataType.FP16, "float16", 2),
        (DataType.BF16, "bfloat16", 2),
        (DataType.FP8, "float8_e4m3fn", 1),
        (DataType.INT8, "int8", 1),
    ],
)
def test_a_data_type_is_a_dtype_with_a_size(member, name, size_bytes):
    assert member.value == member.jnp_dtype.name == name
    assert member.size_bytes() == size_bytes
    for spelling in (member, name, member.name, member.name.lower(), jnp.dtype(name)):
        assert DataType.of(spelling) is member


def test_a_data_type_is_found_from_scalar_types_and_arrays():
    assert DataType.of(jnp.bfloat16) is DataType.BF16
    assert DataType.of(np.float32) is DataType.FP32
    assert DataType.of(np.zeros(2, np.int8)) is DataType.INT8
    assert DataType.of(jnp.zeros(2, jnp.float16)) is DataType.FP16
    assert to_dtype(DataType.BF16) == to_dtype("bfloat16") == jnp.dtype(jnp.bfloat16)


@pytest.mark.parametrize("dtype", [None, "nope", "FP4", 3.5, object(), "float64"])
def test_data_type_refuses_what_is_not_a_dtype_or_is_not_stored(dtype):
    message = (
        "must be one of float32, .*; got float64" if dtype == "float64" else "must name a type"
    )
    with pytest.raises(ValueError, match=f"dtype {message}"):
        DataType.of(dtype)


def test_levels_are_ordered():
    assert sorted(MemoryPressure) == list(MemoryPressure)
    assert MemoryPressure.Low < MemoryPressure.Medium < MemoryPressure.High
    assert MemoryPressure.High < MemoryPressure.Critical
    assert Priority.Low < Priority.Normal < Priority.High < Priority.Critical
