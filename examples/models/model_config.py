"""The shape of a model, read from a config.json or from the fields of a GGUF file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from examples.models.inputs import Fields, short
from examples.models.llama import LlamaConfig

MAX_HEAD_DIM = 1 << 16  # Far above any model; RoPE keeps a divisor for every second feature.


def from_json(values: Mapping[str, Any]) -> LlamaConfig:
    """Reads the shape of a model from a Hugging Face config.

    Args:
      values: Fields of config.json.

    Returns:
      The shape.

    Raises:
      ValueError: If the model is of another family, or a field is missing or wrong.
    """
    fields = Fields(values)
    kind, activation = fields.get("model_type", None), fields.get("hidden_act", "silu")
    if kind not in ("llama", "mistral") or activation != "silu":
        raise ValueError(
            f"describes a {short(repr(kind))} model with activation {short(repr(activation))}; "
            "this decoder reads 'llama' and 'mistral' with 'silu'. Choose a Llama-family model."
        )
    num_q_heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    head_dim = _check_head_dim(fields.count("head_dim", width // num_q_heads))
    rope = fields.fields("rope_parameters", "rope_scaling")
    base = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    return LlamaConfig(
        vocab_size=fields.count("vocab_size"),
        width=width,
        num_layers=fields.count("num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=fields.count("num_key_value_heads", num_q_heads),
        head_dim=head_dim,
        mlp_width=fields.count("intermediate_size"),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_divisors=_rope_divisors(rope, base, head_dim),
        ties_embeddings=fields.flag("tie_word_embeddings", False),
        sliding_window=fields.count("sliding_window", None),
        max_sequence_length=fields.count("max_position_embeddings", 2048),
    )


def from_gguf(
    values: Mapping[str, Any],
    vocab_size: int,
    rope_divisors: Sequence[float] | None,
    *,
    ties_embeddings: bool,
) -> LlamaConfig:
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
    kind = values.get("general.architecture")
    if kind != "llama":
        raise ValueError(
            f"general.architecture is {kind!r}; this decoder reads 'llama'. "
            "Choose a Llama-family model."
        )
    fields = Fields(values, "llama.")
    num_q_heads, width = fields.count("attention.head_count"), fields.count("embedding_length")
    if rope_divisors is not None:
        if not all(0 < divisor < math.inf for divisor in rope_divisors):
            raise ValueError("rope_freqs.weight must hold finite numbers above 0. Convert again.")
        rope_divisors = tuple(rope_divisors)
    return LlamaConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=fields.count("block_count"),
        num_q_heads=num_q_heads,
        num_kv_heads=fields.count("attention.head_count_kv", num_q_heads),
        head_dim=_check_head_dim(fields.count("attention.key_length", width // num_q_heads)),
        mlp_width=fields.count("feed_forward_length"),
        norm_epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        rope_base=fields.number("rope.freq_base", 10_000.0),
        rope_divisors=rope_divisors,
        ties_embeddings=ties_embeddings,
        max_sequence_length=fields.count("context_length"),
    )


def _check_head_dim(head_dim: int) -> int:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"describes heads of {head_dim} features; 1 to {MAX_HEAD_DIM} are possible. "
            "Download the model again."
        )
    return head_dim


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
