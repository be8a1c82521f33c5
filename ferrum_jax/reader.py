"""Reads from a model's configuration what its layers keep in a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ferrum_jax.checks import check_count
from ferrum_jax.layers import LayerGroup, equal_sized
from ferrum_jax.payload import KeyValue
from ferrum_jax.types import to_dtype

# What configurations call each size: Hugging Face, Tunix and gemma, GPT-2.
_NUM_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_NUM_Q_HEADS = ("num_attention_heads", "num_heads", "num_q_heads", "n_head", "n_heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTH = ("hidden_size", "embed_dim", "n_embd", "d_model")
_LAYER_TYPES = ("layer_types", "attention_types", "attention_pattern")
_WINDOW = ("sliding_window", "sliding_window_size")
_PERIOD = ("sliding_window_pattern", "_sliding_window_pattern")
_FULL_HEAD_DIM = ("global_head_dim", "global_key_size")
_FULL_KV_HEADS = ("num_global_key_value_heads", "num_global_kv_heads")
_DTYPE = ("dtype", "torch_dtype", "param_dtype")

_IS_FULL = {
    "full_attention": True,
    "GLOBAL": True,
    "sliding_attention": False,
    "LOCAL_SLIDING": False,
}
"""Names of the kinds of attention layers, and whether these keep all tokens."""

_ALL_WINDOWED = ("mistral", "mixtral", "phi3", "starcoder2")
"""Model types of which each layer has the window, if there is one."""

_OTHER_KINDS = (
    *("kv_lora_rank", "attention_chunk_size", "full_attention_interval", "layers_block_type"),
    *("hybrid_override_pattern", "attn_layer_period", "attn_layer_indices", "ssm_state_size"),
    *("mamba_d_state", "is_encoder_decoder"),
)
"""Fields of models with layers that keep something else than keys and values."""

_LEFT_OUT: dict[str, dict[str, int]] = {
    "cohere2": {"sliding_window_pattern": 4},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "gemma3n_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 5,
        "num_kv_shared_layers": 15,
    },
    "gemma4_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window_pattern": 2},
    "olmo3": {"sliding_window_pattern": 4},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128},
}
"""What a `config.json` may leave out, by model type: the defaults of Hugging Face's classes."""

_MAX_LISTED = 20  # Fields that an error lists.


class CachedLayers(NamedTuple):
    """What the layers of a model keep.

    Attributes:
      groups: Layer groups, cut to equal numbers of layers; see `equal_sized`.
      shared_layers: For each layer without a cache of its own, the layer that has it.
    """

    groups: tuple[LayerGroup, ...]
    shared_layers: dict[int, int]

    def fields(self) -> dict[str, Any]:
        """Returns the fields of a `CacheSpec` or a `CacheGeometry` that describe the layers."""
        first = self.groups[0]
        if len(self.groups) > 1 or first.sliding_window is not None or self.shared_layers:
            return self._asdict()
        return {"num_layers": len(first.layers), **dataclasses.asdict(first.payload)}


def cached_layers(config: Any, dtype: Any = None) -> CachedLayers:
    """Reads what the layers of a model keep, by the names of a configuration's fields.

    Args:
      config: The fields of a Hugging Face `config.json`, or an object with them; a model
        configuration of Tunix or gemma; anything with the same names of fields. Of a model for
        more than text, its text part is read.
      dtype: Dtype of the cache; the one that the configuration names if None.

    Returns:
      The layer groups, and the layers that share a cache.

    Raises:
      ValueError: If a field is missing, wrong or unknown; the text says what was looked for, and
        what there is.
    """
    fields = _Fields(config)
    for name in _OTHER_KINDS:
        if fields.get((name,)):
            raise ValueError(
                f"The config has {name}: some of its layers keep something else than a key and a "
                "value for each token, or see them in another way. Describe those that keep keys "
                "and values by groups=[LayerGroup(...)]."
            )
    num_layers = fields.count(_NUM_LAYERS)
    is_full = _kinds(fields, num_layers)
    shared = _shared_layers(fields, is_full)
    window = None if all(is_full) else fields.count(_WINDOW)
    layers: dict[tuple[int | None, KeyValue], list[int]] = {}
    dtype = fields.dtype() if dtype is None else to_dtype(dtype)
    for layer in range(num_layers):
        if layer not in shared:
            payload = _payload(fields, layer, dtype, is_full=is_full[layer])
            kind = None if is_full[layer] else window, payload
            layers.setdefault(kind, []).append(layer)
    return CachedLayers(equal_sized(_groups(layers)), shared)


