"""Tiny models of each Tunix family with random weights, a tokenizer, and dense logits."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma4 import model as gemma4
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

VOCAB, WINDOW = 98, 6
_SIZES = {"embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
_ROPE = {"vocab_size": VOCAB, "rope_theta": 10_000, "norm_eps": 1e-6}
_LOCAL, _GLOBAL = gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL
_LOCAL4, _GLOBAL4 = gemma4.AttentionType.LOCAL_SLIDING, gemma4.AttentionType.GLOBAL

CONFIGS = {
    "Llama3": llama3.ModelConfig(num_layers=2, **_SIZES, **_ROPE),
    "Qwen2": qwen2.ModelConfig(num_layers=2, **_SIZES, **_ROPE),
    "Qwen3": qwen3.ModelConfig(num_layers=2, **_SIZES, **_ROPE),
    "Gemma": gemma.ModelConfig(
        num_layers=2,
        num_embed=VOCAB,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=5.0,
        attention_types=(_LOCAL, _GLOBAL),
        sliding_window_size=WINDOW,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        **_SIZES,
    ),
    "Gemma3": gemma3.ModelConfig(
        num_layers=6,
        num_embed=VOCAB,
        sliding_window_size=WINDOW,
        param_dtype=jnp.float32,
        **{**_SIZES, "num_kv_heads": 1},
    ),
    # Layers 0 and 2 local, 1 and 3 global; 4 and 5 read the caches of 2 and 3.
    "Gemma4": gemma4.ModelConfig(
        num_layers=6,
        num_embed=VOCAB,
        sliding_window_size=WINDOW,
        attention_pattern=(_LOCAL4, _GLOBAL4),
        global_key_size=16,
        num_global_kv_heads=1,
        frac_shared_layers=2 / 6,
        per_layer_input_dim=4,
        **_SIZES,
    ),
}

_CLASSES = {
    "Llama3": llama3.Llama3,
    "Qwen2": qwen2.Qwen2,
    "Qwen3": qwen3.Qwen3,
    "Gemma": gemma.Gemma,
    "Gemma3": gemma3.Gemma3,
    "Gemma4": gemma4.Gemma4,
}


def tiny_model(family: str, seed: int = 0, **changes) -> nnx.Module:
    """A model of a family; `changes` replace fields of its configuration."""
    fields = {name: getattr(CONFIGS[family], name) for name in CONFIGS[family].__dataclass_fields__}
    config = type(CONFIGS[family])(**{**fields, **changes})
    return randomized(_CLASSES[family](config, rngs=nnx.Rngs(0)), seed)


def randomized(model: nnx.Module, seed: int) -> nnx.Module:
    """The model with other weights: Tunix begins with MLPs of zeros, and small embeddings."""
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)

    def draw(x: jax.Array) -> jax.Array:
        noise = rng.standard_normal(x.shape)
        scale = 0.1 if x.ndim == 1 else x.size**-0.25
        return jnp.asarray(0.5 * np.asarray(x) * (x.ndim == 1) + scale * noise, x.dtype)

    return nnx.merge(graphdef, jax.tree.unflatten(tree, [draw(x) for x in leaves]))


@jax.jit
def _forward(graphdef, params, tokens):
    mask = jnp.tril(jnp.ones((1, tokens.size, tokens.size), bool))
    positions = jnp.arange(tokens.size)[None]
    return nnx.merge(graphdef, params)(tokens[None], positions, None, mask)[0][0]


def dense_logits(model: nnx.Module, tokens: list[int]) -> np.ndarray:
    """Logits f32[T, V] of Tunix's own forward pass, without a cache."""
    padded = np.zeros(64, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_forward(*nnx.split(model), padded))[: len(tokens)]


def random_prompts(lens=(5, 17, 33), seed: int = 0) -> list[list[int]]:
    """Prompts without pad id (0) and stop token (1)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, n).tolist() for n in lens]


class Numbers:
    """A tokenizer of texts of numbers."""

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int | None:
        return None

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0
