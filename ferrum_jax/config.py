"""The choices: how large the pool is, for which model, and when it counts as full.

Every class here is frozen, checked when it is made, and hashable. A wrong value is a
`ValueError` that names the field.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from jax.typing import DTypeLike

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import (
    INT32_LIMIT,
    check_count,
    check_flag,
    check_number,
    check_path,
    check_type,
    settle_count,
)
from ferrum_jax.types import DataType, Device, MemoryPressure, to_dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPressureThresholds:
    """The share of the pool in use at which each level of pressure begins.

    Attributes:
      medium_threshold: From here on Medium, in [0, 1].
      high_threshold: From here on High; above `medium_threshold`.
      critical_threshold: From here on Critical; above `high_threshold`.

    Example:
      >>> MemoryPressureThresholds().level(used=8, total=10).name
      'High'
    """

    medium_threshold: float = 0.6
    high_threshold: float = 0.8
    critical_threshold: float = 0.95

    def __post_init__(self) -> None:
        """Checks that the thresholds increase within [0, 1]."""
        before = None
        for field in dataclasses.fields(self):
            value = check_number(field.name, getattr(self, field.name))
            if not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be between 0 and 1, got {value}.")
            if before is not None and value <= getattr(self, before):
                raise ValueError(
                    f"{field.name} ({value}) must be above {before} ({getattr(self, before)}), "
                    "or a level could never occur."
                )
            before = field.name

    def level(self, used: int, total: int) -> MemoryPressure:
        """Says how full a pool is.

        Args:
          used: Blocks, or bytes, in use.
          total: All that there are, in the same unit.

        Returns:
          The highest level whose threshold `used / total` reaches. An empty pool is Low.

        Raises:
          ValueError: Unless 0 <= used <= total.
        """
        if not 0 <= used <= total:
            raise ValueError(f"used must be between 0 and total ({total}), got {used}.")
        if used == 0:
            return MemoryPressure.Low
        share = used / total
        if share >= self.critical_threshold:
            return MemoryPressure.Critical
        if share >= self.high_threshold:
            return MemoryPressure.High
        if share >= self.medium_threshold:
            return MemoryPressure.Medium
        return MemoryPressure.Low


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixCacheConfig:
    """Which prompt prefixes are kept for later requests. There are no defaults.

    Attributes:
      max_prefixes: Prefixes kept at most.
      min_prefix_length: Shortest prefix worth keeping, in tokens.
      prefix_ttl_seconds: How long an unused prefix is kept; above 0, `math.inf` for ever.
      enable_cross_request_sharing: Whether one request may read what another has left.
    """

    max_prefixes: int
    min_prefix_length: int
    prefix_ttl_seconds: float
    enable_cross_request_sharing: bool

    def __post_init__(self) -> None:
        """Checks each field."""
        settle_count(self, "max_prefixes")
        settle_count(self, "min_prefix_length")
        if check_number("prefix_ttl_seconds", self.prefix_ttl_seconds) <= 0:
            raise ValueError(f"prefix_ttl_seconds must be above 0, got {self.prefix_ttl_seconds}.")
        check_flag("enable_cross_request_sharing", self.enable_cross_request_sharing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierConfig:
    """Where requests wait that are swapped out: in host memory first, then on disk.

    Attributes:
      host_budget_bytes: Most bytes in host memory; as many as the pool may have if absent.
      disk_directory: Where files may be written, for one manager alone; None for no disk.
      disk_budget_bytes: Most bytes of files; what the disk has if absent.
    """

    host_budget_bytes: int | None = None
    disk_directory: str | os.PathLike[str] | None = None
    disk_budget_bytes: int | None = None

    def __post_init__(self) -> None:
        """Checks each field."""
        for name in ("host_budget_bytes", "disk_budget_bytes"):
            if getattr(self, name) is not None:
                settle_count(self, name, minimum=0)
        if self.disk_directory is not None:
            check_path("disk_directory", self.disk_directory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How a manager keeps its pool. What the model needs is in `CacheGeometry`.

    Attributes:
      block_size: Tokens of one block.
      max_blocks: Blocks that the pool may grow to.
      initial_blocks: Blocks that it starts with; at most `max_blocks`.
      enable_pooling: Whether a grown pool keeps its blocks when they are free.
      target_devices: Where the pools live, the preferred device first. The contract's default is
        the CPU, whatever else there is; `(Device.of(jax.devices()[0]),)` is JAX's own.
      enable_prefix_caching: Whether prompts share prefixes; needs `prefix_cache_config`.
      prefix_cache_config: Which prefixes are kept, if any.
      enable_multi_device: Whether every target device gets a pool.
      pressure_thresholds: When the pool counts as full.

    Example:
      >>> CacheConfig(max_blocks=64, initial_blocks=64).block_size
      16
    """

    block_size: int = 16
    max_blocks: int = 1000
    initial_blocks: int = 100
    enable_pooling: bool = True
    target_devices: tuple[Device, ...] = (Device("cpu"),)
    enable_prefix_caching: bool = False
    prefix_cache_config: PrefixCacheConfig | None = None
    enable_multi_device: bool = False
    pressure_thresholds: MemoryPressureThresholds = MemoryPressureThresholds()

    def __post_init__(self) -> None:
        """Checks each field, and that they agree."""
        for name in ("block_size", "max_blocks", "initial_blocks"):
            settle_count(self, name, limit=INT32_LIMIT)
        if self.initial_blocks > self.max_blocks:
            raise ValueError(
                f"initial_blocks ({self.initial_blocks}) must not exceed max_blocks "
                f"({self.max_blocks}). Set initial_blocks as well."
            )
        for name in ("enable_pooling", "enable_prefix_caching", "enable_multi_device"):
            check_flag(name, getattr(self, name))
        self._check_devices()
        if self.prefix_cache_config is not None:
            check_type("prefix_cache_config", self.prefix_cache_config, PrefixCacheConfig)
        elif self.enable_prefix_caching:
            raise ValueError(
                "prefix_cache_config must be given when enable_prefix_caching is true."
            )
        check_type("pressure_thresholds", self.pressure_thresholds, MemoryPressureThresholds)

    def _check_devices(self) -> None:
        """Makes `target_devices` a tuple of distinct devices, or refuses it."""
        try:
            devices = tuple(self.target_devices)
        except TypeError:
            devices = ()
        if not devices or not all(isinstance(device, Device) for device in devices):
            raise ValueError(
                f"target_devices must list at least one Device, got {self.target_devices!r}. Read "
                "one with Device.parse, or take a JAX device's with Device.of."
            )
        if len(set(devices)) < len(devices):
            raise ValueError(f"target_devices must not repeat one, got {self.target_devices!r}.")
        object.__setattr__(self, "target_devices", devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The exact shape of one pool and its tables. Static: another one recompiles.

    Attributes:
      num_layers: Layers of the model that are cached.
      num_kv_heads: Heads whose keys and values are cached.
      head_dim: Numbers of one head.
      dtype: What a number is; anything that names a dtype, kept as the NumPy dtype.
      num_blocks: Blocks in the pool.
      block_size: Tokens of one block.
      max_seqs: Sequences held at once (rows of the tables).
      max_blocks_per_seq: Blocks that one sequence may hold (columns of the tables).

    Example:
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32",
      ...                  num_blocks=10, block_size=4, max_seqs=2, max_blocks_per_seq=5)
      >>> spec.block_bytes, spec.pool_bytes
      (512, 5120)
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DTypeLike
    num_blocks: int
    block_size: int
    max_seqs: int
    max_blocks_per_seq: int

    def __post_init__(self) -> None:
        """Checks each size, and that every index fits in an int32."""
        object.__setattr__(self, "dtype", to_dtype(self.dtype))
        for field in dataclasses.fields(self):
            if field.name != "dtype":
                settle_count(self, field.name, limit=INT32_LIMIT)
        for names in (
            ("num_blocks", "num_layers", "num_kv_heads"),
            ("num_blocks", "block_size"),
            ("max_blocks_per_seq", "block_size"),
        ):
            product = math.prod(getattr(self, name) for name in names)
            if product >= INT32_LIMIT:
                raise ValueError(
                    f"{' * '.join(names)} must be below 2**31 (indices are int32), got {product}. "
                    f"Lower {names[0]}."
                )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of all layers."""
        tokens = self.num_layers * self.num_kv_heads * self.block_size
        return 2 * tokens * self.head_dim * to_dtype(self.dtype).itemsize

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool, keys and values."""
        return self.num_blocks * self.block_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """What the model and the service ask of a cache, whatever the size of its pool.

    Attributes:
      num_layers: Layers of the model that are cached.
      num_kv_heads: Heads whose keys and values are cached (not the query heads).
      head_dim: Numbers of one head.
      dtype: What a number is; anything that `DataType.of` reads.
      max_seqs: Requests held at once.
      max_sequence_length: Tokens of the longest request, prompt and answer together.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DataType
    max_seqs: int
    max_sequence_length: int

    def __post_init__(self) -> None:
        """Checks each field."""
        object.__setattr__(self, "dtype", DataType.of(self.dtype))
        for field in dataclasses.fields(self):
            if field.name != "dtype":
                settle_count(self, field.name, limit=INT32_LIMIT)

    def spec(self, num_blocks: int, block_size: int) -> CacheSpec:
        """Says how a pool of this geometry is shaped.

        Args:
          num_blocks: Blocks in the pool.
          block_size: Tokens of one block.

        Returns:
          The spec; its rows are wide enough for `max_sequence_length` tokens.

        Raises:
          ValueError: If a size is below 1, or an index would not fit in an int32.
        """
        check_count("block_size", block_size)
        return CacheSpec(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype.jnp_dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            max_seqs=self.max_seqs,
            max_blocks_per_seq=ceil_div(self.max_sequence_length, block_size),
        )


_MODEL_KEYS = ("num_layers", "num_kv_heads", "head_dim", "dtype")
_LIMITS_KEYS = ("max_seqs", "max_sequence_length")


def load_config(path: str | pathlib.Path) -> tuple[CacheConfig, CacheGeometry]:
    """Reads a cache's configuration from a TOML file.

    The file has three tables: `[cache]` with any fields of `CacheConfig` (devices as text
    such as "gpu:0"), `[model]` with num_layers, num_kv_heads, head_dim and dtype, and
    `[limits]` with max_seqs and max_sequence_length.

    Args:
      path: The file.

    Returns:
      `(config, geometry)`.

    Raises:
      ValueError: If the file is not UTF-8 or not TOML, a table or key is unknown or missing, or a
        value is wrong. The text names the file and the key.
      OSError: If the file cannot be read.
    """
    try:
        tables = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
        _check_keys("the file", tables, known=("cache", "model", "limits"))
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise ValueError(f"[{name}] must be a table, got {table!r}.")
        model, limits = tables.get("model", {}), tables.get("limits", {})
        _check_keys("[model]", model, known=_MODEL_KEYS, required=_MODEL_KEYS)
        _check_keys("[limits]", limits, known=_LIMITS_KEYS, required=_LIMITS_KEYS)
        return _read_cache_table(tables.get("cache", {})), CacheGeometry(**model, **limits)
    except RecursionError as error:
        raise ValueError(f"{path}: values are nested too deeply. Flatten them.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_cache_table(table: Mapping[str, Any]) -> CacheConfig:
    """Builds a `CacheConfig` from its TOML table."""
    known = tuple(field.name for field in dataclasses.fields(CacheConfig))
    _check_keys("[cache]", table, known=known)
    fields = dict(table)
    if "target_devices" in table:
        names = table["target_devices"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"target_devices must be a list like ['gpu:0'], got {names!r}.")
        fields["target_devices"] = tuple(map(Device.parse, names))
    if "prefix_cache_config" in table:
        fields["prefix_cache_config"] = _read_nested(
            "prefix_cache_config", PrefixCacheConfig, table["prefix_cache_config"]
        )
    if "pressure_thresholds" in table:
        fields["pressure_thresholds"] = _read_nested(
            "pressure_thresholds", MemoryPressureThresholds, table["pressure_thresholds"]
        )
    return CacheConfig(**fields)


def _read_nested(name: str, cls: Any, table: object) -> Any:
    """Builds one of the dataclasses inside `[cache]` from its TOML table."""
    if not isinstance(table, Mapping):
        raise ValueError(f"[cache.{name}] must be a table, got {table!r}.")
    fields = dataclasses.fields(cls)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    _check_keys(f"[cache.{name}]", table, [field.name for field in fields], required)
    return cls(**table)


def _check_keys(
    where: str, table: Mapping[str, Any], known: Collection[str], required: Collection[str] = ()
) -> None:
    """Refuses unknown keys, and a table without its required ones."""
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}; known are {', '.join(known)}.")
    missing = [key for key in required if key not in table]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
