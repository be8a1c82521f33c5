"""Paged attention for Flax NNX models, and NNX models as model functions."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.decoding.batch import PagedBatch, Rotary, attend_new
from ferrum_jax.decoding.models import Pools

_ATTENTION_PARTS = ("query", "key", "value", "out", "query_ln", "key_ln")


class PagedAttention(nnx.Module):
    """Causal self-attention on the cache, with the parameters of an `nnx.MultiHeadAttention`.

    The module has the projections (and the query and key norms, if any) of the given one, under
    the same names: a checkpoint of either loads into the other. So a decoder uses the cache if
    each layer's attention is wrapped, and a batch is passed from layer to layer.

    Example:
      >>> attention = nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=16, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> paged = PagedAttention(attention, layer=0)
      >>> paged.key.kernel.shape
      (16, 2, 4)
    """

    def __init__(
        self,
        attention: nnx.MultiHeadAttention,
        layer: int,
        *,
        rotary: Rotary | None = None,
        options: AttentionOptions | None = None,
    ) -> None:
        """Wraps a module; its parameters are shared, not copied.

        Args:
          attention: The module. Its dropout and `attention_fn` are not used.
          layer: Layer of the cache, different for each layer of the model.
          rotary: Rotary embedding of queries and keys, `(x [R, T, H, D], positions i32[R, T]) ->
            x`; none if None. Padding has position -1.
          options: Scale, sliding window, soft cap and sinks; plain attention if None.

        Raises:
          TypeError: The module is not an `nnx.MultiHeadAttention`; call `attend_new` in others.
        """
        lacking = [name for name in _ATTENTION_PARTS if not hasattr(attention, name)]
        if lacking:
            raise TypeError(
                f"PagedAttention wraps an nnx.MultiHeadAttention; {type(attention).__name__} "
                f"has no {', '.join(lacking)}. In an attention of your own, call "
                "ferrum_jax.attend_new with its queries, keys and values."
            )
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.out = attention.out
        self.query_ln, self.key_ln = attention.query_ln, attention.key_ln
        self.layer = layer
        self.rotary = rotary
        self.options = nnx.data(options)

    def __call__(self, x: jax.Array, batch: PagedBatch) -> tuple[jax.Array, PagedBatch]:
        """Caches the new tokens' keys and values, and attends to their sequences.

        Args:
          x: [R, T, in_features]. Activations of the new tokens.
          batch: Rows of the new tokens.

        Returns:
          `(y, batch)`. y: [R, T, out_features]. batch: The batch for the next layer.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        seen, batch = attend_new(
            batch, self.layer, (q, k, v), rotary=self.rotary, options=self.options
        )
        return self.out(seen), batch


@dataclasses.dataclass(frozen=True)
class NnxModel:
    """The structure of an NNX model as a model function, compared by value.

    The structure is compared as it was when this object was made. It need not be hashable: a model
    may have dictionaries, lists and dataclasses that are not frozen as attributes.

    Attributes:
      graphdef: Graph definition that `nnx.split` returned.
    """

    graphdef: nnx.GraphDef[Any] = dataclasses.field(compare=False, repr=False)
    _hash: int = dataclasses.field(init=False, repr=False)
    _structure: Hashable = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Computes the hash once, since each call of a program needs it."""
        structure = _frozen(self.graphdef)
        object.__setattr__(self, "_structure", structure)
        object.__setattr__(self, "_hash", hash(structure))

    def __hash__(self) -> int:
        return self._hash

    def __call__(
        self, params: Any, tokens: jax.Array, batch: PagedBatch
    ) -> tuple[jax.Array, Pools]:
        """Calls the model with parameters; changes that it makes to itself are lost.

        Args:
          params: State that `nnx.split` returned.
          tokens: i32[R, T]. New tokens.
          batch: Rows of the new tokens.

        Returns:
          `(logits f32[R, vocab], pools)`, as the model returns them.
        """
        return nnx.merge(self.graphdef, params)(tokens, batch)


def nnx_model(model: nnx.Module) -> tuple[NnxModel, nnx.State]:
    """Splits a model into a model function and parameters: `prefill(*nnx_model(model), ...)`.

    Args:
      model: Module, called as `(tokens i32[R, T], batch) -> (logits f32[R, vocab], pools)`: the
        logits of each row's last new token (`batch.last`), and the last batch's pools.

    Returns:
      `(model_fn, params)`. Splitting the same model again, or a model that differs only in its
      parameters, does not compile again. Other attributes of the model (such as its configuration)
      are compared by value, and need not be hashable.
    """
    graphdef, params = nnx.split(model)
    return NnxModel(graphdef), params


@dataclasses.dataclass(frozen=True)
class _Unhashable:
    """A value without a hash: hashed by its type, compared by the value's `==`."""

    value: Any

    def __hash__(self) -> int:
        return hash(type(self.value))


def _frozen(value: Any) -> Hashable:
    """Returns a hashable object, equal for equal values."""
    try:
        hash(value)
        return value
    except TypeError:
        pass
    kind = type(value)
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return kind, tuple(_frozen(getattr(value, field.name)) for field in fields)
    if isinstance(value, Mapping):
        return kind, frozenset((key, _frozen(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return kind, tuple(map(_frozen, value))
    if isinstance(value, set):
        return kind, frozenset(value)
    if isinstance(value, (np.ndarray, jax.Array)):
        return kind, value.shape, str(value.dtype), np.asarray(value).tobytes()
    return _Unhashable(value)