class _Fields:
    """Fields of a configuration, a mapping or an object.

    Args:
      config: The configuration; its text part is taken if it has one.
    """

    def __init__(self, config: Any):
        if config is None or isinstance(config, (str, bytes, int, float)):
            raise ValueError(
                f"config must be a mapping, or an object with fields, got {config!r}. Read a file "
                "first, as by json.loads(path.read_text())."
            )
        self._config, self._whole, self._left_out = config, config, dict[str, int]()
        text = self.get(("text_config",))
        if text is not None and self.get(_NUM_LAYERS) is None:
            self._config = text
        self._left_out = _LEFT_OUT.get(str(self.get(("model_type",))), {})

    def get(self, names: Sequence[str]) -> Any:
        """Returns the first of some fields that is not None; None if there is none."""
        values = [_field_of(self._config, name) for name in names]
        values += [self._left_out.get(name) for name in names]
        return next((value for value in values if value is not None), None)

    def dtype(self) -> np.dtype:
        """Returns the dtype that is named, as text, as a dtype, or as one of PyTorch."""
        values = [_field_of(part, name) for part in (self._config, self._whole) for name in _DTYPE]
        value = next((value for value in values if value is not None), None)
        if value is None:
            raise ValueError(f"dtype must be given: the config has none of {', '.join(_DTYPE)}.")
        text = str(value).removeprefix("torch.")
        return to_dtype(text if isinstance(value, str) or text != str(value) else value)

    def count(self, names: Sequence[str]) -> int:
        """Returns the first of some fields, an integer of at least 1; raises if there is none."""
        value = self.get(names)
        if value is None:
            raise self.missing(names)
        return check_count(self._name_of(names), value)

    def missing(self, names: Sequence[str]) -> ValueError:
        """Returns the error for a configuration without a field that is needed."""
        config = self._config
        there = list(map(str, config)) if isinstance(config, Mapping) else _names_in(config)
        listed = ", ".join(there[:_MAX_LISTED]) + ", ..." * (len(there) > _MAX_LISTED)
        return ValueError(
            f"The config ({type(config).__name__}) has none of {', '.join(names)}; it has: "
            f"{listed or 'no fields'}. Add the field, or give the sizes by hand."
        )

    def _name_of(self, names: Sequence[str]) -> str:
        return next((n for n in names if _field_of(self._config, n) is not None), names[0])


def _field_of(config: Any, name: Any) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _names_in(config: Any) -> list[str]:
    """Returns the names of an object's fields, without those of its class alone."""
    if dataclasses.is_dataclass(config):
        return [field.name for field in dataclasses.fields(config)]
    return [name for name in getattr(config, "__dict__", {}) if not name.startswith("_")]


def _kinds(fields: _Fields, num_layers: int) -> list[bool]:
    """Returns for each layer whether it keeps all tokens; false for a sliding window."""
    types = fields.get(_LAYER_TYPES)
    if types is not None:
        types = list(types)
        if fields.get(_LAYER_TYPES[:2]) is None:  # A pattern is repeated.
            types = [types[layer % len(types)] for layer in range(num_layers)]
        if len(types) != num_layers:
            raise ValueError(
                f"The config has {num_layers} layers, and the types of {len(types)}. Name the type "
                "of each."
            )
        return [_is_full(kind) for kind in types]
    window = fields.get(_WINDOW)
    family, uses_window = fields.get(("model_type",)), fields.get(("use_sliding_window",))
    if window is None or uses_window is False:
        return [True] * num_layers
    if uses_window is not None:  # Qwen: the first layers keep all tokens.
        first = fields.count(("max_window_layers",))
        return [layer < first for layer in range(num_layers)]
    if family in _ALL_WINDOWED:
        return [False] * num_layers
    period = fields.get(_PERIOD)
    if period is None and fields.get(("global_base_frequency",)) is not None:
        period = 6  # Tunix: the pattern of Gemma 3 and 4 is not in the configuration.
    if period is None:
        raise ValueError(
            f"The config has a window of {window} tokens, and does not say which layers have it: "
            f"none of {', '.join((*_LAYER_TYPES, *_PERIOD))} is there. Add layer_types, with "
            "'full_attention' or 'sliding_attention' for each layer."
        )
    period = check_count(_PERIOD[0], period)
    return [(layer + 1) % period == 0 for layer in range(num_layers)]


