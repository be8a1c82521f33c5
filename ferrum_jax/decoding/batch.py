"""A model's view of the cache in one step: some rows, and their new tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.checks import check_live
from ferrum_jax.layers import LayerGroup, LayerMap
from ferrum_jax.ops import write
from ferrum_jax.ops.arguments import as_rows
from ferrum_jax.ops.indexing import newest_places, read, token_slots
from ferrum_jax.ops.rows import rows_of
from ferrum_jax.state import BlockPool, CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK, IdsLike


class WrittenLayers:
    """Mutable record of the layers that a model writes, for one trace. Compared by identity."""

    def __init__(self) -> None:
        self._layers: set[int] = set()
        self._is_complete = True

    def note(self, layer: jax.Array | int, group: str | None, layers: LayerMap) -> None:
        """Records a layer. A traced one (of a scan over layers) may be any layer."""
        if not isinstance(layer, (int, np.integer)):
            self._is_complete = False
        elif group is None:
            self._layers.add(int(layer))
        else:
            place = layers.places[layers.group_index(group)]
            self._layers.add(place.group.layers[int(layer)])

    def require_all(self, layers: LayerMap) -> None:
        """Raises ValueError if one of the cache's layers is known to be unwritten."""
        unwritten = sorted(set(layers.layers) - self._layers)
        if self._is_complete and self._layers and unwritten:
            raise ValueError(
                f"The model wrote {len(self._layers)} layers; the cache has {len(layers.layers)}, "
                f"and the memory of layers {unwritten} is unused. Make the cache with the layers "
                "of the model."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupRows:
    """Some rows of a cache in one layer group.

    Attributes:
      block_ids: i32[R, M]. Blocks of each row, `NULL_BLOCK` where absent.
      held_lens: i32[R]. Tokens that each row's blocks hold, including those of this step.
      token_formats: i32[R]. `TokenFormat` of each row.
      num_pruned: i32[R]. Tokens of each row's sequence that compression has dropped.
    """

    block_ids: jax.Array
    held_lens: jax.Array
    token_formats: jax.Array
    num_pruned: jax.Array

    @classmethod
    def of(
        cls, tables: PageTables, group: int, seq_ids: jax.Array, seq_lens: jax.Array | None
    ) -> "GroupRows":
        """Reads the rows of sequences (i32[R]) in a pool's group, cut to `seq_lens` (i32[R])."""
        rows = rows_of(tables, seq_ids).reshape(tables.num_groups, -1)[group]
        held_lens = read(tables.held_lens, rows, 0)
        num_pruned = read(tables.num_pruned, rows, 0)
        if seq_lens is not None:
            held_lens = jnp.clip(jnp.maximum(seq_lens, 0) - num_pruned, 0, held_lens)
        return cls(
            block_ids=read(tables.block_ids, rows, NULL_BLOCK),
            held_lens=held_lens,
            token_formats=read(tables.token_formats, rows, 0),
            num_pruned=num_pruned,
        )

    def attend(
        self,
        q: jax.Array,
        pool: BlockPool,
        layer: jax.Array | int,
        *,
        options: AttentionOptions,
        q_lens: jax.Array,
    ) -> jax.Array:
        """Attends queries [R, T, Hq, D] of the rows' newest tokens to what the rows hold."""
        return paged_attention(
            q,
            pool,
            layer,
            options=options,
            block_ids=self.block_ids,
            held_lens=self.held_lens,
            q_lens=q_lens,
            token_formats=self.token_formats,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """Rows of a cache with up to T new tokens each, passed from layer to layer of a model.

    R rows, M blocks per row, H key/value heads, Hq query heads, D numbers per head. A layer writes
    its keys and values, then attends. Since writing comes first, several rows of a batch may be
    consecutive chunks of one sequence.

    A sequence has two lengths: the length of the sequence (`seq_lens`), and the number of tokens
    that its blocks hold (`held_lens`), which is smaller after compression has dropped tokens.

    Attributes:
      pools: The blocks; `write` returns a batch with other pools.
      rows: The rows in each layer group.
      q_lens: i32[R]. New tokens of each row, at most T; the rest is padding.
      num_tokens: T, the maximum number of new tokens per row (static).
      layers: Which layer is in which group (static).
      written: Record of the layers that a model writes; static, so that a scan over layers does
        not carry it. None if it is not recorded.

    Example:
      >>> import ferrum_jax as fj
      >>> spec = fj.CacheSpec(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                     num_blocks=4, block_size=4, max_seqs=2, max_blocks_per_seq=4)
      >>> state, _ = fj.allocate(fj.init(spec), [0, 1], [5, 3])
      >>> batch = PagedBatch.of(state, [0, 1], q_lens=[2, 3], num_tokens=3)
      >>> batch.positions.tolist()
      [[3, 4, -1], [0, 1, 2]]
    """

    pools: tuple[BlockPool, ...]
    rows: tuple[GroupRows, ...]
    q_lens: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})
    layers: LayerMap = dataclasses.field(metadata={"static": True})
    written: WrittenLayers | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )

    @classmethod
    def of(
        cls,
        state: CacheState,
        seq_ids: IdsLike,
        q_lens: IdsLike,
        *,
        num_tokens: int,
        seq_lens: IdsLike | None = None,
    ) -> "PagedBatch":
        """Makes a batch of rows of a state.

        Args:
          state: The cache, which already has room for the new tokens (`allocate`, `extend`).
          seq_ids: i32[R]. Rows; `NULL_SEQ` is a row without tokens.
          q_lens: i32[R], or i32[] for all rows. New tokens of each row. On the device, a number
            below 0 or above `num_tokens` counts as 0.
          num_tokens: T, the maximum number of new tokens per row (static).
          seq_lens: i32[R], or i32[] for all rows. Position after each row's last new token, with
            dropped tokens counted. The end of the sequence if None or greater. Smaller for all
            chunks of a prompt except for the last one.

        Returns:
          The batch.

        Raises:
          AssertionError: The shapes of the arguments disagree.
          ValueError: `q_lens` on the host has a number below 0 or above `num_tokens`; an id or a
            count is not an integer within int32; or the state was consumed by an earlier call.
        """
        check_live("state", state)
        seq_ids, q_lens = as_rows(seq_ids=seq_ids, q_lens=q_lens)
        is_possible = (q_lens >= 0) & (q_lens <= num_tokens)
        if isinstance(is_possible, np.ndarray) and not is_possible.all():
            raise ValueError(
                f"q_lens must be from 0 to num_tokens ({num_tokens}), got {q_lens}. Raise "
                "num_tokens, or split the prompt into chunks, as `prefill` does."
            )
        if seq_lens is not None:
            _, seq_lens = as_rows(seq_ids=seq_ids, seq_lens=seq_lens)
            seq_lens = jnp.asarray(seq_lens)
        rows = tuple(
            GroupRows.of(state.page_tables[place.pool], place.index, jnp.asarray(seq_ids), seq_lens)
            for place in state.layers.places
        )
        # Compression keeps the newest tokens, so that each group holds as many as are new.
        num_held = functools.reduce(jnp.minimum, (of_group.held_lens for of_group in rows))
        return cls(
            pools=state.pools,
            rows=rows,
            q_lens=jnp.where(is_possible, jnp.minimum(q_lens, num_held), 0),
            num_tokens=num_tokens,
            layers=state.layers,
        )

    @property
    def num_outputs(self) -> int:
        """Tokens of which `last` selects the activations: one per row."""
        return self.q_lens.shape[0]

    @property
    def positions(self) -> jax.Array:
        """i32[R, T]. Position of each new token in its sequence; -1 for padding."""
        rows = self.rows[0]
        places = newest_places(rows.held_lens, self.q_lens, self.num_tokens)
        return jnp.where(places < 0, -1, places + rows.num_pruned[:, None])

    def slots(self, group: str | None = None) -> jax.Array:
        """Returns the slots of the new tokens in their pool.

        Args:
          group: Name of a layer group; None if there is only one.

        Returns:
          i32[R, T]. Out of range for padding.

        Raises:
          ValueError: There is no such group, or there are several and none is named.
        """
        return self._slots(self.layers.group_index(group))

    def _slots(self, group: int) -> jax.Array:
        """Returns the slots of the new tokens in a group, by its index."""
        rows, pool = self.rows[group], self.pools[self.layers.places[group].pool]
        places = newest_places(rows.held_lens, self.q_lens, self.num_tokens)
        sizes = pool.block_size
        if len(pool.formats) > 1:
            sizes = jnp.asarray(pool.block_sizes, jnp.int32)[rows.token_formats][:, None]
        slots = pool.slots_per_block
        return token_slots(rows.block_ids, places, pool.num_blocks, sizes, slots)

    def last(self, x: jax.Array) -> jax.Array:
        """Selects each row's last new token, which predicts the next one.

        Args:
          x: [R, T, ...]. Activations of the new tokens.

        Returns:
          [R, ...]. Activations of each row's last new token, or of its first padding token if it
          has no new token.
        """
        index = jnp.maximum(self.q_lens - 1, 0)
        return x[jnp.arange(x.shape[0]), index]

    def write(
        self,
        layer: jax.Array | int,
        k: ArrayLike,
        v: ArrayLike,
        *,
        group: str | None = None,
    ) -> "PagedBatch":
        """Writes the new tokens' keys and values of one layer; donates the pool.

        Outside `jit`, this also consumes the pool of the state from which the batch was made.

        Args:
          layer: i32[]. Layer to write: the model's own number, which must be on the host if there
            are several layer groups; or, with `group`, the index within that group.
          k: [R, T, H, D]. Keys of the new tokens, rounded to the pool's dtype as `ops.write` does.
            A NumPy array is copied first; one that a caller's own `jit` takes is not, and must not
            be overwritten until the result is ready.
          v: [R, T, H, D]. Values of the new tokens, as `k`.
          group: Name of a layer group, for a scan over its layers; None for the model's numbers.

        Returns:
          The batch with the changed pool.

        Raises:
          AssertionError: The shapes are not those of the batch and of the pool's heads.
          ValueError: The pool was consumed by an earlier call, `layer` on the host is not one of
            the cache's layers, or it is traced and its group is not named; or the layer reads the
            cache of another one, and has none of its own.
        """
        if group is None and self.layers.is_shared(layer):
            raise ValueError(
                f"Layer {layer} has no cache of its own: it reads that of another layer "
                "(`CacheSpec.shared_layers`). Write that layer only."
            )
        if self.written is not None:
            self.written.note(layer, group, self.layers)
        i, index = self.layers.find(layer, group)
        slots, which = self._slots(i), self.layers.places[i].pool
        formats = jnp.broadcast_to(self.rows[i].token_formats[:, None], slots.shape)
        written = write(self.pools[which], index, slots, k, v, formats)
        pools = (*self.pools[:which], written, *self.pools[which + 1 :])
        return dataclasses.replace(self, pools=pools)

    def attend(
        self,
        layer: jax.Array | int,
        q: jax.Array,
        options: AttentionOptions | None = None,
        *,
        group: str | None = None,
    ) -> jax.Array:
        """Computes causal attention of the new tokens to their sequences.

        Args:
          layer: i32[]. Layer to read, as in `write`; or one that reads the cache of another.
          q: [R, T, Hq, D]. Queries of the new tokens.
          options: Scale, window, soft cap and sinks; plain attention if None. The window of the
            layer's group is used if the options have none.
          group: Name of a layer group, as in `write`.

        Returns:
          [R, T, Hq, D]. Attention outputs; zero for padding.

        Raises:
          ValueError: `layer` on the host is not one of the cache's layers, or it is traced and its
            group is not named; or the options' window is longer than that of the group.
        """
        i, index = self.layers.find(layer, group)
        options = _within_window(options or AttentionOptions(), self.layers.places[i].group)
        return self._attend(i, q, index, options)

    def _attend(
        self, group: int, q: jax.Array, layer: jax.Array | int, options: AttentionOptions
    ) -> jax.Array:
        """Attends queries [R, T, Hq, D] to a layer of a group, by its index within the group."""
        pool = self.pools[self.layers.places[group].pool]
        return self.rows[group].attend(q, pool, layer, options=options, q_lens=self.q_lens)


