"""Native attention over compressed blocks, whose words are drawn at random and decoded by numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.attention.native import native_attention, supports
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.formats import BlockLayout, KeysAndValues, VectorLayout, block_layout
from ferrum_jax.ops.compressed import encode_blocks
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK, TokenFormat
from tests.support.attention_oracle import Problem, attention

DTYPES = ["float32", "bfloat16", "float16"]
COMPRESSED = tuple(f for f in TokenFormat if f != TokenFormat.Native)
FORMATS = pytest.mark.parametrize("token_format", COMPRESSED, ids=lambda x: x.name)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A problem whose pool is compressed; `problem.k` and `.v` are its numbers, [N, L, H, T, D]."""

    problem: Problem
    pool: BlockPool
    token_format: TokenFormat

    @property
    def inputs(self) -> AttentionInputs:
        """What the kernel takes."""
        p = self.problem
        block_ids, held_lens = jnp.asarray(p.block_ids), jnp.asarray(p.held_lens)
        q_lens = None if p.q_lens is None else jnp.asarray(p.q_lens)
        return attention_inputs(
            jnp.asarray(p.q), self.pool, p.layer, block_ids, held_lens, q_lens, p.options
        )

    def replace(self, **changes) -> "Packed":
        """The same with another table, or other lengths."""
        return dataclasses.replace(self, problem=dataclasses.replace(self.problem, **changes))


def decoded(words: np.ndarray, layout: BlockLayout, vectors: VectorLayout) -> np.ndarray:
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


