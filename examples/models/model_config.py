"""The shape of a model, read from a config.json or from the fields of a GGUF file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from examples.models.gemma3 import Gemma3Config
from examples.models.inputs import Fields, short
from examples.models.llama import LlamaConfig
from examples.models.shape import ModelConfig

# Far above any model; RoPE keeps a divisor for every second feature.
MAX_HEAD_DIM, MAX_LAYERS = 1 << 16, 1 << 16
ACTIVATIONS = {
    "llama": "silu",
    "mistral": "silu",
    "qwen3": "silu",
    "gemma3_text": "gelu_pytorch_tanh",
}
GEMMA3_PATTERN = 6  # Every sixth layer sees all tokens.


def from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Reads the shape of a model from a Hugging Face config.

    Args:
      values: Fields of config.json.

    Returns:
      The shape.

    Raises:
      ValueError: If the model is of another family, or a field is missing or wrong.
    """
    fields = Fields(values)
    family = fields.get("model_type", None)
    activation = fields.get("hidden_activation", fields.get("hidden_act", "silu"))
    if not isinstance(family, str) or ACTIVATIONS.get(family) != activation:
        known = ", ".join(f"{name!r} with {value!r}" for name, value in ACTIVATIONS.items())
        raise ValueError(
            f"describes a {short(repr(family))} model with activation {short(repr(activation))}; "
            f"these decoders read {known}. Choose a model of these families."
        )
    num_q_heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    default_head_dim = width // num_q_heads if family in ("llama", "mistral") else None
    sizes: dict[str, Any] = {
        "vocab_size": fields.count("vocab_size"),
        "width": width,
        "num_layers": _bounded("num_hidden_layers", fields, MAX_LAYERS),
        "num_q_heads": num_q_heads,
        "num_kv_heads": fields.count("num_key_value_heads", num_q_heads),
        "head_dim": _bounded("head_dim", fields, MAX_HEAD_DIM, default_head_dim),
        "mlp_width": fields.count("intermediate_size"),
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "ties_embeddings": fields.flag("tie_word_embeddings", family == "gemma3_text"),
        "max_sequence_length": fields.count("max_position_embeddings", 2048),
    }
    if family == "gemma3_text":
        return _gemma3_from_json(fields, sizes)
    rope = fields.fields("rope_parameters", "rope_scaling")
    base = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    window, full_layers = fields.count("sliding_window", None), ()
    if family == "qwen3" and not fields.flag("use_sliding_window", False):
        window = None
    elif family == "qwen3":
        first = fields.count("max_window_layers", 28)
        full_layers = _full_layers(fields, range(min(first, sizes["num_layers"])), sizes)
    return LlamaConfig(
        **sizes,
        rope_base=base,
        rope_divisors=_rope_divisors(rope, base, sizes["head_dim"]),
        normalizes_heads=family == "qwen3",
        sliding_window=window,
        full_layers=full_layers,
    )


def _gemma3_from_json(fields: Fields, sizes: dict[str, Any]) -> Gemma3Config:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.get(name, None) is not None:
            raise ValueError(f"{name} is set; this decoder has no soft cap. Choose a Gemma 3.")
    rope = fields.fields("rope_parameters", "rope_scaling")
    local = rope.fields("sliding_attention")
    if rope.get("full_attention", None) is not None:
        rope = rope.fields("full_attention")
    base = rope.number("rope_theta", fields.number("rope_theta", 1_000_000.0))
    pattern = fields.count("sliding_window_pattern", GEMMA3_PATTERN)
    default = range(pattern - 1, sizes["num_layers"], pattern)
    return Gemma3Config(
        **sizes,
        rope_base=base,
        rope_divisors=_rope_divisors(rope, base, sizes["head_dim"]),
        local_rope_base=local.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0)),
        attention_scale=fields.number("query_pre_attn_scalar", sizes["head_dim"]) ** -0.5,
        sliding_window=fields.count("sliding_window"),
        full_layers=_full_layers(fields, default, sizes),
    )


