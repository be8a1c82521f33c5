"""Attention calls in numpy, on pools full of garbage: a catalogue of shapes, with random data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention import AttentionCall, AttentionOptions
from ferrum_jax.attention.call import attention_call
from ferrum_jax.codecs import PackedCodec, VectorLayout, codec_for
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.payload import KeyValue
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK, TokenFormat
from tests.support.pools import kv_pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention call in numpy; `T` None means one query per row, `q_lens` None means T."""

    q: np.ndarray  # [R, T, Hq, D] or [R, Hq, D]
    k: np.ndarray  # [N, L, H, B, D]
    v: np.ndarray
    layer: int
    block_ids: np.ndarray  # i32[R, M]
    held_lens: np.ndarray  # i32[R]
    q_lens: np.ndarray | None
    dtype: str
    options: AttentionOptions
    token_format: TokenFormat = TokenFormat.Native

    def arguments(self, platform: str = "cpu") -> dict:
        """The arguments of `paged_attention`, with a pool as it is stored on a platform."""
        return {
            "q": jnp.asarray(self.q.astype(jnp.dtype(self.dtype))),
            "pool": self.stored_pool(platform),
            "layer": np.int32(self.layer),
            "options": self.options,
            "block_ids": jnp.asarray(self.block_ids),
            "held_lens": jnp.asarray(self.held_lens),
            "q_lens": None if self.q_lens is None else jnp.asarray(self.q_lens),
        }

    def stored_pool(self, platform: str) -> BlockPool:
        """The pool as it is stored on a platform."""
        dtype = jnp.dtype(self.dtype)
        stored = storage_dtype(dtype, platform)
        k, v = (jnp.asarray(x.astype(dtype).view(stored)) for x in (self.k, self.v))
        return kv_pool(k, v, dtype)

    def call(self, platform: str = "cpu") -> AttentionCall:
        """The checked arguments that a backend takes."""
        call = attention_call(**self.arguments(platform))
        return dataclasses.replace(call, token_format=self.token_format)

    def replace(self, **changes) -> "Problem":
        """The problem with other fields."""
        return dataclasses.replace(self, **changes)


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
    max_len=None,
    spare_width=2,
    **options,
) -> Problem:
    """Random rows in shuffled blocks; what no row holds is NaN.

    `options` are those of `AttentionOptions`, `sinks=True` for random ones. Pool and table have
    room for rows of `max_len`, so that their shapes do not follow from `held_lens`.
    """
    rng = np.random.default_rng(seed)
    held_lens = np.asarray(held_lens, np.int32)
    held = ceil_div(held_lens, block_size)
    room = held if max_len is None else np.full(held.shape, ceil_div(max_len, block_size))
    num_blocks, num_layers, layer = int(room.sum()) + 3, 3, 1
    free = list(rng.permutation(num_blocks))
    block_ids = np.full((held_lens.size, room.max() + spare_width), NULL_BLOCK, np.int32)
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
        options["sinks"] = jnp.asarray(rng.normal(size=heads[0]).astype(np.float32))
    q, k, v = (x.astype(jnp.dtype(dtype)).astype(np.float32) for x in (q, k, v))  # As stored.
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


VARIANTS = {
    "plain": {},
    "scale": {"scale": 0.5},
    "window": {"sliding_window": 6},
    "cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "all": {"scale": 0.5, "sliding_window": 6, "soft_cap": 2.0, "sinks": True},
}

# A program is compiled for each shape, so there are few, and many problems of each.
CATALOGUE = {
    "decode": {"max_len": 300, "heads": (9, 3), "head_dim": 64, "block_size": 16},
    "decode with all options": {
        **{"max_len": 300, "heads": (8, 8), "head_dim": 128, "block_size": 32},
        **{"dtype": "bfloat16", "scale": 0.3, "sliding_window": 64, "soft_cap": 5.0, "sinks": True},
    },
    "odd heads, blocks of 1": {
        **{"max_len": 40, "heads": (2, 2), "head_dim": 7, "block_size": 1, "dtype": "float16"}
    },
    "windowed chunk": {
        **{"max_len": 300, "num_queries": 3, "heads": (4, 2), "head_dim": 80, "block_size": 24},
        **{"sliding_window": 7},
    },
    "wide heads": {
        **{"max_len": 40, "num_queries": 4, "heads": (4, 1), "head_dim": 256, "block_size": 5},
        **{"dtype": "bfloat16", "sinks": True},
    },
    "long chunk": {
        **{"max_len": 301, "num_queries": 33, "heads": (6, 2), "head_dim": 64, "block_size": 100},
        **{"soft_cap": 5.0},
    },
    "blocks of 256": {
        **{"max_len": 769, "heads": (3, 1), "head_dim": 32, "block_size": 256},
        **{"sliding_window": 500},
    },
    "chunk with all options": {
        **{"max_len": 70, "num_queries": 13, "heads": (4, 2), "head_dim": 128, "block_size": 8},
        **VARIANTS["all"],
    },
}