def draw(
    token_format: TokenFormat,
    *,
    seed=0,
    held_lens=(37, 0, 5, 64),
    num_queries=None,
    q_lens=None,
    heads=(4, 2),
    head_dim=64,
    block_size=4,
    dtype="float32",
    **options,
) -> Packed:
    """Random rows in shuffled blocks; the scales of whatever no row holds are NaN."""
    rng = np.random.default_rng(seed)
    layout = block_layout(token_format, block_size=block_size, head_dim=head_dim, dtype=dtype)
    held_lens = np.asarray(held_lens, np.int32)
    num_held = -(-held_lens // layout.num_tokens)
    num_blocks, num_layers, layer = int(num_held.sum()) + 3, 2, 1
    block_ids = np.full((held_lens.size, num_held.max() + 2), NULL_BLOCK, np.int32)
    free = list(rng.permutation(num_blocks))
    num_live = np.zeros(num_blocks, int)
    for row, seq_len in enumerate(held_lens):
        for logical_index in range(num_held[row]):
            block_id = block_ids[row, logical_index] = free.pop()
            num_live[block_id] = seq_len - logical_index * layout.num_tokens
    word = np.dtype(f"u{layout.word_bytes}")
    shape = num_blocks, num_layers, heads[1], 2 * layout.half_words
    words = rng.integers(0, np.iinfo(word).max, shape, word, endpoint=True)
    is_live = np.arange(layout.num_tokens) < num_live[:, None, None, None]
    for vectors in (layout.k, layout.v):
        scales = rng.uniform(0.5, 2.0, (*shape[:-1], layout.num_tokens)) / 2 ** (vectors.bits - 1)
        scales = np.where(is_live, scales, np.nan).astype(f"f{layout.word_bytes}")
        first = vectors.start + layout.num_tokens * vectors.num_words
        words[..., first : first + layout.num_tokens] = scales.view(word)
    stored = storage_dtype(dtype, "cpu")
    k, v = (np.ascontiguousarray(half).view(stored) for half in np.split(words, 2, axis=-1))
    half = *shape[:-1], block_size, head_dim
    pool = BlockPool(
        k=jnp.asarray(k.reshape(half)), v=jnp.asarray(v.reshape(half)), dtype=jnp.dtype(dtype)
    )
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(rng.normal(size=heads[0]), jnp.float32)
    queries = () if num_queries is None else (num_queries,)
    p = Problem(
        q=rng.normal(size=(held_lens.size, *queries, heads[0], head_dim)).astype(np.float32),
        k=decoded(words, layout, layout.k),
        v=decoded(words, layout, layout.v),
        layer=layer,
        block_ids=block_ids,
        held_lens=held_lens,
        q_lens=None if q_lens is None else np.asarray(q_lens, np.int32),
        dtype="float32",
        options=AttentionOptions(**options),
    )
    return Packed(p, pool, token_format)


def attend(x: Packed) -> np.ndarray:
    inputs = x.inputs
    assert supports(inputs, x.token_format)
    return np.asarray(native_attention(inputs, x.token_format)).reshape(x.problem.q.shape)


def assert_right(x: Packed) -> None:
    np.testing.assert_allclose(attend(x), attention(x.problem), rtol=0, atol=1e-5)


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("num_queries", [None, 3], ids=["decode", "chunk"])
def test_it_agrees_with_float64_loops(token_format, dtype, head_dim, num_queries):
    q_lens = None if num_queries is None else (3, 0, 2, 1)
    assert_right(
        draw(token_format, dtype=dtype, head_dim=head_dim, num_queries=num_queries, q_lens=q_lens)
    )


@FORMATS
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("num_queries", [None, 3], ids=["decode", "chunk"])
@pytest.mark.parametrize(
    "variant",
    [
        {"sliding_window": 6},
        {"soft_cap": 2.0},
        {"sinks": True},
        {"scale": 0.5, "sliding_window": 20, "soft_cap": 2.0, "sinks": True},
    ],
    ids="+".join,
)
def test_every_variant_agrees_with_float64_loops(token_format, dtype, num_queries, variant):
    assert_right(draw(token_format, dtype=dtype, num_queries=num_queries, **variant))


@pytest.mark.parametrize("seed", range(30))
def test_random_shapes_agree_with_float64_loops(seed):
    rng = np.random.default_rng(seed)
    dtype, num_kv_heads = str(rng.choice(DTYPES)), int(rng.choice([1, 2, 3]))
    x = draw(
        TokenFormat(int(rng.choice(COMPRESSED))),
        seed=seed,
        held_lens=rng.integers(0, int(rng.choice([20, 300, 900])), int(rng.integers(1, 6))),
        num_queries=None if rng.random() < 0.6 else 2,
        heads=(num_kv_heads * int(rng.choice([1, 2, 3, 5])), num_kv_heads),
        head_dim=int(rng.choice([64, 72, 96, 256, 512])),
        block_size=int(rng.choice([1, 2, 5, 16, 100])),
        dtype=dtype,
        sliding_window=None if rng.random() < 0.6 else int(rng.choice([1, 7, 64, 500])),
        soft_cap=None if rng.random() < 0.7 else 5.0,
        sinks=rng.random() < 0.3,
    )
    assert_right(x)


@FORMATS
@pytest.mark.parametrize("window", [None, 257])
def test_long_rows_are_cut_and_put_together(token_format, window):
    # A tile is 256 tokens, and a part of 64 numbers no fewer than 128.
    held_lens = [n + d for n in (256, 512, 2560) for d in (-1, 0, 1)]
    assert_right(draw(token_format, held_lens=held_lens, block_size=16, sliding_window=window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_reach_into_the_half_of_values_are_found(dtype):
    x = draw(TokenFormat.Int8Int4, dtype=dtype, held_lens=(200, 199))
    layout = x.pool.layout(TokenFormat.Int8Int4)
    assert layout.num_tokens * layout.k.num_words > layout.half_words
    assert_right(x)


@FORMATS
def test_ids_and_lengths_that_cannot_be_spoil_their_own_row_only(token_format):
    x = draw(token_format, held_lens=(30, 30, 30, 30), num_queries=2)
    want = attention(x.problem)[3]
    block_ids, held_lens = x.problem.block_ids.copy(), x.problem.held_lens.copy()
    block_ids[0] = np.iinfo(np.int32).max
    block_ids[1] = np.iinfo(np.int32).min
    held_lens[2] = np.iinfo(np.int32).max
    bad = x.replace(block_ids=block_ids, held_lens=held_lens)
    np.testing.assert_allclose(attend(bad)[3], want, rtol=0, atol=1e-5)
    attend(x.replace(layer=10**9))


@pytest.mark.parametrize(
    ("token_format", "dtype"), list(zip(COMPRESSED, DTYPES, strict=True)), ids=str
)
def test_it_equals_xla_attention_on_encoded_blocks(token_format, dtype):
    x = draw(token_format, dtype=dtype, held_lens=(37, 0, 5, 64), num_queries=2)
    shape = 2, x.pool.num_blocks * x.pool.tokens_per_block(token_format), 64
    rng = np.random.default_rng(0)
    kv = KeysAndValues(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))
    halves = jax.jit(encode_blocks, static_argnums=2)(x.pool, kv, token_format)
    k, v = (half[:, None] for half in halves)
    inputs = dataclasses.replace(x.inputs, pool=dataclasses.replace(x.pool, k=k, v=v))
    inputs = dataclasses.replace(inputs, layer=jnp.int32(0))
    assert supports(inputs, token_format)
    got, want = native_attention(inputs, token_format), xla_attention(inputs, token_format)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert np.any(got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_uses_one_kernel_for_native_rows_and_one_for_all_others(dtype):
    kv = jnp.zeros((12, 1, 2, 8, 64), storage_dtype(dtype, "cpu"))
    pool = BlockPool(k=kv, v=kv, dtype=jnp.dtype(dtype), formats=tuple(TokenFormat))
    q, block_ids = jnp.zeros((4, 4, 64), jnp.float32), jnp.zeros((4, 3), jnp.int32)
    ints = jnp.zeros(4, jnp.int32)

    @jax.jit
    def program(q, pool, block_ids, held_lens, formats):
        return paged_attention(q, pool, 0, block_ids, held_lens, formats=formats)

    text = program.lower(q, pool, block_ids, ints, ints).as_text()
    width = jnp.dtype(dtype).itemsize
    for numbers, num_calls in ((dtype, 1), (f"packed_{width}", 3), (f"packed_{6 - width}", 0)):
        assert text.count(f"@ferrum_jax_attention_{numbers}(") == num_calls


def test_vmap_over_replicas_equals_one_at_a_time():
    token_format = TokenFormat.Int8Int4
    replicas = [draw(token_format, seed=seed, num_queries=2) for seed in range(2)]
    inputs = [x.inputs for x in replicas]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *inputs)
    for unmapped in ((), ("layer", "q_lens")):  # Whatever is the same for all may be shared.
        axes = jax.tree.map(lambda _: 0, stacked)
        axes = dataclasses.replace(axes, **dict.fromkeys(unmapped))
        args = dataclasses.replace(stacked, **{name: getattr(inputs[0], name) for name in unmapped})
        mapped = jax.vmap(lambda x: native_attention(x, token_format), in_axes=(axes,))
        for got, x in zip(mapped(args), replicas, strict=True):
            want = attention(x.problem)
            np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=1e-5)


def test_what_it_does_not_do_is_left_to_xla():
    for token_format, head_dim, is_done in (
        (TokenFormat.Int4, 64, True),
        (TokenFormat.Int4, 56, False),  # Vectors of 7 words.
        (TokenFormat.Int8, 56, True),
        (TokenFormat.Int8Int4, 56, False),
    ):
        x = draw(token_format, head_dim=head_dim)
        assert supports(x.inputs, token_format) == is_done
    x = draw(TokenFormat.Int8, num_queries=9)  # 18 queries a KV head.
    assert not supports(x.inputs, TokenFormat.Int8)
