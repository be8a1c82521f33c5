"""Attention by nested loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.attention_problems import Problem


def assert_right(out: jax.Array, p: Problem) -> None:
    """Fails unless a result has the shape, dtype and numbers of the loops' answer."""
    want = attention(p)
    assert out.shape == p.q.shape
    assert out.dtype == jnp.dtype(p.dtype)
    bound = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[p.dtype]
    scale = 1.0 if p.dtype == "float32" else max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=bound * scale)


@np.errstate(over="ignore", invalid="ignore")
def attention(p: Problem) -> np.ndarray:
    """The answer in float64, shape of `p.q`; ids and lengths out of range become the nearest."""
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
