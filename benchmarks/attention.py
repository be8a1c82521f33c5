"""One decoding step of attention: paged, against dense caches and other libraries.

Run `python -m benchmarks.attention --quick`. Every function reads a different layer or copy at
each call, so that none finds its keys in the processor's caches.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bandwidth import memory_roofs
from benchmarks.harness import (
    make_parser,
    print_table,
    progress,
    run,
    say,
    summarize,
    time_interleaved,
)
from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention import paged_attention
from ferrum_jax.encoding import decode_f32, encode, storage_dtype
from ferrum_jax.payload import KeyValue
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK

_COLD_BYTES = 160 << 20  # Several times the last-level cache that one core complex has.
_HEADS = {"9/3/64": (9, 3, 64), "32/8/128": (32, 8, 128)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of sequences in the layout of each contestant.

    R rows, Hq and H query and KV heads, D head dimension, P longest row, C copies.

    Attributes:
      q: [R, Hq, D].
      seq_lens: i32[R].
      pool: A pool of C layers.
      block_ids: i32[R, M], M just wide enough.
      k: C arrays [R, P, H, D]: the keys of each layer, padded.
      v: The values, in the same layout.
    """

    q: jax.Array
    seq_lens: np.ndarray
    pool: BlockPool
    block_ids: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        """The numbers' dtype."""
        return self.pool.dtype


def make_case(heads: tuple[int, int, int], dtype: str, seq_lens: Sequence[int], seed: int) -> Case:
    """Fills a pool and the same dense caches with random numbers, blocks shuffled."""
    rng = np.random.default_rng(seed)
    num_q_heads, num_kv_heads, head_dim = heads
    block_size, longest = 16, max(seq_lens)
    held = [ceil_div(seq_len, block_size) for seq_len in seq_lens]
    layer_bytes = 2 * sum(seq_lens) * num_kv_heads * head_dim * jnp.dtype(dtype).itemsize
    num_layers = max(2, ceil_div(_COLD_BYTES, layer_bytes))
    shape = (sum(held), num_layers, num_kv_heads, block_size, head_dim)
    blocks = [rng.standard_normal(shape, np.float32) for _ in range(2)]
    free = rng.permutation(sum(held)).astype(np.int32)
    block_ids = np.full((len(seq_lens), max(held)), NULL_BLOCK, np.int32)
    for row, ids in enumerate(np.split(free, np.cumsum(held)[:-1])):
        block_ids[row, : ids.size] = ids

    def dense(x: np.ndarray, layer: int) -> np.ndarray:
        taken = x[np.maximum(block_ids, 0), layer].swapaxes(2, 3)  # [R, M, B, H, D]
        return taken.reshape(len(seq_lens), -1, num_kv_heads, head_dim)[:, :longest]

    k, v = ([dense(x, layer) for layer in range(num_layers)] for x in blocks)
    jax_dtype, storage = jnp.dtype(dtype), storage_dtype(dtype, jax.default_backend())
    payload = KeyValue(num_kv_heads, head_dim, jax_dtype)
    stored = (encode(jnp.asarray(x), jax_dtype, storage) for x in blocks)
    return Case(
        q=jnp.asarray(rng.standard_normal((len(seq_lens), num_q_heads, head_dim)), jax_dtype),
        seq_lens=np.asarray(seq_lens, np.int32),
        pool=BlockPool(payload.join(*stored), payload),
        block_ids=block_ids,
        k=k,
        v=v,
    )


def over_layers(attend: Callable[..., Any], per_layer: Sequence[tuple]) -> Callable[[], Any]:
    """Returns a function without arguments that goes on to the next layer at every call."""
    layers = itertools.cycle(per_layer)
    return lambda: attend(*next(layers))


