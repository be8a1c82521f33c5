"""Caches for the configurations of real models: Hugging Face's, Tunix's, gemma's."""

import dataclasses
import enum
import types

import pytest

from ferrum_jax import CacheGeometry, CacheSpec
from ferrum_jax.reader import cached_layers
from ferrum_jax.types import DataType

SIZES = {"num_blocks": 8, "block_size": 16, "max_seqs": 2, "max_sequence_length": 40}


class AttentionType(enum.Enum):
    """As in Tunix and gemma, under names of their own."""

    GLOBAL = 1
    LOCAL_SLIDING = 2


LOCAL, GLOBAL = AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL


def typed(num_layers, period):
    """Hugging Face's layer types, every `period`-th one full."""
    kinds = ("sliding_attention", "full_attention")
    return [kinds[(layer + 1) % period == 0] for layer in range(num_layers)]


def every(num_layers, period):
    """The layers that keep all tokens."""
    return list(range(period - 1, num_layers, period))


GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
}
GEMMA_4_E2B = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "num_kv_shared_layers": 20,
    "attention_k_eq_v": False,
    "num_global_key_value_heads": None,
    "layer_types": typed(35, 5),
    "dtype": "bfloat16",
}
TUNIX_GEMMA_4_31B = {
    "num_layers": 60,
    "embed_dim": 5376,
    "num_heads": 32,
    "head_dim": 256,
    "num_kv_heads": 16,
    "num_global_kv_heads": 4,
    "global_key_size": 512,
    "sliding_window_size": 1024,
    "attention_pattern": (LOCAL,) * 5 + (GLOBAL,),
    "frac_shared_layers": 0.0,
    "k_eq_v_global": True,
    "dtype": "float32",
}
GEMMA_3N_SHARING = types.SimpleNamespace(
    frac_shared_layers=15 / 35, share_global=True, share_local=True
)

# Name: config, layers, layers that keep all tokens, window, (heads, head_dim) of windowed and of
# full layers, layers without a cache.
MODELS = {
    "Llama 3.2 1B": (
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "torch_dtype": "bfloat16",
        },
        *(16, range(16), None, None, (8, 64), 0),
    ),
    "Mistral 7B v0.1": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "torch_dtype": "bfloat16",
        },
        *(32, [], 4096, (8, 128), None, 0),
    ),
    "Mistral 7B v0.3": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
        },
        *(32, range(32), None, None, (8, 128), 0),
    ),
    "Qwen 2.5 0.5B": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32768,
            "use_sliding_window": False,
            "max_window_layers": 24,
            "torch_dtype": "bfloat16",
        },
        *(24, range(24), None, None, (2, 64), 0),
    ),
    "Qwen 3 with a window": (
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "use_sliding_window": True,
            "max_window_layers": 14,
            "torch_dtype": "bfloat16",
        },
        *(28, range(14), 4096, (8, 128), (8, 128), 0),
    ),
    "Gemma 3 1B": (GEMMA_3_1B, 26, every(26, 6), 512, (1, 256), (1, 256), 0),
    "Gemma 3 4B, with what its file leaves out": (
        {
            "model_type": "gemma3",
            "torch_dtype": "bfloat16",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "num_hidden_layers": 34,
                "sliding_window": 1024,
            },
        },
        *(34, every(34, 6), 1024, (4, 256), (4, 256), 0),
    ),
    "Gemma 3n E4B": (
        {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 35,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "sliding_window": 512,
            "num_kv_shared_layers": 15,
            "layer_types": typed(35, 5),
            "torch_dtype": "bfloat16",
        },
        *(35, every(35, 5), 512, (2, 256), (2, 256), 15),
    ),
    "Gemma 4 E2B": (GEMMA_4_E2B, 35, every(35, 5), 512, (1, 256), (1, 512), 20),
    "Gemma 4, its global heads by layer": (
        {
            **GEMMA_4_E2B,
            "per_layer_config": {i: {"head_dim": 512} for i in every(35, 5)},
        },
        *(35, every(35, 5), 512, (1, 256), (1, 512), 20),
    ),
    "Gemma 4, global heads that its keys do not use": (
        {**GEMMA_4_E2B, "num_global_key_value_heads": 4},
        *(35, every(35, 5), 512, (1, 256), (1, 512), 20),
    ),
    "gpt-oss 20B": (
        {
            "model_type": "gpt_oss",
            "hidden_size": 2880,
            "num_attention_heads": 64,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "layer_types": typed(24, 2),
            "torch_dtype": "bfloat16",
        },
        *(24, every(24, 2), 128, (8, 64), (8, 64), 0),
    ),
    "GPT-2": (
        {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "dtype": "float32"},
        *(12, range(12), None, None, (12, 64), 0),
    ),
    "Tunix Gemma 3 270M": (
        {
            "num_layers": 18,
            "embed_dim": 640,
            "num_heads": 4,
            "head_dim": 256,
            "num_kv_heads": 1,
            "sliding_window_size": 512,
            "local_base_frequency": 10_000,
            "global_base_frequency": 1_000_000,
            "param_dtype": "bfloat16",
        },
        *(18, every(18, 6), 512, (1, 256), (1, 256), 0),
    ),
    "Tunix Gemma 4 31B": (TUNIX_GEMMA_4_31B, 60, every(60, 6), 1024, (16, 256), (4, 512), 0),
    "gemma Gemma 2 2B": (
        {
            "embed_dim": 2304,
            "num_heads": 8,
            "head_dim": 256,
            "num_kv_heads": 4,
            "num_layers": 26,
            "sliding_window_size": 4096,
            "attention_types": (LOCAL, GLOBAL) * 13,
            "dtype": "bfloat16",
        },
        *(26, every(26, 2), 4096, (4, 256), (4, 256), 0),
    ),
    "gemma Gemma 3n E4B": (
        {
            "num_heads": 8,
            "head_dim": 256,
            "num_kv_heads": 2,
            "num_layers": 35,
            "sliding_window_size": 512,
            "attention_types": ((LOCAL,) * 4 + (GLOBAL,)) * 7,
            "kv_cache_sharing_config": GEMMA_3N_SHARING,
            "dtype": "bfloat16",
        },
        *(35, every(35, 5), 512, (2, 256), (2, 256), 15),
    ),
}


