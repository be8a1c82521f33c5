"""A tiny example model with one KV head per device of a mesh of four, and its generation."""

import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from examples.models import families, model_config, weights
from ferrum_jax.decoding.generate import GenerateOptions, generate
from ferrum_jax.decoding.prefill import prefill
from tests.support.caches import tiny_spec
from tests.support.tiny_llama import hf_config, random_tensors

PROMPTS = [[3, 250, 17, 17, 88, 140, 9], [5, 6], [201, 33, 9, 140, 2]]
ROWS = [4, 0, 2]
SPEC = tiny_spec(num_kv_heads=4, head_dim=8, block_size=4, max_blocks_per_seq=4)


def model():
    """Returns `(model_fn, params)` of the example's decoder."""
    fields = hf_config(num_attention_heads=8, num_key_value_heads=4)
    config = model_config.from_json(fields)
    params = weights.assemble(config, random_tensors(fields).__getitem__, jnp.float32)
    return families.functional(families.from_params(config, params))


def decode(model_fn, params, state):
    """Returns `(logits after the prompts, greedy tokens, state)`; the first two as NumPy arrays."""
    state, ok = fj.allocate(state, ROWS, [len(prompt) for prompt in PROMPTS])
    logits, state = prefill(model_fn, params, state, ROWS, PROMPTS)
    first = np.argmax(np.asarray(logits), axis=-1).astype(np.int32)
    out = generate(model_fn, params, state, ROWS, first, options=GenerateOptions(max_new_tokens=6))
    assert bool(ok) and bool(out.ok)
    return np.asarray(logits), np.asarray(out.tokens), out.state
