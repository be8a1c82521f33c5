"""Writes a model's weights as a Hugging Face folder, for engines that read one."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from examples.models.llama import LlamaConfig
from examples.models.shape import ModelConfig


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
    heads, kv_heads, size = config.num_q_heads, config.num_kv_heads, config.head_dim
    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not config.ties_embeddings:
        tensors["lm_head.weight"] = params["head"]
    for layer in range(config.num_layers):
        weights, prefix = params["layers"][layer], f"model.layers.{layer}."
        q, k, v = np.split(
            np.asarray(weights["attention"]["qkv"]), (heads * size, (heads + kv_heads) * size)
        )
        gate, up = np.split(np.asarray(weights["mlp"]["gate_up"]), 2)
        tensors |= {
            f"{prefix}input_layernorm.weight": weights["attention_norm"]["scale"],
            f"{prefix}self_attn.q_proj.weight": q,
            f"{prefix}self_attn.k_proj.weight": k,
            f"{prefix}self_attn.v_proj.weight": v,
            f"{prefix}self_attn.o_proj.weight": weights["attention"]["out"],
            f"{prefix}post_attention_layernorm.weight": weights["mlp_norm"]["scale"],
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": weights["mlp"]["down"],
        }
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_hub_config(config)), encoding="utf-8")
    return folder


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