def _is_full(kind: Any) -> bool:
    """Returns whether layers of a kind keep all tokens, by the name of the kind."""
    name = getattr(kind, "name", kind)
    if not isinstance(name, str) or name not in _IS_FULL:
        raise ValueError(
            f"A layer of type {name!r} is not one of {', '.join(_IS_FULL)}. Describe the layers "
            "that keep keys and values by groups=[LayerGroup(...)]."
        )
    return _IS_FULL[name]


def _shared_layers(fields: _Fields, is_full: Sequence[bool]) -> dict[int, int]:
    """Returns the layers without a cache: each reads that of the last of its kind before them."""
    num_layers, num_shared = len(is_full), fields.get(("num_kv_shared_layers",)) or 0
    sharing = fields.get(("kv_cache_sharing_config",))
    share = _field_of(sharing, "frac_shared_layers")
    if sharing is None:
        share = fields.get(("frac_shared_layers",))
    if share:
        num_shared = num_layers - int(num_layers - share * num_layers)
    num_shared = check_count("num_kv_shared_layers", num_shared, minimum=0)
    first, shared = num_layers - num_shared, dict[int, int]()
    for layer in range(first, num_layers):
        flag = "share_global" if is_full[layer] else "share_local"
        if sharing is not None and not _field_of(sharing, flag):
            continue
        owners = [other for other in range(first) if is_full[other] == is_full[layer]]
        if not owners:
            raise ValueError(
                f"The last {num_shared} of {num_layers} layers read the caches of earlier ones, "
                f"and there is none of the kind of layer {layer}. Lower num_kv_shared_layers."
            )
        shared[layer] = owners[-1]
    return shared


def _payload(fields: _Fields, layer: int, dtype: np.dtype, *, is_full: bool) -> KeyValue:
    """Returns what a layer keeps per token: some models have other heads where all are kept."""
    own = _field_of(fields.get(("per_layer_config",)) or {}, layer)
    own_heads = _field_of(own, "num_key_value_heads")
    own_head_dim = _field_of(own, "head_dim")
    if is_full and own is None:
        own_head_dim = fields.get(_FULL_HEAD_DIM)
        if fields.get(("attention_k_eq_v",)) is not False:
            own_heads = fields.get(_FULL_KV_HEADS)
    num_q_heads = fields.count(_NUM_Q_HEADS)
    num_kv_heads = own_heads or fields.get(_NUM_KV_HEADS) or num_q_heads
    if fields.get(("multi_query",)) and not fields.get(("new_decoder_architecture",)):
        num_kv_heads = 1
    head_dim = own_head_dim or fields.get(("head_dim",))
    if head_dim is None:
        head_dim = fields.count(_WIDTH) // num_q_heads
    return KeyValue(num_kv_heads, head_dim, dtype)


def _groups(layers: Mapping[tuple[int | None, KeyValue], Iterable[int]]) -> list[LayerGroup]:
    """Returns a group for each window and payload, with a name of its own."""
    groups: list[LayerGroup] = []
    for (window, payload), of_group in layers.items():
        name = "full" if window is None else f"window-{window}"
        if any(group.name == name for group in groups):
            name = f"{name}-{payload.num_kv_heads}x{payload.head_dim}"
        groups.append(LayerGroup(name, tuple(of_group), payload, window))
    return groups
