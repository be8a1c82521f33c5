"""Configuration: pool size, model geometry, prefix caching, tiers and pressure thresholds.

Each class is frozen and hashable. A wrong value raises a `ValueError` that names the field.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from ferrum_jax.checks import (
    INT32_LIMIT,
    check_flag,
    check_number,
    check_path,
    check_type,
    settle_count,
)
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.layers import LayerGroup
from ferrum_jax.payload import KeyValue
from ferrum_jax.types import Device, MemoryPressure


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPressureThresholds:
    """Shares of the pool in use at which the levels of memory pressure begin.

    Attributes:
      medium_threshold: Share at which Medium begins, in [0, 1].
      high_threshold: Share at which High begins, above `medium_threshold`.
      critical_threshold: Share at which Critical begins, above `high_threshold`; at most 1.

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
        """Returns the pressure level of a pool.

        Args:
          used: Blocks, or bytes, in use.
          total: Blocks, or bytes, of the pool.

        Returns:
          The highest level with a threshold of at most `used / total`; Low if `used` is 0.

        Raises:
          ValueError: `used` is not from 0 to `total`.
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
    """Which prompt prefixes are cached for later requests. No field has a default.

    Attributes:
      max_prefixes: Maximum number of cached prefixes.
      min_prefix_length: Minimum length of a cached prefix, in tokens.
      prefix_ttl_seconds: Time to live of an unused prefix, above 0; `math.inf` for no limit.
      enable_cross_request_sharing: Whether requests without a salt share prefixes.
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
    """Storage of swapped-out requests: host memory first, then disk.

    Attributes:
      host_budget_bytes: Maximum bytes in host memory; the pool's maximum size if None.
      disk_directory: Directory for files, used by one manager only; None for no disk tier.
      disk_budget_bytes: Maximum bytes of all files; None for no limit but the disk's.
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
    """Configuration of a manager's pools. The model's sizes are in `CacheGeometry`.

    Layer groups of different geometry have a pool each, and the numbers of blocks are those of each
    pool. Groups with `num_blocks` have a pool of that size from the start.

    Attributes:
      block_size: Tokens per block.
      max_blocks: Maximum number of blocks in each pool.
      initial_blocks: Number of blocks that a pool starts with, at most `max_blocks`.
      enable_pooling: Whether a grown pool keeps blocks that are free.
      target_devices: Devices of the pools, the preferred one first. The contract's default is the
        CPU, even if there are other devices; `(Device.of(jax.devices()[0]),)` is JAX's default.
      enable_prefix_caching: Whether prompts share prefixes; requires `prefix_cache_config`.
      prefix_cache_config: Which prefixes are cached.
      enable_multi_device: Whether every target device has a pool, not only the first one.
      pressure_thresholds: Shares of a pool in use at which pressure rises.

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
                f"({self.max_blocks}). Lower initial_blocks too."
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
        """Makes `target_devices` a tuple of distinct devices, or raises ValueError."""
        try:
            devices = tuple(self.target_devices)
        except TypeError:
            devices = ()
        if not devices or not all(isinstance(device, Device) for device in devices):
            raise ValueError(
                f"target_devices must list at least one Device, got {self.target_devices!r}. Make "
                "one with Device.parse(text) or Device.of(jax_device)."
            )
        if len(set(devices)) < len(devices):
            raise ValueError(f"target_devices must be distinct, got {self.target_devices!r}.")
        object.__setattr__(self, "target_devices", devices)


_PAYLOAD_KEYS = ("num_kv_heads", "head_dim", "dtype")
_MODEL_KEYS = ("num_layers", *_PAYLOAD_KEYS)
_GROUP_KEYS = ("name", "layers", *_PAYLOAD_KEYS)
_LIMITS_KEYS = ("max_seqs", "max_sequence_length")


def load_config(path: str | pathlib.Path) -> tuple[CacheConfig, CacheGeometry]:
    """Reads a cache's configuration from a TOML file.

    The file has three tables: `[cache]` with any fields of `CacheConfig` (devices as text such as
    "gpu:0"), `[model]` with num_layers, num_kv_heads, head_dim and dtype, and `[limits]` with
    max_seqs and max_sequence_length. If layers differ, `[[model.groups]]` describe them instead,
    each with name, layers, num_kv_heads, head_dim, dtype and perhaps sliding_window or num_blocks;
    and `[model.shared_layers]` maps layers to those that they read.

    Args:
      path: Path of the file.

    Returns:
      `(config, geometry)`.

    Raises:
      ValueError: The file is not UTF-8 or not TOML, a table or key is unknown or missing, or a
        value is wrong. The text names the file and the key.
      OSError: The file cannot be read.
    """
    try:
        tables = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
        _check_keys("the file", tables, known=("cache", "model", "limits"))
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise ValueError(f"[{name}] must be a table, got {table!r}.")
        model, limits = tables.get("model", {}), tables.get("limits", {})
        _check_keys("[limits]", limits, known=_LIMITS_KEYS, required=_LIMITS_KEYS)
        geometry = CacheGeometry(**_read_model_table(model), **limits)
        return _read_cache_table(tables.get("cache", {})), geometry
    except RecursionError as error:
        raise ValueError(f"{path}: values are nested too deeply. Flatten them.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_cache_table(table: Mapping[str, Any]) -> CacheConfig:
    """Makes a `CacheConfig` from the TOML table `[cache]`."""
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


def _read_model_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `CacheGeometry` in the TOML table `[model]`."""
    if "groups" not in table:
        _check_keys("[model]", table, known=(*_MODEL_KEYS, "groups"), required=_MODEL_KEYS)
        return dict(table)
    _check_keys("[model]", table, known=("groups", "shared_layers"))
    groups = table["groups"]
    if not isinstance(groups, list) or not all(isinstance(it, Mapping) for it in groups):
        raise ValueError(f"[[model.groups]] must be tables, got {groups!r}.")
    return {**table, "groups": [_read_group(group) for group in groups]}


def _read_group(table: Mapping[str, Any]) -> LayerGroup:
    """Makes a layer group from its TOML table."""
    options = "sliding_window", "num_blocks"
    _check_keys("[[model.groups]]", table, (*_GROUP_KEYS, *options), _GROUP_KEYS)
    payload = KeyValue(*(table[key] for key in _PAYLOAD_KEYS))
    return LayerGroup(table["name"], table["layers"], payload, *map(table.get, options))


def _read_nested(name: str, cls: Any, table: object) -> Any:
    """Makes one of the dataclasses inside `[cache]` from its TOML table."""
    if not isinstance(table, Mapping):
        raise ValueError(f"[cache.{name}] must be a table, got {table!r}.")
    fields = dataclasses.fields(cls)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    _check_keys(f"[cache.{name}]", table, [field.name for field in fields], required)
    return cls(**table)


def _check_keys(
    where: str, table: Mapping[str, Any], known: Collection[str], required: Collection[str] = ()
) -> None:
    """Raises ValueError if a table has an unknown key, or lacks a required one."""
    for key in table:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}; use one of {', '.join(known)}.")
    if missing := [key for key in required if key not in table]:
        raise ValueError(f"{where} lacks {', '.join(missing)}. Add the missing keys.")
