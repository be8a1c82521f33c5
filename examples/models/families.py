"""The decoders by the type of their configuration, and a model as a pure function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.models.gemma3 import Gemma3, Gemma3Config
from examples.models.gemma4 import Gemma4, Gemma4Config
from examples.models.gpt_oss import GptOss, GptOssConfig
from examples.models.layers import CacheBatch, LanguageModel
from examples.models.llama import Llama, LlamaConfig
from examples.models.shape import ModelConfig

DECODERS: Mapping[type[ModelConfig], Callable[..., LanguageModel]] = {
    LlamaConfig: Llama,
    Gemma3Config: Gemma3,
    Gemma4Config: Gemma4,
    GptOssConfig: GptOss,
}


def init_model(
    config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
) -> LanguageModel:
    """Makes a model with random weights.

    Args:
      config: Shape of the model; its type is that of the family.
      rngs: Random numbers, from its stream `params`.
      dtype: Type of the weights.

    Returns:
      The model.
    """
    return DECODERS[type(config)](config, rngs=rngs, dtype=dtype)


def from_params(config: ModelConfig, params: Mapping[str, Any]) -> LanguageModel:
    """Makes a model of loaded weights, without initialising any.

    Args:
      config: Shape of the model.
      params: Nested dict of arrays, as `examples.models.weights.load` returns.

    Returns:
      The model.

    Raises:
      ValueError: If a weight is missing or has another shape than `config` says.
    """
    abstract = nnx.eval_shape(lambda: init_model(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    want = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    have = dict(jax.tree_util.tree_flatten_with_path(dict(params))[0])
    for path, leaf in want:
        found = have.pop(path, None)
        if found is None or found.shape != leaf.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must have shape {leaf.shape}, got "
                f"{None if found is None else found.shape}. Load the config and the weights "
                "from the same model."
            )
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graphdef, state)


def functional(model: LanguageModel) -> tuple[Callable[..., tuple[jax.Array, Any]], nnx.State]:
    """Splits a model into a pure function and its parameters.

    Args:
      model: The model.

    Returns:
      `(model_fn, params)` with `model_fn(params, tokens, batch) -> (logits, pool)`. Keep
      `model_fn`: `jax.jit` compiles again for another one.
    """
    graphdef, params = nnx.split(model)

    def model_fn(params: nnx.State, tokens: jax.Array, batch: CacheBatch) -> tuple[jax.Array, Any]:
        return nnx.merge(graphdef, params)(tokens, batch)

    return model_fn, params
