"""Query vectors of a model for tokens that the cache holds, as input for compression."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.checks import check_live
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.models import ModelFn, ReadOnlyBatch, check_model
from ferrum_jax.layers import LayerMap
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.state import CacheState
from ferrum_jax.types import IdsLike


class _QueryRecorder:
    """Mutable f32[L, R, T, Hq, D] of the queries of L layers, alive for one trace.

    `attend` returns no batch, and a scan over layers cannot carry a JAX reference, so recorded
    queries cannot be returned through the model: they are written to this object. Compared by
    identity.

    Args:
      layers: The layers of the cache. Those without a sliding window are recorded, in the order of
        their numbers: the layers that compression changes.
      shape: R rows, T tokens, Hq query heads, D numbers per head.
    """

    def __init__(self, layers: LayerMap, shape: tuple[int, ...]):
        groups = [place.group for place in layers.places]
        full = [group.layers for group in groups if group.sliding_window is None]
        order = sorted(layer for of_group in full for layer in of_group)
        self._layers = layers
        self._places = {
            i: np.asarray([order.index(layer) for layer in group.layers], np.int32)
            for i, group in enumerate(groups)
            if group.sliding_window is None
        }
        self._queries = jax.new_ref(jnp.zeros((len(order), *shape), jnp.float32))

    def record(self, layer: jax.Array | int, q: jax.Array, group: str | None) -> None:
        """Writes one layer's queries [R, T, Hq, D], if the layer is recorded."""
        chex.assert_shape(q, self._queries.shape[1:])
        i, index = self._layers.find(layer, group)
        reads_another = group is None and self._layers.is_shared(layer)
        if i in self._places and not reads_another:
            self._queries[jnp.asarray(self._places[i])[index]] = q.astype(jnp.float32)

    def read(self) -> jax.Array:
        """Returns the recorded queries; zeros for layers that recorded none."""
        return self._queries[...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RecordingBatch(ReadOnlyBatch):
    """A batch of tokens that are cached already: it writes none, and records their queries.

    Attributes:
      recorder: Receiver of the queries. Static, so that a scan over layers does not carry it.
    """

    recorder: _QueryRecorder = dataclasses.field(metadata={"static": True})

    def attend(
        self,
        layer: jax.Array | int,
        q: jax.Array,
        options: AttentionOptions | None = None,
        *,
        group: str | None = None,
    ) -> jax.Array:
        """Records the queries, then attends as `PagedBatch.attend` does."""
        self.recorder.record(layer, q, group)
        return super().attend(layer, q, options, group=group)


def record_queries(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: IdsLike,
    tokens: IdsLike,
    *,
    num_q_heads: int,
) -> jax.Array:
    """Runs the last tokens of rows through a model again, and returns their query vectors.

    The state is not changed. The result for one row is the `queries` argument of
    `PagedKvCacheManager.compress_cache`: the queries of the last 32 tokens of a prompt predict well
    which tokens later queries attend to.

    Args:
      model_fn: The model (static).
      params: Parameters of the model, a pytree.
      state: The cache. Each row already holds its tokens, at least T of them.
      seq_ids: i32[R]. Rows.
      tokens: i32[R, T]. The last tokens of each row.
      num_q_heads: Hq, query heads of the model (static).

    Returns:
      f32[R, L, Hq, T, D]. Queries of each row and layer as they enter attention, after rotary
      embedding, of the L layers without a sliding window, in the order of their numbers. Zero for a
      layer in which the model does not attend through the cache.

    Raises:
      AssertionError: The shapes disagree, or the model has another number of query heads.
      ValueError: `model_fn` is not hashable, or the state was consumed by an earlier call.

    Example:
      >>> import ferrum_jax as fj
      >>> def model_fn(params, tokens, batch):
      ...     x = params[tokens][:, :, None]  # One layer, one head; keys equal values.
      ...     batch = batch.write(0, x, x)
      ...     return batch.last(batch.attend(0, 2 * x))[:, 0], batch.pools
      >>> spec = fj.CacheSpec(num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32",
      ...                     num_blocks=4, block_size=4, max_seqs=1, max_blocks_per_seq=4)
      >>> state, _ = fj.allocate(fj.init(spec), [0], 3)
      >>> params = jnp.asarray([[0, 1], [2, 3], [4, 5]], jnp.float32)
      >>> record_queries(model_fn, params, state, [0], [[1, 2]], num_q_heads=1).tolist()
      [[[[[4.0, 6.0], [8.0, 10.0]]]]]
    """
    check_model(model_fn)
    check_live("state", state)
    seq_ids, tokens = jnp.asarray(as_ids(seq_ids)), jnp.asarray(as_ids(tokens))
    chex.assert_rank([seq_ids, tokens], [1, 2])
    chex.assert_equal_shape_prefix([seq_ids, tokens], 1)
    return _record(model_fn, params, state, seq_ids, tokens, num_q_heads=num_q_heads)


@functools.partial(jax.jit, static_argnames=("model_fn", "num_q_heads"))
def _record(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: jax.Array,
    tokens: jax.Array,
    *,
    num_q_heads: int,
) -> jax.Array:
    pool, num_tokens = state.pool, tokens.shape[1]
    recorder = _QueryRecorder(state.layers, (*tokens.shape, num_q_heads, pool.head_dim))
    q_lens = jnp.full_like(seq_ids, num_tokens)
    batch = PagedBatch.of(state, seq_ids, q_lens, num_tokens=num_tokens)
    parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    model_fn(params, tokens, _RecordingBatch(**parts, recorder=recorder))
    return recorder.read().transpose(1, 0, 3, 2, 4)