def paged(
    case: Case, attend: Callable[..., jax.Array] = paged_attention, widening: int = 1
) -> Callable[[], jax.Array]:
    """Returns paged attention, the table `widening` times as wide as the longest row."""
    spare = (widening - 1) * case.block_ids.shape[1]
    padded = np.pad(case.block_ids, ((0, 0), (0, spare)), constant_values=NULL_BLOCK)
    block_ids, seq_lens = jnp.asarray(padded), jnp.asarray(case.seq_lens)
    attend = jax.jit(attend)
    return over_layers(
        lambda layer: attend(case.q, case.pool, layer, block_ids=block_ids, held_lens=seq_lens),
        [(jnp.asarray(layer, jnp.int32),) for layer in range(case.pool.num_layers)],
    )


def gather_all(case: Case) -> Callable[[], jax.Array]:
    """Returns the plain way: gather every row to the longest, then two einsums."""

    @jax.jit
    def attend(q, pool, layer, block_ids, seq_lens):
        k, v = (
            decode_f32(x[jnp.maximum(block_ids, 0), layer], pool.dtype).swapaxes(2, 3)
            for x in pool.payload.split(pool.arrays)
        )
        rows, num_tokens = block_ids.shape[0], block_ids.shape[1] * pool.block_size
        k, v = (x.reshape(rows, num_tokens, *x.shape[3:]) for x in (k, v))
        q = q.astype(jnp.float32).reshape(rows, pool.num_kv_heads, -1, pool.head_dim)
        weights = masked_softmax(jnp.einsum("rhgd,rshd->rhgs", q, k), seq_lens, pool.head_dim)
        return jnp.einsum("rhgs,rshd->rhgd", weights, v)

    block_ids, seq_lens = jnp.asarray(case.block_ids), jnp.asarray(case.seq_lens)
    return over_layers(
        lambda layer: attend(case.q, case.pool, layer, block_ids, seq_lens),
        [(jnp.asarray(layer, jnp.int32),) for layer in range(case.pool.num_layers)],
    )


def dense_transposed(case: Case) -> Callable[[], jax.Array]:
    """Returns einsums on a padded cache with K as [R, H, D, P]: the fastest dense form."""

    @jax.jit
    def attend(q, k, v, seq_lens):
        rows, num_kv_heads, head_dim, _ = k.shape
        q = q.reshape(rows, num_kv_heads, -1, head_dim)
        logits = jnp.einsum("rhgd,rhds->rhgs", q, k)
        weights = masked_softmax(logits, seq_lens, head_dim).astype(v.dtype)
        return jnp.einsum("rhgs,rhsd->rhgd", weights, v)

    seq_lens = jnp.asarray(case.seq_lens)
    k = [jnp.asarray(x.transpose(0, 2, 3, 1), case.dtype) for x in case.k]
    v = [jnp.asarray(x.transpose(0, 2, 1, 3), case.dtype) for x in case.v]
    return over_layers(lambda k, v: attend(case.q, k, v, seq_lens), list(zip(k, v, strict=True)))


def dot_product_attention(case: Case) -> Callable[[], jax.Array]:
    """Returns JAX's own attention on a padded cache [R, P, H, D]."""

    @jax.jit
    def attend(q, k, v, seq_lens):
        return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=seq_lens)

    seq_lens = jnp.asarray(case.seq_lens)
    copies = [
        (jnp.asarray(k, case.dtype), jnp.asarray(v, case.dtype))
        for k, v in zip(case.k, case.v, strict=True)
    ]
    return over_layers(lambda k, v: attend(case.q, k, v, seq_lens), copies)


def masked_softmax(logits: jax.Array, seq_lens: jax.Array, head_dim: int) -> jax.Array:
    """Softmax in float32 over the tokens that each row holds; logits [R, H, G, P]."""
    held = jnp.arange(logits.shape[-1])[None, :] < seq_lens[:, None]
    logits = logits.astype(jnp.float32) * head_dim**-0.5
    return jax.nn.softmax(jnp.where(held[:, None, None, :], logits, -jnp.inf), axis=-1)


