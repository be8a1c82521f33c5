"""A dense static KV cache in the fastest layout on CPU: the yardstick of the paged one.

Each row owns `max_tokens` places from the start, and attention reads all of them. Layouts are
those that measured fastest on two CPU cores (30 layers of 9/3 heads of 64, float32, ms a step):

| attention alone, rows x places             | 8 x 512 | 32 x 512 | 8 x 2048 |
|---|---|---|---|
| an array a layer, keys [B, H, D, S] (here) | 8.2     | 30       | 33       |
| the same, keys [B, H, S, D]                | 11      | 51       | 55       |
| one array [L, B, H, D, S] for all layers   | 7.8     | 60       | 77       |
| `lax.map` over rows                        | 14      | 53       | 62       |
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.models.shape import ModelConfig
from ferrum_jax.attention import AttentionOptions
from ferrum_jax.encoding import decode_f32, encode, storage_dtype

MASKED = -1e30  # A finite minus infinity: a row without tokens gives numbers, not NaN.

ModelFn = Callable[..., tuple[jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Keys and values of B rows with S places each.

    Attributes:
      k: One [B, num_kv_heads, head_dim, S] per layer that has a cache of its own; places last.
      v: One [B, num_kv_heads, S, head_dim] per such layer.
      indices: Index in `k` and `v` for each layer of the model (static).
      dtype: The numbers' dtype (static). On CPU the arrays hold narrow ones as bits, as a block
        pool does.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    indices: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def max_tokens(self) -> int:
        """Places of a row."""
        return self.v[0].shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseBatch:
    """New tokens of every row of a dense cache: R = B rows with up to T tokens each.

    Attributes:
      pools: The cache.
      seq_lens: i32[R]. Tokens of each row, the new ones included.
      q_lens: i32[R]. New tokens of each row; row r's stand at the end of its sequence.
      num_tokens: T (static).
      from_empty: Whether every row begins here (static): one slice is written, and only the
        first T places are read.
    """

    pools: DenseCache
    seq_lens: jax.Array
    q_lens: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})
    from_empty: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def positions(self) -> jax.Array:
        """i32[R, T]. Position of each new token in its sequence."""
        first = self.seq_lens - self.q_lens
        return first[:, None] + jnp.arange(self.num_tokens, dtype=jnp.int32)[None, :]

    def last(self, x: jax.Array) -> jax.Array:
        """Selects each row's last new token from [R, T, ...]."""
        return x[jnp.arange(x.shape[0]), jnp.maximum(self.q_lens - 1, 0)]

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> "DenseBatch":
        """Stores the new keys and values of one layer.

        Args:
          layer: Which layer.
          k: [R, T, num_kv_heads, head_dim].
          v: Like `k`.

        Returns:
          The batch over the cache that holds them.
        """
        write = _write_start if self.from_empty else self._scatter
        i = self.pools.indices[layer]
        k, v = (encode(x, self.pools.dtype, self.pools.k[i].dtype) for x in (k, v))
        new_k, new_v = write(self.pools.k[i], self.pools.v[i], k, v)
        pool = dataclasses.replace(
            self.pools,
            k=(*self.pools.k[:i], new_k, *self.pools.k[i + 1 :]),
            v=(*self.pools.v[:i], new_v, *self.pools.v[i + 1 :]),
        )
        return dataclasses.replace(self, pools=pool)

    def attend(self, layer: int, q: jax.Array, options: AttentionOptions) -> jax.Array:
        """Attends each new token to its row's tokens up to itself.

        Args:
          layer: Which layer.
          q: [R, T, num_q_heads, head_dim].
          options: Scale and sliding window; this cache knows no other.

        Returns:
          Like `q`; meaningless for padding.

        Raises:
          ValueError: If the options ask for a soft cap or sinks.
        """
        if options.soft_cap is not None or options.sinks is not None:
            raise ValueError(
                "The dense cache attends with a scale and a sliding window; soft_cap and sinks "
                "were asked for too. Use the paged cache."
            )
        i = self.pools.indices[layer]
        k, v = self.pools.k[i], self.pools.v[i]
        if self.from_empty:
            k, v = k[:, :, :, : self.num_tokens], v[:, :, : self.num_tokens]
        k, v = decode_f32(k, self.pools.dtype), decode_f32(v, self.pools.dtype)
        rows, length, num_q_heads, head_dim = q.shape
        num_kv_heads, group = k.shape[1], num_q_heads // k.shape[1]

        # The query heads of a KV head stand beside its new tokens: one product a KV head.
        scale = head_dim**-0.5 if options.scale is None else options.scale
        dtype = q.dtype
        q = (q.astype(k.dtype) * scale).reshape(rows, length, num_kv_heads, group, head_dim)
        q = q.transpose(0, 2, 3, 1, 4).reshape(rows, num_kv_heads, group * length, head_dim)
        logits = jnp.einsum("rhqd,rhds->rhqs", q, k)
        seen = jnp.tile(self._visible(v.shape[2], options), (1, group, 1))[:, None]
        logits = jnp.where(seen, logits, MASKED)
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        out = jnp.einsum("rhqs,rhsd->rhqd", weights, v)
        out = out / weights.sum(axis=-1, keepdims=True)
        out = out.reshape(rows, num_kv_heads, group, length, head_dim).transpose(0, 3, 1, 2, 4)
        return out.reshape(rows, length, num_q_heads, head_dim).astype(dtype)

    def _visible(self, num_places: int, options: AttentionOptions) -> jax.Array:
        """bool[R, T, S]. Which places each new token sees."""
        places = jnp.arange(num_places, dtype=jnp.int32)[None, None, :]
        positions = self.positions[:, :, None]
        seen = places <= positions
        if options.sliding_window is not None:
            seen &= places > positions - options.sliding_window
        return seen

    def _scatter(
        self, k_cache: jax.Array, v_cache: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Writes every token at its own row's position, in place, and drops padding."""
        num_rows, max_tokens = k.shape[0], v_cache.shape[2]
        valid = jnp.arange(self.num_tokens, dtype=jnp.int32)[None, :] < self.q_lens[:, None]
        places = jnp.where(valid, self.positions, max_tokens).reshape(-1)
        rows = jnp.repeat(jnp.arange(num_rows, dtype=jnp.int32), self.num_tokens)
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        if places.size == 1:
            # XLA turns a scatter of one element into a select between two whole caches (61 ms
            # a step, not 5, at 2,048 places). A second element, dropped, keeps it a scatter.
            rows = jnp.concatenate([rows, rows])
            places = jnp.concatenate([places, jnp.full_like(places, max_tokens)])
            k, v = (jnp.concatenate([x, x]) for x in (k, v))
        return (
            k_cache.at[rows, :, :, places].set(k, mode="drop"),
            v_cache.at[rows, :, places].set(v, mode="drop"),
        )


def _write_start(
    k_cache: jax.Array, v_cache: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes the first T places of every row; what padding leaves there is never read."""
    origin = (0, 0, 0, 0)
    return (
        jax.lax.dynamic_update_slice(k_cache, k.transpose(0, 2, 3, 1), origin),
        jax.lax.dynamic_update_slice(v_cache, v.transpose(0, 2, 1, 3), origin),
    )


def init_cache(
    config: ModelConfig, num_rows: int, max_tokens: int, dtype: DTypeLike = jnp.float32
) -> DenseCache:
    """Makes an empty cache.

    Args:
      config: Shape of the model.
      num_rows: Sequences.
      max_tokens: Places of each, for its prompt and its new tokens.
      dtype: Type of the entries.

    Returns:
      The cache, `8 * num_kv_heads * head_dim` bytes a place and layer in float32.
    """
    kinds = [config.kind(layer) for layer in range(config.num_layers)]
    owners = [layer for layer, kind in enumerate(kinds) if kind.shared_layer is None]
    shapes = [(num_rows, kinds[i].num_kv_heads, kinds[i].head_dim, max_tokens) for i in owners]
    storage = storage_dtype(dtype, jax.default_backend())
    return DenseCache(
        k=tuple(jnp.zeros(shape, storage) for shape in shapes),
        v=tuple(jnp.zeros((*shape[:2], *shape[:1:-1]), storage) for shape in shapes),
        indices=tuple(
            owners.index(layer if kind.shared_layer is None else kind.shared_layer)
            for layer, kind in enumerate(kinds)
        ),
        dtype=jnp.dtype(dtype),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def prefill(
    model_fn: ModelFn, params: Any, tokens: jax.Array, prompt_lens: jax.Array, cache: DenseCache
) -> tuple[jax.Array, DenseCache]:
    """Reads the prompts of all rows at once. Donates the cache.

    Args:
      model_fn: See `examples.models.families.functional`.
      params: Its parameters.
      tokens: i32[B, T]. Prompts, padded at the end.
      prompt_lens: i32[B]. Tokens of each prompt.
      cache: Holds nothing yet.

    Returns:
      `(logits, cache)`: f32[B, vocab_size] after each prompt's last token.
    """
    batch = DenseBatch(
        pools=cache,
        seq_lens=prompt_lens,
        q_lens=prompt_lens,
        num_tokens=tokens.shape[1],
        from_empty=True,
    )
    return model_fn(params, tokens, batch)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
def decode_step(
    model_fn: ModelFn, params: Any, tokens: jax.Array, seq_lens: jax.Array, cache: DenseCache
) -> tuple[jax.Array, DenseCache]:
    """Runs one more token of every row. Donates the cache.

    Args:
      model_fn: See `examples.models.families.functional`.
      params: Its parameters.
      tokens: i32[B]. The new token of each row.
      seq_lens: i32[B]. Tokens of each row, the new one included.
      cache: Holds the tokens before it.

    Returns:
      `(logits, cache)`: f32[B, vocab_size].
    """
    batch = DenseBatch(pools=cache, seq_lens=seq_lens, q_lens=jnp.ones_like(seq_lens), num_tokens=1)
    return model_fn(params, tokens[:, None], batch)


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("max_new_tokens", "eos_token_ids"),
    donate_argnames="cache",
)
def decode_greedy(
    model_fn: ModelFn,
    params: Any,
    tokens: jax.Array,
    seq_lens: jax.Array,
    cache: DenseCache,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array, DenseCache]:
    """Continues every row with its likeliest tokens, the loop on the device. Donates the cache.

    Args:
      model_fn: See `examples.models.families.functional`.
      params: Its parameters.
      tokens: i32[B]. The first new token of each row, not in the cache yet.
      seq_lens: i32[B]. Tokens of each row in the cache.
      cache: Has room for `max_new_tokens - 1` more in every row.
      max_new_tokens: Tokens after which a row stops, `tokens` included.
      eos_token_ids: Tokens after which a row stops at once.

    Returns:
      `(new_tokens, num_new_tokens, cache)`: i32[B, max_new_tokens] and i32[B]; what stands
      after a row's end is 0.
    """
    ends = jnp.asarray(eos_token_ids, jnp.int32).reshape(1, -1)

    def stops(tokens: jax.Array) -> jax.Array:
        return jnp.any(tokens[:, None] == ends, axis=1)

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        step, _, live, *_ = carry
        return (step < max_new_tokens) & jnp.any(live)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, tokens, live, seq_lens, new_tokens, cache = carry
        q_lens = live.astype(jnp.int32)
        batch = DenseBatch(pools=cache, seq_lens=seq_lens + q_lens, q_lens=q_lens, num_tokens=1)
        logits, cache = model_fn(params, tokens[:, None], batch)
        tokens = jnp.where(live, jnp.argmax(logits, axis=1).astype(jnp.int32), 0)
        new_tokens = new_tokens.at[:, step].set(tokens)
        return step + 1, tokens, live & ~stops(tokens), batch.seq_lens, new_tokens, cache

    new_tokens = jnp.zeros((tokens.size, max_new_tokens), jnp.int32).at[:, 0].set(tokens)
    start = (jnp.int32(1), tokens, ~stops(tokens), seq_lens, new_tokens, cache)
    _, _, _, end_lens, new_tokens, cache = jax.lax.while_loop(goes_on, body, start)
    return new_tokens, end_lens - seq_lens + 1, cache


def generate(
    model_fn: ModelFn,
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Continues ragged prompts greedily, as one padded batch.

    Args:
      model_fn: See `examples.models.families.functional`.
      params: Its parameters.
      config: Shape of the model.
      prompts: Token ids of each prompt, at least one.
      max_new_tokens: Most tokens to add to each.
      eos_token_ids: Tokens that end a row.

    Returns:
      The new tokens of each prompt, the one that ended it included.
    """
    prompt_lens = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), prompt_lens.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = init_cache(config, len(prompts), padded.shape[1] + max_new_tokens)
    logits, cache = prefill(model_fn, params, jnp.asarray(padded), jnp.asarray(prompt_lens), cache)
    new_tokens, num_new_tokens, _ = decode_greedy(
        model_fn,
        params,
        jnp.argmax(logits, axis=1).astype(jnp.int32),
        jnp.asarray(prompt_lens),
        cache,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
    )
    counts = np.asarray(num_new_tokens)
    return [row[:n].tolist() for row, n in zip(np.asarray(new_tokens), counts, strict=True)]