def from_gguf(
    values: Mapping[str, Any],
    vocab_size: int,
    rope_divisors: Sequence[float] | None,
    *,
    ties_embeddings: bool,
) -> ModelConfig:
    """Reads the shape of a model from a GGUF file.

    Args:
      values: Metadata of the file, as `key -> value`.
      vocab_size: Rows of the embedding.
      rope_divisors: The file's divisors of the rotary frequencies, if it has any.
      ties_embeddings: Whether the file has no output matrix of its own.

    Returns:
      The shape.

    Raises:
      ValueError: If the model is of another family, or a field is missing or wrong.
    """
    family = values.get("general.architecture")
    if family not in ("llama", "gemma3"):
        raise ValueError(
            f"general.architecture is {family!r}; these decoders read 'llama' and 'gemma3'. "
            "Choose a model of these families, or pass a Hugging Face folder."
        )
    fields = Fields(values, f"{family}.")
    num_q_heads, width = fields.count("attention.head_count"), fields.count("embedding_length")
    if rope_divisors is not None:
        if not all(0 < divisor < math.inf for divisor in rope_divisors):
            raise ValueError("rope_freqs.weight must hold finite numbers above 0. Convert again.")
        rope_divisors = tuple(rope_divisors)
    head_dim = _bounded("attention.key_length", fields, MAX_HEAD_DIM, width // num_q_heads)
    if fields.get("rope.scaling.type", None) == "linear":
        rope_divisors = (fields.number("rope.scaling.factor"),) * (head_dim // 2)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "width": width,
        "num_layers": _bounded("block_count", fields, MAX_LAYERS),
        "num_q_heads": num_q_heads,
        "num_kv_heads": fields.count("attention.head_count_kv", num_q_heads),
        "head_dim": head_dim,
        "mlp_width": fields.count("feed_forward_length"),
        "norm_epsilon": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_divisors": rope_divisors,
        "ties_embeddings": ties_embeddings,
        "max_sequence_length": fields.count("context_length"),
    }
    if family == "llama":
        return LlamaConfig(**sizes, rope_base=fields.number("rope.freq_base", 10_000.0))
    # Neither the pattern of the layers nor the local RoPE base is in the file.
    num_layers = sizes["num_layers"]
    return Gemma3Config(
        **sizes,
        rope_base=fields.number("rope.freq_base", 1_000_000.0),
        sliding_window=fields.count("attention.sliding_window"),
        full_layers=tuple(range(GEMMA3_PATTERN - 1, num_layers, GEMMA3_PATTERN)),
    )


def _bounded(name: str, fields: Fields, limit: int, default: int | None = None) -> int:
    """Reads a count of which no model has more than a limit; it has no default if that is None."""
    value = fields.count(name) if default is None else fields.count(name, default)
    if not 1 <= value <= limit:
        raise ValueError(
            f"describes {name}={value}; 1 to {limit} are possible. Download the model again."
        )
    return value


def _full_layers(
    fields: Fields, default: Sequence[int], sizes: Mapping[str, Any]
) -> tuple[int, ...]:
    """Returns the layers that see all tokens: those that the config lists, or the default."""
    types = fields.get("layer_types", None)
    if types is None:
        return tuple(default)
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, list)
        or len(types) != sizes["num_layers"]
        or not all(kind in known for kind in types)
    ):
        raise ValueError(
            f"layer_types must be {' or '.join(known)} for each of {sizes['num_layers']} layers. "
            "Download the model again."
        )
    return tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")


def _rope_divisors(rope: Fields, base: float, head_dim: int) -> tuple[float, ...] | None:
    """Returns the divisor of each rotary frequency, for the known ways to extend contexts."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return (rope.number("factor"),) * (head_dim // 2)
    if kind != "llama3":
        raise ValueError(
            f"scales RoPE by {short(repr(kind))}; known ways are 'linear' and 'llama3'. "
            "Choose a model with one of these."
        )
    factor, original = rope.number("factor"), rope.number("original_max_position_embeddings")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise ValueError(f"high_freq_factor ({high}) must be above low_freq_factor ({low}).")
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / head_dim)
        turns = original / wavelength
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / factor))
    return tuple(divisors)
