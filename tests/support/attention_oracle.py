"""Attention by nested loops in float64, and pools full of garbage to run it on."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.encoding import encode, storage_dtype
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention call in numpy; `T` None means one query a row, `q_lens` None means T."""

    q: np.ndarray  # [R, T, Hq, D] or [R, Hq, D]
    k: np.ndarray  # [N, L, H, B, D]
    v: np.ndarray
    layer: int
    block_ids: np.ndarray  # i32[R, M]
    held_lens: np.ndarray  # i32[R]
    q_lens: np.ndarray | None
    dtype: str
    options: AttentionOptions

    def args(self, device=None) -> tuple:
        """What `paged_attention` takes."""
        dtype = jnp.dtype(self.dtype)
        storage = storage_dtype(dtype, "cpu" if device is None else device.platform)
        pool = BlockPool(
            k=encode(jnp.asarray(self.k, dtype), dtype, storage),
            v=encode(jnp.asarray(self.v, dtype), dtype, storage),
            dtype=dtype,
        )
        rest = (self.layer, jnp.asarray(self.block_ids), jnp.asarray(self.held_lens))
        q_lens = None if self.q_lens is None else jnp.asarray(self.q_lens)
        return jnp.asarray(self.q, dtype), pool, *rest, q_lens, self.options


def problem(
    *,
    seed=0,
    held_lens=(5, 0, 17),
    num_queries=None,
    q_lens=None,
    heads=(4, 2),
    head_dim=32,
    block_size=4,
    dtype="float32",
    spare_width=2,
    **options,
) -> Problem:
    """Random rows in shuffled blocks; whatever no row holds is NaN.

    `options` are those of `AttentionOptions`, `sinks=True` for random ones.
    """
    rng = np.random.default_rng(seed)
    held_lens = np.asarray(held_lens, np.int32)
    held = -(-held_lens // block_size)
    num_blocks, num_layers, layer = int(held.sum()) + 3, 3, 1
    free = list(rng.permutation(num_blocks))
    block_ids = np.full((held_lens.size, held.max() + spare_width), NULL_BLOCK, np.int32)
    shape = (num_blocks, num_layers, heads[1], block_size, head_dim)
    k, v = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for row, seq_len in enumerate(held_lens):
        for logical_index in range(held[row]):
            block_id = block_ids[row, logical_index] = free.pop()
            live = min(block_size, seq_len - logical_index * block_size)
            for pool in (k, v):
                pool[block_id, layer, :, :live] = rng.normal(size=(heads[1], live, head_dim))
    queries = () if num_queries is None else (num_queries,)
    q = rng.normal(size=(held_lens.size, *queries, heads[0], head_dim)).astype(np.float32)
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(rng.normal(size=heads[0]), jnp.float32)
    q, k, v = (np.array(jnp.asarray(x, dtype), np.float32) for x in (q, k, v))  # As stored.
    return Problem(
        q=q,
        k=k,
        v=v,
        layer=layer,
        block_ids=block_ids,
        held_lens=held_lens,
        q_lens=None if q_lens is None else np.asarray(q_lens, np.int32),
        dtype=dtype,
        options=AttentionOptions(**options),
    )


@np.errstate(over="ignore", invalid="ignore")
def attention(p: Problem) -> np.ndarray:
    """The answer in float64, shape of `p.q`; numbers out of range become the nearest in range."""
    q = (p.q if p.q.ndim == 4 else p.q[:, None]).astype(np.float64)
    rows, num_queries, num_q_heads, _ = q.shape
    room = p.block_ids.shape[1] * p.k.shape[3]
    out = np.zeros_like(q)
    for row in range(rows):
        num_live = num_queries if p.q_lens is None else int(np.clip(p.q_lens[row], 0, num_queries))
        seq_len = int(np.clip(p.held_lens[row], 0, room))
        for t in range(num_live):
            for head in range(num_q_heads):
                position = seq_len - num_live + t
                out[row, t, head] = _one_query(p, row, position, head, q[row, t, head])
    return out.reshape(p.q.shape)


def _one_query(p: Problem, row: int, position: int, head: int, q: np.ndarray) -> np.ndarray:
    block_size, options = p.k.shape[3], p.options
    kv_head = head // (p.q.shape[-2] // p.k.shape[2])
    window = options.sliding_window or position + 1
    seen = range(max(0, position - window + 1), position + 1)
    if not seen:
        return np.zeros_like(q)
    block_ids = np.clip(p.block_ids[row, np.asarray(seen) // block_size], 0, p.k.shape[0] - 1)
    layer = np.clip(p.layer, 0, p.k.shape[1] - 1)
    offsets = np.asarray(seen) % block_size
    k, v = (x[block_ids, layer, kv_head, offsets].astype(np.float64) for x in (p.k, p.v))
    logits = k @ q * (q.size**-0.5 if options.scale is None else options.scale)
    if options.soft_cap is not None:
        logits = options.soft_cap * np.tanh(logits / options.soft_cap)
    is_seen = logits != -np.inf
    if not is_seen.any():
        return np.zeros_like(q)
    logits, v = logits[is_seen], v[is_seen]
    sinks = [] if options.sinks is None else [float(options.sinks[head])]
    weights = np.exp(logits - max([logits.max(), *sinks]))
    total = weights.sum() + np.exp(np.asarray(sinks) - max([logits.max(), *sinks])).sum()
    return weights @ v / total
