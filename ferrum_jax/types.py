"""Basic types of all other modules: devices, data types, levels, formats and identifiers."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

NULL_BLOCK = -1
"""Marks an absent block in a page table or in a batch of block ids."""

NULL_SEQ = -1
"""Pads a batch of rows; operations ignore it."""

RequestId: TypeAlias = Hashable
"""The caller's key of a request. Only managers use it."""

BlockId: TypeAlias = int
"""Index of a block in the pool, from 0 to `num_blocks - 1`."""

IdsLike: TypeAlias = ArrayLike | Sequence[int]
"""Ids, counts or lengths as users give them: a number, a list or an array, of any integer dtype."""

_PLATFORMS = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


class JaxDevice(Protocol):
    """A `jax.Device`, for type checkers, which cannot read jaxlib's own class."""

    @property
    def platform(self) -> str:
        """The platform's name: "cpu", "gpu" or "tpu"."""
        ...

    @property
    def id(self) -> int:
        """The device's number on that platform, unique among all processes."""
        ...


@dataclasses.dataclass(frozen=True, order=True)
class Device:
    """A device by name, so that a configuration can name it before JAX is initialised.

    Attributes:
      platform: "cpu", "gpu" or "tpu"; "cuda" and "rocm" are read as "gpu".
      index: JAX's id of the device on that platform.

    Example:
      >>> print(Device("cuda", 1))
      gpu:1
      >>> Device.parse("tpu") == Device("tpu", 0)
      True
    """

    platform: str
    index: int = 0

    def __post_init__(self) -> None:
        """Normalises the platform's name and checks both fields."""
        name = _PLATFORMS.get(str(self.platform).lower())
        if name is None:
            raise ValueError(
                f"platform must be one of {', '.join(_PLATFORMS)}, got {self.platform!r}."
            )
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise ValueError(f"index must be an integer of at least 0, got {self.index!r}.")
        object.__setattr__(self, "platform", name)

    def __str__(self) -> str:
        """Returns "platform:index", which `parse` reads back."""
        return f"{self.platform}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Device:
        """Parses the name of a device, such as "gpu" or "gpu:1".

        Args:
          text: A platform, optionally followed by a colon and an index (default 0).

        Returns:
          The device.

        Raises:
          ValueError: If the text has another form or the platform is unknown.
        """
        if not isinstance(text, str):
            raise ValueError(f"A device reads like 'gpu' or 'gpu:1', got {text!r}.")
        platform, colon, index = text.strip().partition(":")
        if colon and not (index.isascii() and index.isdigit()):
            raise ValueError(f"A device reads like 'gpu' or 'gpu:1', got {text!r}.")
        return cls(platform, int(index) if colon else 0)

    @classmethod
    def of(cls, jax_device: JaxDevice) -> Device:
        """Returns the name of a JAX device; `jax_device` is the inverse.

        Args:
          jax_device: A device, such as `jax.devices()[0]`.

        Returns:
          Its platform and id.

        Raises:
          ValueError: If the argument is not a JAX device.
        """
        if not (hasattr(jax_device, "platform") and hasattr(jax_device, "id")):
            raise ValueError(
                f"Device.of takes a JAX device, such as jax.devices()[0], got {jax_device!r}. Use "
                "Device.parse for a name."
            )
        return cls(jax_device.platform, jax_device.id)

    def jax_device(self) -> JaxDevice:
        """Finds the JAX device of this name in this process.

        Returns:
          The device with this platform and id.

        Raises:
          ValueError: If this process has no such device; the text lists the devices that it has.
        """
        found = _local_devices(self.platform)
        for device in found:
            if device.id == self.index:
                return device
        names = [str(Device.of(device)) for device in found]
        if not names:
            names = [f"{device.platform}:{device.id}" for device in jax.local_devices()]
        raise ValueError(
            f"There is no device {self} in this process; there is {', '.join(names)}. "
            "Name one of these, or install a jaxlib for that platform."
        )


def _local_devices(platform: str) -> list[JaxDevice]:
    """Returns this process's devices of a platform; none if JAX has no such backend."""
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:
        return []


class DataType(enum.Enum):
    """Dtype of cached numbers. The value of a member is the name of the NumPy dtype.

    Example:
      >>> DataType.of("bfloat16").size_bytes()
      2
    """

    FP32 = "float32"
    FP16 = "float16"
    BF16 = "bfloat16"
    FP8 = "float8_e4m3fn"
    INT8 = "int8"

    @classmethod
    def of(cls, dtype: Any) -> DataType:
        """Returns the member for a dtype.

        Args:
          dtype: A member, its name ("BF16"), a dtype or its name, a scalar type such as
            `jnp.float32`, or an array.

        Returns:
          The member.

        Raises:
          ValueError: If the argument does not name a dtype, or the cache does not store this dtype.
        """
        if isinstance(dtype, cls):
            return dtype
        if isinstance(dtype, str) and dtype.upper() in cls.__members__:
            return cls[dtype.upper()]
        resolved = to_dtype(dtype)
        for member in cls:
            if member.value == resolved.name:
                return member
        known = ", ".join(member.value for member in cls)
        raise ValueError(f"dtype must be one of {known}; got {resolved.name}.")

    @property
    def jnp_dtype(self) -> np.dtype:
        """The NumPy dtype."""
        return jnp.dtype(self.value)

    def size_bytes(self) -> int:
        """Returns the number of bytes per number."""
        return self.jnp_dtype.itemsize


def to_dtype(dtype: Any) -> np.dtype:
    """Converts the name of a dtype to a NumPy dtype.

    Args:
      dtype: A `DataType`, a dtype or its name, a scalar type, or an array.

    Returns:
      The NumPy dtype.

    Raises:
      ValueError: If the argument does not name a dtype.
    """
    if isinstance(dtype, DataType):
        return dtype.jnp_dtype
    if isinstance(dtype, (jax.Array, np.ndarray)):
        return np.dtype(dtype.dtype)
    try:
        if dtype is not None:  # NumPy would read None as float64.
            return jnp.dtype(dtype)
    except TypeError:
        pass
    raise ValueError(f"dtype must name a type such as 'float32' or 'bfloat16', got {dtype!r}.")


class Priority(enum.IntEnum):
    """Priority of a request; a greater one is served first."""

    Low = 0
    Normal = 1
    High = 2
    Critical = 3


class MemoryPressure(enum.IntEnum):
    """Level of memory pressure: how full the pool is.

    Attributes:
      Low: Allocate freely.
      Medium: Be sparing.
      High: Consider evicting.
      Critical: Evict, or refuse requests.
    """

    Low = 0
    Medium = 1
    High = 2
    Critical = 3


class TokenFormat(enum.IntEnum):
    """Format of a row's keys and values in its blocks. A later format needs fewer bytes.

    Attributes:
      Native: The pool's dtype.
      Int8: Keys and values in 8 bits, each with one scale per token and head.
      Int8Int4: Keys in 8 bits, values rotated and in 4 bits.
      Int4: Keys and values rotated and in 4 bits.
    """

    Native = 0
    Int8 = 1
    Int8Int4 = 2
    Int4 = 3