def random_problem(name: str, seed: int) -> Problem:
    """A problem of a shape of the catalogue, with random data, lengths and blocks."""
    shape, rng = CATALOGUE[name], np.random.default_rng(seed)
    held_lens = rng.integers(0, shape["max_len"] + 1, 5)
    num_queries = shape.get("num_queries")
    q_lens = None
    if num_queries is not None:
        q_lens = np.minimum(rng.integers(0, num_queries + 1, 5), held_lens)
    return problem(seed=seed, held_lens=held_lens, q_lens=q_lens, **shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedProblem(Problem):
    """A problem whose pool is compressed; `k` and `v` are its numbers, [N, L, H, T, D]."""

    pool: BlockPool

    def stored_pool(self, platform: str) -> BlockPool:
        """The compressed pool, which is the same on every platform."""
        return self.pool


def packed_problem(
    token_format: TokenFormat, *, block_size=4, head_dim=64, pool_dtype="float32", **shape
) -> PackedProblem:
    """Rows in compressed blocks of random words, decoded by numpy; unused scales are NaN.

    Args:
      token_format: Format of all rows.
      block_size: Tokens per native block.
      head_dim: D.
      pool_dtype: Dtype of the pool.
      shape: As of `problem`; `dtype` is that of the queries.
    """
    layout = codec_for(token_format, KeyValue(1, head_dim, pool_dtype), block_size)
    p = problem(block_size=layout.num_tokens, head_dim=head_dim, **shape)
    rng = np.random.default_rng(shape.get("seed", 0))
    is_live = ~np.isnan(p.k[..., 0])  # [N, L, H, T]
    word = np.dtype(f"u{layout.word_bytes}")
    words = (*is_live.shape[:-1], 2 * layout.half_words)
    words = rng.integers(0, np.iinfo(word).max, words, word, endpoint=True)
    for vectors in (layout.k, layout.v):
        scales = rng.uniform(0.5, 2.0, is_live.shape) / 2 ** (vectors.bits - 1)
        scales = np.where(is_live, scales, np.nan).astype(f"f{layout.word_bytes}")
        first = vectors.start + layout.num_tokens * vectors.num_words
        words[..., first : first + layout.num_tokens] = scales.view(word)
    stored = storage_dtype(pool_dtype, "cpu")
    k, v = (
        jnp.asarray(
            np.ascontiguousarray(half).view(stored).reshape(*half.shape[:-1], block_size, -1)
        )
        for half in np.split(words, 2, axis=-1)
    )
    fields = {field.name: getattr(p, field.name) for field in dataclasses.fields(p)}
    fields |= {name: _decoded(words, layout, getattr(layout, name)) for name in ("k", "v")}
    fields |= {"token_format": token_format}
    return PackedProblem(**fields, pool=kv_pool(k, v, pool_dtype))


def _decoded(words: np.ndarray, layout: PackedCodec, vectors: VectorLayout) -> np.ndarray:
    """The numbers f64[..., T, D] of blocks, words[..., 2 * half_words]."""
    num_tokens, bits, word_bits = layout.num_tokens, vectors.bits, 8 * layout.word_bytes
    end = vectors.start + num_tokens * vectors.num_words
    packed = words[..., vectors.start : end].reshape(*words.shape[:-1], num_tokens, -1)
    packed = packed.astype(np.int64)
    numbers = [(packed >> first) % 2**bits for first in range(0, word_bits, bits)]
    numbers = np.concatenate(numbers, axis=-1)
    numbers = np.where(numbers < 2 ** (bits - 1), numbers, numbers - 2**bits)
    scales = np.ascontiguousarray(words[..., end : end + num_tokens])
    return numbers * scales.view(f"f{layout.word_bytes}").astype(np.float64)[..., None]


def encoded(token_format: TokenFormat, block_size: int, p: Problem, pool_dtype) -> PackedProblem:
    """A problem with its numbers rounded to a format, its blocks as long as those of the format."""
    layout = codec_for(token_format, KeyValue(1, p.k.shape[-1], pool_dtype), block_size)

    @jax.jit
    def rounded(k, v):
        pages = layout.encode(k, v, jnp.dtype(pool_dtype))
        return pages, layout.decode(*pages)

    pages, kv = rounded(p.k, p.v)
    k, v = (np.asarray(x) for x in kv)
    fields = {field.name: getattr(p, field.name) for field in dataclasses.fields(p)}
    fields |= {"k": k, "v": v, "token_format": token_format}
    return PackedProblem(**fields, pool=kv_pool(*pages, pool_dtype))