def torch_contestants(case: Case) -> dict[str, Callable[[], Any]]:
    """Returns PyTorch's attention, padded under a mask and at exact lengths, if installed."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        say("torch is not installed: its attention is left out.")
        return {}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    dtype = getattr(torch, case.dtype.name)
    q = torch.from_numpy(np.array(case.q, np.float32)).to(dtype)[:, :, None]
    lens, longest = case.seq_lens.tolist(), case.k[0].shape[1]
    mask = torch.arange(longest)[None, :] < torch.tensor(lens)[:, None]
    mask = mask[:, None, None, :]
    copies = [
        tuple(torch.from_numpy(x).to(dtype).transpose(1, 2).contiguous() for x in kv)
        for kv in zip(case.k, case.v, strict=True)
    ]
    grouped = q.reshape(len(lens), case.pool.num_kv_heads, -1, q.shape[-1])

    def padded(k, v):
        with torch.inference_mode():
            return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    def exact(k, v):
        # Query heads that share a KV head stand as queries: as fast as it gets.
        with torch.inference_mode():
            return [
                sdpa(grouped[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n])
                for i, n in enumerate(lens)
            ]

    return {
        "torch SDPA, padded": over_layers(padded, copies),
        "torch SDPA, exact": over_layers(exact, copies),
    }


def compare(name: str, dtype: str, seq_lens: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Times all contestants on one case and returns a figure for each."""
    case = make_case(_HEADS[name], dtype, seq_lens, seed=0)
    contestants: dict[str, Callable[[], Any]] = {
        # PyTorch is last, since its threads spin for about 10 ms after each call; the function
        # after it is slow, and is affected least.
        "gather all + einsum": gather_all(case),
        "paged": paged(case),
        "paged, table x4": paged(case, widening=4),
        "paged, table x16": paged(case, widening=16),
        "paged, in XLA operations": paged(case, functools.partial(paged_attention, backend="xla")),
        "jax.nn.dot_product_attention, padded": dot_product_attention(case),
        "dense, K transposed, padded": dense_transposed(case),
    }
    live_bytes = int(2 * sum(seq_lens) * np.prod(_HEADS[name][1:]) * case.dtype.itemsize)
    if jax.default_backend() == "cpu":
        contestants |= memory_roofs(tuple(case.pool.arrays.values()), live_bytes)
    contestants |= torch_contestants(case)
    seconds = time_interleaved(contestants, repeats)
    figures = []
    for contestant, times in seconds.items():
        figure = summarize(times)
        figures.append(
            {
                "heads": name,
                "dtype": dtype,
                "contestant": contestant,
                **figure,
                "ratio": float(np.median(np.divide(times, seconds["paged"]))),
                "gigabytes_per_second": live_bytes / figure["median_ms"] / 1e6,
            }
        )
        if "plain read" in seconds:
            figures[-1]["of_read"] = float(np.median(np.divide(seconds["plain read"], times)))
    return figures


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times all contestants on every case, and prints their table."""
    repeats = args.repeats or (10 if args.quick else 50)
    low, high = args.tokens
    seq_lens = np.random.default_rng(0).integers(low, high + 1, args.rows).tolist()
    say(f"{args.rows} rows of {low} to {high} tokens, {sum(seq_lens)} in all")
    cases = list(itertools.product(_HEADS, ("float32", "bfloat16")))
    if args.quick:
        cases = [("9/3/64", "float32")]
    figures = []
    for name, dtype in progress(cases, "case"):
        figures += compare(name, dtype, seq_lens, repeats)
    columns = list(figures[0])
    print_table(columns, [[figure[column] for column in columns] for figure in figures])
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("attention", __doc__, quick="small heads, float32, few repeats")
    parser.add_argument("--rows", type=int, default=16, help="sequences in the batch")
    parser.add_argument("--tokens", type=int, nargs=2, default=(100, 2000), metavar=("LO", "HI"))
    parser.add_argument("--repeats", type=int, help="timed calls of each contestant")
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
