"""Tunix models as model functions: their own modules, with attention on a paged cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.integrations import PagedBatch
from ferrum_jax.integrations.nnx import NnxModel
from ferrum_jax.integrations.products import with_attention
from ferrum_jax.state import BlockPool

# Classes of the models, by the module that defines them.
FAMILIES = {
    "tunix.models.llama3.model": "Llama3",
    "tunix.models.qwen2.model": "Qwen2",
    "tunix.models.qwen3.model": "Qwen3",
    "tunix.models.gemma.model": "Gemma",
    "tunix.models.gemma3.model": "Gemma3",
    "tunix.models.gemma4.model": "Gemma4",
}

# Settings of training that are switched off in a decoding step, in which they would only be in the
# way: one function is traced inside another, and kernels attend to no cache.
_DENSE_SETTINGS = {
    "remat_config": None,
    "use_flash_attention": False,
    "use_sliding_window_kv_cache": False,
}


def check_family(model: Any) -> None:
    """Checks that a model is of a known family; a subclass, such as one with LoRA, is.

    Args:
      model: The model.

    Raises:
      TypeError: It is not.
    """
    classes = {(cls.__module__, cls.__name__) for cls in type(model).__mro__}
    if not classes & set(FAMILIES.items()):
        raise TypeError(
            f"{type(model).__name__} is not one of the Tunix models that decode on a paged cache: "
            f"{', '.join(FAMILIES.values())}. Call ferrum_jax.integrations.attend_new in its "
            "attention, and pass a model function of your own to ferrum_jax.generate."
        )


class TunixModel(NnxModel):
    """The structure of a Tunix model as a model function, compared by value.

    The modules are Tunix's own, made of the structure and the parameters in each trace. In these
    alone, each layer's attention is on the cache, and only each row's last token gets logits. The
    model from which the structure was taken is as before: it trains, while this one decodes.
    """

    def __call__(
        self, params: Any, tokens: jax.Array, batch: PagedBatch
    ) -> tuple[jax.Array, tuple[BlockPool, ...]]:
        """Calls the model with parameters.

        Args:
          params: State that `nnx.split` returned.
          tokens: i32[R, T]. New tokens.
          batch: Rows of the new tokens.

        Returns:
          `(logits f32[R, vocab], pools)`.
        """
        model: Any = nnx.merge(self.graphdef, params)
        step = _Step(batch)
        for i, layer in enumerate(model.layers):
            _switch_off(layer)
            _switch_off(layer.attn)
            layer.attn = _OnCache(layer.attn, i, step)
        model.final_norm = _OfLast(model.final_norm, step)
        # Only Tunix's own scores, which nothing reads, are masked by it.
        mask = jnp.ones((*tokens.shape, tokens.shape[1]), bool)
        logits, _ = model(tokens, batch.positions, None, mask)
        return logits[:, 0].astype(jnp.float32), step.batch.pools


def tunix_model(model: nnx.Module) -> tuple[TunixModel, nnx.State]:
    """Splits a Tunix model into a model function and parameters.

    Args:
      model: A Llama 3, Qwen 2, Qwen 3, Gemma, Gemma 3 or Gemma 4 model of Tunix; with LoRA, if any.

    Returns:
      `(model_fn, params)`, for `prefill`, `generate`, `serve`, `rollout` or an `Engine`. Model
      functions of models that differ only in their parameters are equal: new weights compile
      nothing. The parameters are the model's own variables, as `nnx.split` returns them.

    Raises:
      TypeError: The model is of another family.
    """
    check_family(model)
    graphdef, params = nnx.split(model)
    return TunixModel(graphdef), params


class _Step:
    """The batch of a step, which each layer replaces by the next one."""

    def __init__(self, batch: PagedBatch) -> None:
        self.batch = batch


class _OfLast:
    """The norm before the output layer, for each row's last token: [R, T, E] to [R, 1, E]."""

    def __init__(self, norm: Callable[[jax.Array], jax.Array], step: _Step) -> None:
        self._norm, self._step = norm, step

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._norm(self._step.batch.last(x)[:, None])


class _OnCache:
    """An attention module of Tunix in one layer, with its attention on the cache."""

    def __init__(self, attention: Any, layer: int, step: _Step) -> None:
        self._attention, self._layer, self._step = attention, layer, step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes what the module's `block` does, with the arguments that the layer passes."""
        block = with_attention(type(self._attention).block, self._attend)
        return block(self._attention, *args, **kwargs)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Caches keys and values [R, T, H, D], and attends queries [R, T, Hq, D] to the cache."""
        step, layer = self._step, self._layer
        if not step.batch.layers.is_shared(layer):
            step.batch = step.batch.write(layer, k, v)
        return step.batch.attend(layer, q, attention_options(self._attention))


def attention_options(attention: Any) -> AttentionOptions:
    """Returns the scale, window and soft cap of an attention module of Tunix.

    Args:
      attention: The module.

    Returns:
      The options. The Gemma families scale their queries themselves.
    """
    return AttentionOptions(
        scale=getattr(attention, "scale", 1.0),
        sliding_window=sliding_window(attention),
        soft_cap=getattr(attention, "attn_logits_soft_cap", None),
    )


def sliding_window(attention: Any) -> int | None:
    """Returns the tokens that a query of an attention module sees; None for all.

    Args:
      attention: The module.
    """
    kind = getattr(attention, "attn_type", None)
    if kind is None or kind.name != "LOCAL_SLIDING":
        return None
    owner = attention if hasattr(attention, "sliding_window_size") else attention.config
    return owner.sliding_window_size


def _switch_off(module: Any) -> None:
    """Switches off a module's settings of training; the module is of this trace alone."""
    config = getattr(module, "config", None)
    if config is not None:
        fields = {field.name for field in dataclasses.fields(config)}
        off = {name: value for name, value in _DENSE_SETTINGS.items() if name in fields}
        module.config = dataclasses.replace(config, **off)
