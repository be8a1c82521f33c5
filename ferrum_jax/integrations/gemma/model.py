"""Models of the package `gemma` as model functions: their own modules, on a paged cache."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.integrations.batch import PagedBatch
from ferrum_jax.integrations.models import Pools
from ferrum_jax.integrations.products import with_attention
from ferrum_jax.layers import LayerGroup, equal_sized
from ferrum_jax.payload import KeyValue


@dataclasses.dataclass(frozen=True)
class GemmaModel:
    """A Gemma 2, 3, 3n or 4 model of the package `gemma` as a model function.

    The model's own code is run, with two methods intercepted: each layer's attention is on the
    cache, and only the tokens that `batch.last` selects get logits. The model itself is as before.
    Parameters are those that the package's samplers take. Functions of equal models are equal, and
    share compiled programs.

    Attributes:
      model: The model, for example `gm.nn.Gemma3_1B()`; not a wrapper such as `gm.nn.LoRA`.

    Raises:
      TypeError: It is not a model of the package.
      ValueError: It returns the last token's logits only (`return_last_only`).
    """

    model: nn.Module

    def __post_init__(self) -> None:
        """Checks the model."""
        if not _is_a(self.model, "Transformer"):
            raise TypeError(
                f"{type(self.model).__name__} is not a Transformer of the package gemma. Pass the "
                "model inside of a wrapper; for another model, call "
                "ferrum_jax.integrations.attend_new in its attention, and write a model function."
            )
        if getattr(self.model, "return_last_only", None):
            raise ValueError(
                "The model has return_last_only=True, which counts padding by token ids. Leave it "
                "out: each row's last token is selected by its length."
            )

    def __call__(
        self, params: Any, tokens: jax.Array, batch: PagedBatch
    ) -> tuple[jax.Array, Pools]:
        """Calls the model with parameters.

        Args:
          params: Parameters of the model: the collection "params" of its variables.
          tokens: i32[R, T]. New tokens.
          batch: Rows of the new tokens.

        Returns:
          `(logits f32[R, vocab], pools)`.
        """
        step = _Step(batch)
        logits = self._apply(step, params, tokens, batch.positions)
        return logits, step.batch.pools

    def geometry(self, params: Any, *, max_seqs: int, max_sequence_length: int) -> CacheGeometry:
        """Returns the cache that the model needs: layers with a sliding window keep no more.

        The groups are read from the attention modules while they are traced without data. Those of
        equal heads share a pool (`equal_sized`). `spec` of the result is the shape of a cache for
        `ferrum_jax.init`.

        Args:
          params: Parameters of the model, or their shapes; they determine the dtype.
          max_seqs: Maximum number of requests at once.
          max_sequence_length: Maximum number of tokens per request.

        Raises:
          ValueError: A layer reads the cache of a layer that keeps fewer tokens.
        """
        survey = _Survey()
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        jax.eval_shape(lambda *args: self._apply(survey, *args), params, tokens, tokens)
        return CacheGeometry(
            groups=survey.groups(),
            shared_layers=survey.shared_layers,
            max_seqs=max_seqs,
            max_sequence_length=max_sequence_length,
        )

    def _apply(
        self, step: "_Interceptor", params: Any, tokens: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """Returns f32[R, vocab], with the model's methods intercepted by `step`."""
        # Only the model's own scores, which nothing reads, are masked by it.
        mask = jnp.ones((*tokens.shape, tokens.shape[1]), bool)
        # Its own `nn.jit` would reuse what it has traced for another batch, or for no cache at all.
        method = inspect.unwrap(type(self.model).__call__)
        with nn.intercept_methods(step.intercept):
            output: Any = self.model.apply(
                {"params": params}, tokens, positions=positions, attention_mask=mask, method=method
            )
        return output.logits.astype(jnp.float32)


