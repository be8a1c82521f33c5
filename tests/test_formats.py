"""Compressed blocks: their layout, the error of rounding, and the bits of other tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.codecs import codec_for, rotate
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.payload import KeyValue
from ferrum_jax.types import TokenFormat
from tests.support.caches import same_bits, snapshot
from tests.support.compressed import COMPRESSED, small_spec, with_rows
from tests.support.pools import keys, with_arrays

BITS = {TokenFormat.Int8: (8, 8), TokenFormat.Int8Int4: (8, 4), TokenFormat.Int4: (4, 4)}
DTYPES = ("float32", "float16", "bfloat16")
BLOCK_SIZE, HEAD_DIM = 4, 16
cases = pytest.mark.parametrize(
    ("token_format", "dtype"),
    list(itertools.product(COMPRESSED, DTYPES)),
    ids=lambda x: x if isinstance(x, str) else x.name,
)


def layout_of(token_format, dtype, block_size=BLOCK_SIZE, head_dim=HEAD_DIM):
    return codec_for(token_format, KeyValue(1, head_dim, dtype), block_size)


def regions(layout):
    """First word and end of all that a block holds: numbers and scales of keys and of values."""
    for vectors in (layout.k, layout.v):
        end = vectors.start + layout.num_tokens * vectors.num_words
        yield vectors.start, end
        yield end, end + layout.num_tokens


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def _round_trip(token_format, dtype, head_dim, k, v, stored):
    layout = layout_of(token_format, dtype, head_dim=head_dim)
    halves = layout.encode(k, v, stored)
    back = layout.decode(*halves)
    plain = [
        rotate(x) if vectors.is_rotated else x
        for x, vectors in zip(back, (layout.k, layout.v), strict=True)
    ]
    return halves, back, plain


def round_trip(token_format, dtype, k, v):
    """What blocks store of vectors [..., T, D], and what they give back: rotated, and not."""
    stored = storage_dtype(jnp.dtype(dtype), "cpu")
    out = _round_trip(token_format, dtype, k.shape[-1], jnp.asarray(k), jnp.asarray(v), stored)
    for half in out[0]:
        assert half.dtype == stored and half.shape == (*k.shape[:-2], BLOCK_SIZE, k.shape[-1])
    return jax.tree.map(np.asarray, out)


def vectors_for(token_format, dtype, seed=0, head_dim=HEAD_DIM, lead=(3, 2)):
    num_tokens = layout_of(token_format, dtype, head_dim=head_dim).num_tokens
    rng = np.random.default_rng(seed)
    shape = 2, *lead, num_tokens, head_dim
    return rng.normal(size=shape).astype(np.float32)


def rotated(x):
    """`rotate`, in NumPy."""
    return x @ np.asarray(rotate(np.eye(x.shape[-1], dtype=np.float32)))


def assert_rounded(got, want, bits):
    """Each vector is off by at most half a step a number, in the space where it was rounded."""
    largest = 2 ** (bits - 1) - 1
    if bits == 4:
        got, want = rotated(got), rotated(want)
    step = np.abs(want).max(-1, keepdims=True) / largest
    # A scale in 16 bits is off by 2**-11 of itself, which is most for the largest number.
    assert (np.abs(got - want) <= step * (0.5 + largest * 2**-10) + 1e-30).all()


def assert_round_trip(token_format, dtype, k, v):
    """Asserts that keys and values are decoded within rounding; returns them."""
    _, _, back = round_trip(token_format, dtype, k, v)
    for got, want, bits in zip(back, (k, v), BITS[token_format], strict=True):
        assert_rounded(got, want, bits)
    return back


SIZES = [(b, d) for b in (1, 2, 3, 5, 8, 16, 17, 32) for d in (2, 4, 8, 12, 24, 32, 64, 80, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token_format", COMPRESSED, ids=lambda x: x.name)
def test_a_layout_neither_overlaps_nor_leaves_its_halves(token_format, dtype):
    word_bits, bits = 8 * jnp.dtype(dtype).itemsize, BITS[token_format]
    num_checked = 0
    for block_size, head_dim in SIZES:
        if head_dim * min(bits) % word_bits:
            continue
        num_checked += 1
        layout = layout_of(token_format, dtype, block_size, head_dim)
        assert [x.num_words * word_bits for x in (layout.k, layout.v)] == [
            head_dim * b for b in bits
        ]
        used = np.zeros(2 * block_size * head_dim, int)
        for start, end in regions(layout):
            assert 0 <= start < end <= used.size
            used[start:end] += 1
        assert used.max() == 1
        a_token = layout.k.num_words + layout.v.num_words + 2
        assert layout.num_tokens == used.size // a_token, "another token would fit"
        assert layout.num_tokens >= block_size, "extend counts on no fewer than native tokens"
    assert num_checked > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_later_format_never_holds_fewer_tokens(dtype):
    for block_size, head_dim in SIZES:
        if head_dim % 8 == 0:
            counts = [layout_of(f, dtype, block_size, head_dim).num_tokens for f in COMPRESSED]
            assert counts == sorted(counts)


@cases
def test_a_round_trip_is_off_by_half_a_step_at_most(token_format, dtype):
    k, v = vectors_for(token_format, dtype)
    back = assert_round_trip(token_format, dtype, k, v)
    assert not any(map(np.array_equal, back, (k, v)))
    # A token's neighbours, however large, do not change it.
    magnitudes = 10.0 ** np.arange(-2, k.shape[-2] - 2, 1)[:, None] % 1e4 + 1e-2
    assert_round_trip(token_format, dtype, *(x * magnitudes.astype(np.float32) for x in (k, v)))
    # From where a scale in 16 bits is normal to where it is largest; in 32 bits much further.
    for factor in (1e-30, 1e30) if dtype == "float32" else (2e-2, 1e4):
        assert_round_trip(
            token_format, dtype, *(np.clip(x, -3, 3) * np.float32(factor) for x in (k, v))
        )


@pytest.mark.parametrize("head_dim", [8, 24, 40])
def test_a_round_trip_works_for_any_head_that_fills_words(head_dim):
    k, v = vectors_for(TokenFormat.Int8Int4, "float32", head_dim=head_dim)
    assert_round_trip(TokenFormat.Int8Int4, "float32", k, v)


def representable(token_format, dtype, seed=0):
    """Integers of a format times a power of two: as they are rounded, and as a model has them."""
    rng = np.random.default_rng(seed)
    num_tokens = layout_of(token_format, dtype).num_tokens
    rounded = []
    for bits in BITS[token_format]:
        largest = 2 ** (bits - 1) - 1
        x = rng.integers(-largest, largest + 1, (3, num_tokens, HEAD_DIM))
        x[..., 0] = largest * rng.choice([-1, 1], x.shape[:-1])
        scales = 2.0 ** rng.integers(-6, 7, (3, num_tokens, 1))
        rounded.append((x * scales).astype(np.float32))
    # A Hadamard matrix of order 16 is +-1/4: the sums are exact, whatever their order.
    given = [
        rotated(x) if bits == 4 else x for x, bits in zip(rounded, BITS[token_format], strict=True)
    ]
    return rounded, given


@cases
def test_what_is_representable_comes_back_exactly(token_format, dtype):
    rounded, given = representable(token_format, dtype)
    _, back, plain = round_trip(token_format, dtype, *given)
    for got, want in zip((*back, *plain), (*rounded, *given), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "numbers"), [("float32", (0, 1, -100, 127)), ("float16", (-3, 125))]
)
def test_words_that_look_like_nan_keep_their_bits(dtype, numbers):
    """Numbers that make signalling NaN of the words, which an arithmetic copy would change."""
    num_tokens = layout_of(TokenFormat.Int8, dtype).num_tokens
    x = np.repeat(np.asarray(numbers, np.float32), HEAD_DIM // len(numbers))
    x[0] = 127.0  # Makes the scale 1.
    x = np.broadcast_to(x, (2, num_tokens, HEAD_DIM))
    (k_half, _), (k, v), _ = round_trip(TokenFormat.Int8, dtype, x, x)
    assert np.isnan(k_half.ravel()[: num_tokens * HEAD_DIM // 4].astype(np.float32)).any()
    np.testing.assert_array_equal(k, x)
    np.testing.assert_array_equal(v, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _replace(token_format, dtype, k_half, v_half, k, v, is_new):
    layout = layout_of(token_format, dtype)
    return layout.replace(k_half, v_half, layout.pack(k, v), is_new)


def words_in(layout, tokens):
    """Which words, counted over both halves, belong to some tokens."""
    mine = np.zeros(2 * layout.half_words, bool)
    for vectors in (layout.k, layout.v):
        scales = vectors.start + layout.num_tokens * vectors.num_words
        for token in tokens:
            first = vectors.start + token * vectors.num_words
            mine[first : first + vectors.num_words] = True
            mine[scales + token] = True
    return mine


@cases
def test_replacing_tokens_leaves_every_other_bit_of_a_block(token_format, dtype):
    layout = layout_of(token_format, dtype)
    stored = storage_dtype(jnp.dtype(dtype), "cpu")
    rng = np.random.default_rng(0)
    bits = np.dtype(f"uint{8 * stored.itemsize}")
    # Every word may be any pattern: of a neighbour, of an earlier owner, or never used.
    words = rng.integers(0, np.iinfo(bits).max, (3, 2, layout.half_words), bits, endpoint=True)
    nans = {2: 0x7C01, 4: 0x7F800001}[stored.itemsize]
    words[..., ::5] = np.asarray(nans + rng.integers(0, 200, words[..., ::5].shape), bits)
    shape = -1, BLOCK_SIZE, HEAD_DIM
    k_half, v_half = (jnp.asarray(words[:, i].view(stored).reshape(shape)) for i in range(2))
    k, v = vectors_for(token_format, dtype, lead=(3,))
    tokens = [0, layout.num_tokens // 2, layout.num_tokens - 1]
    is_new = np.isin(np.arange(layout.num_tokens), tokens)
    is_new = np.broadcast_to(is_new, (3, layout.num_tokens))

    before = words.reshape(3, -1)
    none = _replace(token_format, dtype, k_half, v_half, k, v, np.zeros_like(is_new))
    some = _replace(token_format, dtype, k_half, v_half, k, v, is_new)
    whole = _round_trip(token_format, dtype, HEAD_DIM, k, v, stored)[0]
    none, some, whole = (
        np.concatenate([np.asarray(x).view(bits).reshape(3, -1) for x in halves], -1)
        for halves in (none, some, whole)
    )
    np.testing.assert_array_equal(none, before)
    mine = words_in(layout, tokens)
    np.testing.assert_array_equal(some[:, ~mine], before[:, ~mine])
    np.testing.assert_array_equal(some[:, mine], whole[:, mine])


@cases
def test_a_vector_of_zeros_stays_zero(token_format, dtype):
    k, v = (np.zeros_like(x) for x in vectors_for(token_format, dtype))
    k[0, 0, 1], v[0, 0, 0] = 1.0, -1.0
    _, back, plain = round_trip(token_format, dtype, k, v)
    for got, want in zip((*back, *plain), (k, v, k, v), strict=True):
        is_zero = ~want.any(-1)
        assert not got[is_zero].any() and got[~is_zero].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("factor", [1e-4, 1e-5, 1e-6])
def test_tiny_numbers_are_rounded_by_half_of_the_next_larger_scale_at_most(dtype, factor):
    """Scales in 16 bits lie 2**-24 apart there; one that is too small would cut the vector off."""
    k, v = (np.clip(x, -3, 3) * factor for x in vectors_for(TokenFormat.Int8, dtype))
    _, _, back = round_trip(TokenFormat.Int8, dtype, k, v)
    for got, want in zip(back, (k, v), strict=True):
        step = np.abs(want).max(-1, keepdims=True) / 127 + 2.0**-24
        assert (np.abs(got - want) <= step * 0.51).all()


@cases
def test_no_finite_number_becomes_nan(token_format, dtype):
    largest = float(jnp.finfo(dtype).max)
    k, v = (np.sign(x) for x in vectors_for(token_format, dtype))
    for factor in (largest / 64, 1e-12, 1e-20, 1e-40, float(jnp.finfo(dtype).smallest_subnormal)):
        with np.errstate(under="ignore"):
            far = [(x * factor).astype(np.float32) for x in (k, v)]
        _, _, back = round_trip(token_format, dtype, *far)
        for got in back:
            assert np.isfinite(got).all()


@cases
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_vector_with_a_number_that_is_not_finite_comes_back_as_nan(token_format, dtype, number):
    k, v = vectors_for(token_format, dtype)
    _, _, clean = round_trip(token_format, dtype, k, v)
    k[0, 1, 0, 3] = v[1, 0, 1, 5] = number
    _, _, back = round_trip(token_format, dtype, k, v)
    for got, want, given in zip(back, clean, (k, v), strict=True):
        is_bad = ~np.isfinite(given).all(-1)
        assert is_bad.sum() == 1 and np.isnan(got[is_bad]).all()
        np.testing.assert_array_equal(got[~is_bad], want[~is_bad])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_scales_in_16_bits_cannot_reach_is_cut_to_the_largest(dtype):
    largest = {"float16": 65504.0, "bfloat16": 65504.0 * 127}[dtype]
    k, v = (np.sign(x) for x in vectors_for(TokenFormat.Int8, dtype))
    k[..., 0] *= np.float32(1e9)
    _, _, (got, _) = round_trip(TokenFormat.Int8, dtype, k, v)
    np.testing.assert_allclose(got[..., 0], np.sign(k[..., 0]) * largest, rtol=1e-3)
    assert not got[..., 1:].any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_scale_leads_beyond_the_largest_number_of_the_pool(dtype):
    largest = np.finfo(dtype).max
    k, v = (np.sign(x) * np.float32(largest) for x in vectors_for(TokenFormat.Int8, dtype))
    _, _, back = round_trip(TokenFormat.Int8, dtype, k, v)
    for got, want in zip(back, (k, v), strict=True):
        with np.errstate(over="raise"):
            np.testing.assert_allclose(got.astype(dtype), want.astype(dtype), rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 6, 8, 12, 24, 40, 64, 80, 96, 128])
def test_a_rotation_keeps_lengths_and_angles_and_undoes_itself(size):
    rng = np.random.default_rng(size)
    x, y = rng.normal(size=(2, 5, size)).astype(np.float32)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=1e-5)
    product = np.einsum("nd,md->nm", rotate(x), rotate(y))
    np.testing.assert_allclose(product, x @ y.T, atol=1e-4)
    matrix = np.asarray(rotate(np.eye(size, dtype=np.float32)))
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-6)


def test_a_rotation_lets_four_bits_store_a_vector_with_an_outlier():
    """Without it every other number would be rounded to zero."""
    k, v = vectors_for(TokenFormat.Int4, "float32", head_dim=64)
    k[..., 3] = v[..., 3] = 60.0
    _, _, (got, _) = round_trip(TokenFormat.Int4, "float32", k, v)
    others = np.arange(64) != 3
    error = np.linalg.norm((got - k)[..., others]) / np.linalg.norm(k[..., others])
    assert error < 0.6


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("token_format", COMPRESSED, ids=lambda x: x.name)
def test_a_pool_of_one_byte_numbers_refuses_formats(token_format, dtype):
    state = fj.init(small_spec(dtype=dtype))
    before = snapshot(state)
    with pytest.raises(ValueError, match=f"{dtype}.*{token_format.name}.*2 or 4 bytes"):
        enable_formats(state, [token_format])
    assert same_bits(state, before) and state.pool.formats == (TokenFormat.Native,)


@pytest.mark.parametrize(
    ("token_format", "dtype", "head_dim", "multiple"),
    [
        (TokenFormat.Int8, "float32", 6, 4),
        (TokenFormat.Int8, "bfloat16", 3, 2),
        (TokenFormat.Int8Int4, "float32", 12, 8),
        (TokenFormat.Int4, "float16", 6, 4),
    ],
)
def test_a_head_dim_that_does_not_fill_words_is_refused_with_the_remedy(
    token_format, dtype, head_dim, multiple
):
    with pytest.raises(ValueError, match=f"(?s){head_dim}.*{token_format.name}.*of {multiple}"):
        layout_of(token_format, dtype, head_dim=head_dim)
    layout_of(token_format, dtype, head_dim=multiple)


@pytest.mark.parametrize(
    ("sizes", "limits", "also"),
    [
        ({"num_blocks": 2**27}, {}, "8 native tokens.*"),
        ({"max_blocks_per_seq": 2**27}, {}, "8 native tokens.*"),
        ({}, {"max_blocks": 2**27}, ""),  # A pool that may grow.
    ],
    ids=str,
)
def test_formats_whose_slots_would_pass_int32_are_refused(sizes, limits, also):
    state = jax.eval_shape(lambda: fj.init(small_spec(block_size=8, **sizes)))
    with pytest.raises(ValueError, match=rf"below 2\*\*31.*{also}134217728 blocks"):
        enable_formats(state, [TokenFormat.Int4], **limits)


def test_enabling_formats_is_idempotent_and_changes_no_array():
    state = fj.init(small_spec())
    one = enable_formats(state, [TokenFormat.Int4])
    both = enable_formats(enable_formats(one, [TokenFormat.Int8]), [TokenFormat.Int4])
    assert both.pool.formats == (TokenFormat.Native, TokenFormat.Int8, TokenFormat.Int4)
    assert both.tables.block_sizes == both.pool.block_sizes
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(both), strict=True):
        assert before is after
    fj.check_state(both)


def test_gather_rounds_compressed_tokens_of_an_integer_pool_to_the_nearest():
    state = enable_formats(fj.init(small_spec(dtype="int16")), [TokenFormat.Int8])
    state, ok = with_rows(state, {0: (TokenFormat.Int8, 3)})
    assert ok
    # As a float16, any of these words is a scale between 1 and 2.
    shape = 2, *keys(state.pool).shape
    words = np.random.default_rng(0).integers(0x3C00, 0x4000, shape, np.int16)
    pool = with_arrays(state.pool, *jnp.asarray(words))
    block = int(state.tables.block_ids[0, 0])
    exact = pool.codec(TokenFormat.Int8).decode(*jnp.asarray(words[:, block, 1]))
    got = fj.gather(state.with_pools([pool]), 1, 0, TokenFormat.Int8)
    for have, want in zip(got, exact, strict=True):
        assert (np.asarray(want) % 1 != 0).any()
        np.testing.assert_array_equal(have[:3], np.rint(want).astype(np.int16).swapaxes(0, 1)[:3])