def _within_window(options: AttentionOptions, group: LayerGroup) -> AttentionOptions:
    """Returns options with the sliding window of a layer group, which keeps no more tokens."""
    window, asked = group.sliding_window, options.sliding_window
    if window is None or (asked is not None and asked <= window):
        return options
    if asked is not None:
        raise ValueError(
            f"A sliding window of {asked} tokens was asked for; layer group {group.name!r} keeps "
            f"{window}. Give the group a longer sliding_window."
        )
    return dataclasses.replace(options, sliding_window=window)


Rotary: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""A rotary embedding: `(x [R, T, H, D], positions i32[R, T]) -> x`. Padding has position -1."""


def attend_new(
    batch: PagedBatch,
    layer: jax.Array | int,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    *,
    rotary: Rotary | None = None,
    options: AttentionOptions | None = None,
    group: str | None = None,
) -> tuple[jax.Array, PagedBatch]:
    """Applies the rotary embedding, writes keys and values to the cache, and attends.

    Any attention module uses the cache by this call in place of its own attention: project
    queries, keys and values, call this, and project `out`.

    Args:
      batch: Rows of the new tokens.
      layer: i32[]. Layer of the cache, as in `PagedBatch.write`.
      qkv: Queries [R, T, Hq, D], keys and values [R, T, H, D] of the new tokens.
      rotary: Rotary embedding of queries and keys; none if None.
      options: Scale, window, soft cap and sinks; plain attention if None.
      group: Name of a layer group, for a scan over its layers.

    Returns:
      `(out, batch)`. out: [R, T, Hq, D], zero for padding. batch: The batch for the next layer.

    Raises:
      ValueError: The pool was consumed by an earlier call, or `layer` on the host is not one of
        the pool's layers.
    """
    q, k, v = qkv
    if rotary is not None:
        q, k = rotary(q, batch.positions), rotary(k, batch.positions)
    batch = batch.write(layer, k, v, group=group)
    return batch.attend(layer, q, options, group=group), batch