class _Interceptor:
    """Methods of a model that are computed otherwise, layer by layer."""

    def __init__(self) -> None:
        self._num_layers = 0

    def attend(
        self, layer: int, attention: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        """Attends queries [R, T, Hq, D] of a layer's module to keys and values [R, T, H, D]."""
        raise NotImplementedError

    def last(self, x: jax.Array) -> jax.Array:
        """Selects the tokens that get logits: [R, T, E] to [R', E]."""
        raise NotImplementedError

    def note(self, layer: int, source: Any, kept: Any) -> None:
        """Takes note of what a layer was given of another layer's cache, and of what it returns."""

    def intercept(
        self,
        call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        context: Any,
    ) -> Any:
        """Computes a call of a method, as `nn.intercept_methods` asks."""
        module, name = context.module, context.method_name
        if name == "__call__" and _is_a(module, "Attention"):
            return self._call_attention(module, *args, **kwargs)
        if name == "decode" and _is_a(module, "Embedder"):
            return call(self.last(args[0]))
        return call(*args, **kwargs)

    def _call_attention(self, attention: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes what an attention module does, in the next layer."""
        layer = self._num_layers
        self._num_layers += 1
        method = inspect.unwrap(type(attention).__call__)
        given = inspect.signature(method).bind(attention, *args, **kwargs).arguments
        attend = with_attention(method, lambda *qkv: self.attend(layer, attention, *qkv))
        kept, out = attend(attention, *args, **kwargs)
        self.note(layer, given.get("kv_shared_cache"), kept)
        return kept, out


class _Step(_Interceptor):
    """A step on the cache; each layer replaces the batch by the next one."""

    def __init__(self, batch: PagedBatch) -> None:
        super().__init__()
        self.batch = batch

    def attend(
        self, layer: int, attention: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        """Caches the keys and values, unless they are of another layer, and attends."""
        if not self.batch.layers.is_shared(layer):
            self.batch = self.batch.write(layer, k, v)
        options = AttentionOptions(
            scale=1.0,  # The queries are scaled.
            sliding_window=_window(attention),
            soft_cap=attention.attn_logits_soft_cap,
        )
        return self.batch.attend(layer, q, options)

    def last(self, x: jax.Array) -> jax.Array:
        """Selects each row's last new token."""
        return self.batch.last(x)


class _Survey(_Interceptor):
    """A look at each layer's attention.

    Attributes:
      shared_layers: For each layer without a cache of its own, the layer that has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._kinds: list[tuple[KeyValue, int | None]] = []
        self.shared_layers: dict[int, int] = {}

    def attend(
        self, layer: int, attention: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        """Takes note of a layer's heads and window."""
        del layer, v  # Unused.
        _, _, num_kv_heads, head_dim = k.shape
        self._kinds.append((KeyValue(num_kv_heads, head_dim, k.dtype), _window(attention)))
        return q

    def last(self, x: jax.Array) -> jax.Array:
        """Selects any token."""
        return x[:, 0]

    def note(self, layer: int, source: Any, kept: Any) -> None:
        """Finds the layer of which this one was given the cache, if any."""
        self._kept.append(kept)
        if source is None:
            return
        owner = next(i for i, other in enumerate(self._kept) if other is source)
        owner = self.shared_layers.get(owner, owner)
        wanted, window = self._kinds[layer][1], self._kinds[owner][1]
        if window is not None and (wanted is None or wanted > window):
            raise ValueError(
                f"Layer {layer} sees {wanted or 'all'} tokens, and reads the cache of layer "
                f"{owner}, which keeps {window}. Give both the same attention type."
            )
        self.shared_layers[layer] = owner

    def groups(self) -> tuple[LayerGroup, ...]:
        """Returns the layers that have a cache, in groups of equal size for each pool."""
        members: dict[tuple[KeyValue, int | None], list[int]] = {}
        for layer, kind in enumerate(self._kinds):
            if layer not in self.shared_layers:
                members.setdefault(kind, []).append(layer)
        groups = [
            LayerGroup("global" if window is None else "local", layers, payload, window)
            for (payload, window), layers in members.items()
        ]
        return equal_sized(groups)


def _is_a(module: Any, name: str) -> bool:
    """Returns whether a module is of a class of the package gemma that has this name."""
    classes = type(module).__mro__
    return any(cls.__name__ == name and cls.__module__.startswith("gemma.") for cls in classes)


def _window(attention: Any) -> int | None:
    """Returns the tokens that a query of an attention module sees; None for all."""
    is_local = attention.attn_type.name == "LOCAL_SLIDING"
    return attention.sliding_window_size if is_local else None
