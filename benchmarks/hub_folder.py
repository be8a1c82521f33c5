"""Writes a model's weights as a Hugging Face folder, for engines that read one."""

import functools
import json
import operator
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from examples.models.llama import LlamaConfig
from examples.models.shape import ModelConfig
from examples.models.weights import LAYER_TENSORS


def write_folder(
    folder: pathlib.Path, config: ModelConfig, params: Mapping[str, Any]
) -> pathlib.Path:
    """Writes config.json and model.safetensors of a model of the Llama family.

    Args:
      folder: Where to write; it exists.
      config: Shape of the model.
      params: Its weights, as `examples.models.weights.load` returns them.

    Returns:
      The folder.

    Raises:
      ValueError: The model is of another family.
    """
    if type(config) is not LlamaConfig:
        raise ValueError(f"{type(config).__name__} is not of the Llama family. Leave --peers out.")
    tensors = {
        "model.embed_tokens": params["embedding"],
        "model.norm": params["norm"]["scale"],
    }
    if not config.ties_embeddings:
        tensors["lm_head"] = params["head"]
    for layer in range(config.num_layers):
        for path, names in LAYER_TENSORS.items():
            stacked = functools.reduce(operator.getitem, path.split("."), params["layers"][layer])
            parts = np.split(np.asarray(stacked), _bounds(config, len(names)))
            tensors |= {
                f"model.layers.{layer}.{name}": part
                for name, part in zip(names, parts, strict=True)
            }
    tensors = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_hub_config(config)), encoding="utf-8")
    return folder


def _bounds(config: ModelConfig, num_parts: int) -> list[int]:
    """Returns the rows at which a stacked weight is cut: queries, keys, values, or equal parts."""
    if num_parts == 3:
        heads = config.num_q_heads, config.num_q_heads + config.num_kv_heads
        return [config.head_dim * count for count in heads]
    return [config.mlp_width * part for part in range(1, num_parts)]


def _hub_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope(0).base,
        "hidden_act": "silu",
        "tie_word_embeddings": config.ties_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
