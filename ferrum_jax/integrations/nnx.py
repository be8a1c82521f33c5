"""Attention through the cache for Flax NNX models, and NNX models as model functions."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.integrations.batch import PagedBatch, Rotary, attend_new
from ferrum_jax.state import BlockPool

_ATTENTION_PARTS = ("query", "key", "value", "out", "query_ln", "key_ln")


class PagedAttention(nnx.Module):
    """Causal self-attention through the cache, with the parameters of another module.

    It takes over the projections (and the norms of queries and keys, if any) of an
    `nnx.MultiHeadAttention`, under the same names: a checkpoint of either loads into the other.
    So a decoder adopts the cache by wrapping each layer's attention and passing a batch along.

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
        """Takes over a module's projections; they are shared, not copied.

        Args:
          attention: The module. Its heads are the cache's; dropout and `attention_fn` play no
            part here.
          layer: The cache's layer to use, each layer of a model its own.
          rotary: Turns queries and keys by their positions, `(x [R, T, H, D], positions
            i32[R, T]) -> x`. Positions of padding are -1.
          options: Scale, sliding window, soft cap, sinks.

        Raises:
          TypeError: The module is another attention; `attend_new` is for those.
        """
        lacking = [name for name in _ATTENTION_PARTS if not hasattr(attention, name)]
        if lacking:
            raise TypeError(
                f"PagedAttention takes over an nnx.MultiHeadAttention; {type(attention).__name__} "
                f"has no {', '.join(lacking)}. In an attention of your own, call "
                "ferrum_jax.integrations.attend_new with its queries, keys and values."
            )
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.out = attention.out
        self.query_ln, self.key_ln = attention.query_ln, attention.key_ln
        self.layer = layer
        self.rotary = rotary
        self.options = nnx.data(options)

    def __call__(self, x: jax.Array, batch: PagedBatch) -> tuple[jax.Array, PagedBatch]:
        """Stores the new tokens' keys and values, and lets the tokens see their sequences.

        Args:
          x: [R, T, in_features]. New tokens.
          batch: Where they belong.

        Returns:
          `(y, batch)`: y is [R, T, out_features], and the batch is to be given to what follows.
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
    """The structure of an NNX model, as a model function. Equal structures are equal.

    Structures are compared by value, as they were when this was made, and need not be hashable:
    a model may keep dictionaries, lists and dataclasses that are not frozen.

    Attributes:
      graphdef: What `nnx.split` returned.
    """

    graphdef: nnx.GraphDef[Any] = dataclasses.field(compare=False, repr=False)
    _hash: int = dataclasses.field(init=False, repr=False)
    _structure: Hashable = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Notes what is to be compared, and hashes it once: each call of a program asks."""
        structure = _frozen(self.graphdef)
        object.__setattr__(self, "_structure", structure)
        object.__setattr__(self, "_hash", hash(structure))

    def __hash__(self) -> int:
        return self._hash

    def __call__(
        self, params: Any, tokens: jax.Array, batch: PagedBatch
    ) -> tuple[jax.Array, BlockPool]:
        """Calls the model with these parameters; changes that it makes to itself are lost.

        Args:
          params: The state that `nnx.split` returned.
          tokens: i32[R, T]. New tokens.
          batch: Where they belong.

        Returns:
          `(logits f32[R, vocab], pool)`, as the model returns them.
        """
        return nnx.merge(self.graphdef, params)(tokens, batch)


def nnx_model(model: nnx.Module) -> tuple[NnxModel, nnx.State]:
    """Splits a model, for `prefill(*nnx_model(model), state, ...)` and `generate` alike.

    Args:
      model: A module whose call is `(tokens i32[R, T], batch) -> (logits f32[R, vocab], pool)`:
        the logits of each row's last new token (`batch.last`), and the batch's pool.

    Returns:
      `(model_fn, params)`. Splitting the same model again, or one that differs in its parameters
      only, does not lead to another compile. What else the model keeps (its configuration, say)
      is compared by value, and need not be hashable.
    """
    graphdef, params = nnx.split(model)
    return NnxModel(graphdef), params


class _Opaque:
    """A value that cannot be hashed, hashed by its type and compared by itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __hash__(self) -> int:
        return hash(type(self._value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opaque) and bool(self._value == other._value)


def _frozen(value: Any) -> Hashable:
    """Returns something hashable that is equal for equal values."""
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
    return _Opaque(value)
