"""Tiny models of the package `gemma` with random weights, and a tokenizer that needs no file."""

import contextlib
import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np
import pytest

gm = pytest.importorskip("gemma.gm", reason="the extra `gemma` is not installed")
dialog = pytest.importorskip("dialog")

import gemma.gm.nn.gemma3n._config as config_3n  # noqa: E402
import gemma.gm.nn.gemma3n._transformer as transformer_3n  # noqa: E402
import gemma.gm.nn.gemma4._config as config_4  # noqa: E402
import gemma.gm.nn.gemma4._transformer as transformer_4  # noqa: E402

WINDOW, VOCABULARY = 12, 64
config_3 = gm.nn.config
LOCAL, GLOBAL = config_3.AttentionType.LOCAL_SLIDING, config_3.AttentionType.GLOBAL


@contextlib.contextmanager
def promotion():
    """Lets dtypes and ranks promote, as the package's code needs it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class SpecialTokens(gm.text.SpecialTokens, enum.IntEnum):
    PAD = 0
    EOS = 1
    BOS = 2
    START_OF_TURN = 3
    END_OF_TURN = 4
    START_OF_IMAGE = 5
    END_OF_IMAGE = 6
    BEGIN_OF_TOOL_RESPONSE = 7


@dataclasses.dataclass(frozen=True)
class Tokenizer(gm.text.Tokenizer):
    """A token per character, or tag of a turn; decoded as numbers."""

    path: str = ""
    special_tokens = SpecialTokens
    FORBIDDEN_TOKENS = (SpecialTokens.START_OF_IMAGE, SpecialTokens.END_OF_IMAGE)

    def encode(self, text, *, add_bos=False, add_eos=False):
        ids = [2] * add_bos
        while text:
            tags = {"<start_of_turn>": 3, "<end_of_turn>": 4, text[0]: 8 + ord(text[0]) % 56}
            tag = next(tag for tag in tags if text.startswith(tag))
            ids.append(tags[tag])
            text = text[len(tag) :]
        return ids + [1] * add_eos

    def decode(self, ids):
        return "".join(f" {token}" for token in np.ravel(ids).tolist() if token)


_SIZES = {
    "num_embed": VOCABULARY,
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "head_dim": 16,
    "sliding_window_size": WINDOW,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
}


class Gemma2(gm.nn.Transformer):
    config: config_3.TransformerConfig = config_3.TransformerConfig(
        **_SIZES,
        num_kv_heads=4,
        attention_types=(LOCAL, GLOBAL),
        attn_logits_soft_cap=2.0,
        final_logit_softcap=3.0,
    )


class Gemma3(gm.nn.Transformer):
    config: config_3.TransformerConfig = config_3.TransformerConfig(
        **_SIZES,
        num_kv_heads=2,
        attention_types=(LOCAL, LOCAL, GLOBAL),
        final_logit_softcap=None,
        use_qk_norm=True,
        transpose_gating_einsum=True,
        global_base_frequency=1_000_000,
        global_scale_factor=8.0,
    )


def _types(modules):
    """Two layers at the end read the caches of the two before."""
    local, all_tokens = modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL
    return local, local, all_tokens, local, all_tokens


_SHARING = {"frac_shared_layers": 0.4, "share_global": True, "share_local": True}


class Gemma3n(transformer_3n.Gemma3nTransformer):
    config: config_3n.TransformerConfig = config_3n.TransformerConfig(
        **_SIZES,
        num_kv_heads=1,
        attention_types=_types(config_3n._modules),
        kv_cache_sharing_config=config_3n.KVCacheSharingConfig(**_SHARING),
        final_logit_softcap=None,
        use_qk_norm=True,
        use_value_norm=True,
        query_pre_attn_norm=config_3n.QueryPreAttentionNormalisation.NONE,
        transpose_gating_einsum=True,
        use_altup=True,
        num_altup_inputs=2,
        use_laurel=True,
        laurel_rank=4,
        per_layer_input_dim=4,
        scale_plus_one=False,
    )


class Gemma4(transformer_4.Transformer):
    config: config_4.TransformerConfig = config_4.TransformerConfig(
        **_SIZES,
        num_kv_heads=2,
        num_global_kv_heads=1,
        global_key_size=32,
        k_eq_v_global=True,
        global_rope_proportion=0.25,
        local_rope_proportion=1.0,
        attention_types=_types(config_4._modules),
        kv_cache_sharing_config=config_4.KVCacheSharingConfig(**_SHARING),
        final_logit_softcap=3.0,
        per_layer_input_dim=4,
    )


@promotion()
def make(cls, seed=0):
    """Returns a model in float32, and random parameters."""
    model = cls(dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    leaves, tree = jax.tree.flatten(shapes["params"])
    rng = np.random.default_rng(seed)

    def draw(shape):
        noise = rng.standard_normal(shape, np.float32)
        return jnp.asarray(noise / shape[-2] ** 0.5 if len(shape) > 1 else 1 + 0.3 * noise)

    return model, tree.unflatten([draw(leaf.shape) for leaf in leaves])


def forward(model, params, token_ids, size=96):
    """Returns logits f32[T, V] of the package's own forward on a whole text, without a cache."""
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(token_ids)] = token_ids
    logits = model.apply(
        {"params": params},
        jnp.asarray(tokens),
        positions=jnp.arange(size)[None],
        attention_mask=jnp.tril(jnp.ones((1, size, size), bool)),
    ).logits
    return np.array(logits[0, : len(token_ids)])