@pytest.mark.parametrize("is_mapping", [True, False], ids=["mapping", "object"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_real_model_keep_what_it_says(name, is_mapping):
    fields, num_layers, full, window, of_local, of_full, num_shared = MODELS[name]
    config = fields if is_mapping else types.SimpleNamespace(**fields)
    layers = cached_layers(config)
    kept = {
        layer: (group.sliding_window, (group.payload.num_kv_heads, group.payload.head_dim))
        for group in layers.groups
        for layer in group.layers
    }
    first_shared = num_layers - num_shared
    for layer in range(num_layers):
        owner = layers.shared_layers.get(layer, layer)
        is_full = layer in full
        assert kept[owner] == ((None, of_full) if is_full else (window, of_local)), layer
        last = max(x for x in range(first_shared) if (x in full) == is_full)
        assert owner == (layer if layer < first_shared else last)
    assert len(kept) + len(layers.shared_layers) == num_layers


def test_a_spec_and_a_geometry_of_one_config_are_one_cache():
    for name, (config, *_) in MODELS.items():
        spec = CacheSpec.of(config, dtype="float16", **SIZES)
        geometry = CacheGeometry.of(config, max_seqs=2, max_sequence_length=40, dtype=DataType.FP16)
        assert geometry.spec(num_blocks=8, block_size=16) == spec, name
        assert spec.max_blocks_per_seq == 3
        alike = len(spec.layer_groups) == 1 and spec.layer_groups[0].sliding_window is None
        assert (spec.num_layers is not None) == alike


def test_the_dtype_is_that_of_the_config_unless_another_is_asked_for():
    def dtype_of(asked, **fields):
        config = {**MODELS["GPT-2"][0], "dtype": None, **fields}
        return CacheSpec.of(config, dtype=asked, **SIZES).layer_groups[0].payload.dtype

    class Torch:
        def __str__(self):
            return "torch.bfloat16"

    assert dtype_of(None, torch_dtype="float16") == "float16"
    assert dtype_of(None, dtype=Torch()) == "bfloat16"
    assert dtype_of(None, param_dtype=DataType.BF16.jnp_dtype) == "bfloat16"
    assert dtype_of("float32", torch_dtype="float16") == "float32"
    with pytest.raises(ValueError, match="dtype must be given: the config has none of dtype"):
        dtype_of(None)


@dataclasses.dataclass
class Unknown:
    depth: int = 3
    kv_heads: int = 2


REFUSED = {
    "no layers": (Unknown(), r"Unknown\) has none of num_hidden_layers.*it has: depth, kv_heads"),
    "empty": ({}, r"dict\) has none of num_hidden_layers.*it has: no fields"),
    "a path": ("config.json", "must be a mapping, or an object.*json.loads"),
    "no heads": ({"num_layers": 2, "dtype": "float32"}, "none of num_attention_heads"),
    "no width": ({"n_layer": 2, "n_head": 2, "dtype": "float32"}, "none of hidden_size"),
    "no window": (
        {**GEMMA_3_1B, "model_type": "x", "sliding_window": None, "layer_types": typed(26, 6)},
        "none of sliding_window",
    ),
    "unknown pattern": (
        {**GEMMA_3_1B, "model_type": "x", "sliding_window_pattern": None},
        "512 tokens, and does not say which layers.*Add layer_types",
    ),
    "other kinds": (
        {**GEMMA_3_1B, "layer_types": ["linear_attention"] * 26},
        "type 'linear_attention' is not one of full_attention",
    ),
    "too few kinds": (
        {**GEMMA_3_1B, "layer_types": typed(25, 6)},
        "and the types of 25",
    ),
    "latent vectors": ({**GEMMA_3_1B, "kv_lora_rank": 512}, "The config has kv_lora_rank"),
    "an encoder": ({**GEMMA_3_1B, "is_encoder_decoder": True}, "has is_encoder_decoder"),
    "no number": (
        {**GEMMA_3_1B, "num_hidden_layers": "26"},
        "num_hidden_layers must be an i",
    ),
    "heads by layer": (
        {**GEMMA_3_1B, "num_key_value_heads": [1, 2]},
        "num_kv_heads must be an i",
    ),
    "none to read": ({**GEMMA_4_E2B, "num_kv_shared_layers": 35}, "none of the kind of layer 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_config_that_cannot_be_read_is_refused_with_what_was_looked_for(kind):
    config, told = REFUSED[kind]
    with pytest.raises(ValueError, match=told):
        CacheSpec.of(config, **SIZES)
    with pytest.raises(ValueError, match=told):
        CacheGeometry.of(config, max_seqs=2, max_sequence_length=40)


def test_a_query_head_of_one_key_and_value_is_read_from_multi_query():
    falcon = {"num_hidden_layers": 2, "num_attention_heads": 71, "hidden_size": 4544}
    for more, num_heads in (
        ({"multi_query": True}, 1),
        ({"multi_query": False}, 71),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 8}, 8),
    ):
        spec = CacheSpec.of({**falcon, **more}, dtype="float32", **SIZES)
        assert (spec.num_kv_heads, spec.head_dim) == (num_heads, 64)
