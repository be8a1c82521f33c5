"""Small caches with rows of different formats, and tokens that survive every format.

Token t is a vector of equal numbers: its keys, and so its integers after rounding, are the largest
there are (a rotated one is a single number), so that any format gives t back to a part in 2000.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax import codecs
from ferrum_jax.attention.call import attention_call
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.attention.reference import reference_attention
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.ops.rows import set_formats
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.state import BlockPool, CacheState
from ferrum_jax.types import NULL_SEQ, TokenFormat
from tests.support.caches import slots_of, tiny_spec
from tests.support.pools import kv_pool

COMPRESSED = tuple(f for f, entry in codecs.CODECS.items() if not entry.is_native)
MAX_WRITES = 64  # Tokens that `put_row` writes in one program.


def small_spec(**changes) -> fj.CacheSpec:
    """24 blocks of 4 tokens for 6 rows of up to 8 blocks."""
    model = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
    sizes = {"num_blocks": 24, "block_size": 4, "max_seqs": 6, "max_blocks_per_seq": 8}
    return tiny_spec(**{**model, **sizes, **changes})


def format_of(state: CacheState, row: int) -> TokenFormat:
    """How a row's tokens are written."""
    return codecs.format_of(int(state.tables.token_formats[row]))


def with_rows(
    state: CacheState, rows: Mapping[int, tuple[TokenFormat, int]]
) -> tuple[CacheState, bool]:
    """Starts rows, `{row: (format, tokens)}`, with room for their tokens."""
    ids, formats, counts = (
        jnp.asarray(x, jnp.int32)
        for x in ([*rows], [f for f, _ in rows.values()], [n for _, n in rows.values()])
    )
    tables = set_formats(state.tables, ids, formats, jnp.zeros_like(ids))
    after, ok = fj.allocate(state.with_tables([tables]), ids, counts)
    return (after, True) if bool(ok) else (state, False)


def write_kv(state: CacheState, row: int, kv: KeysAndValues, begin: int = 0) -> CacheState:
    """Writes keys and values, each [L, T, H, D], of a row's tokens from `begin` on."""
    num_tokens = kv.k.shape[1]
    padding = MAX_WRITES - num_tokens
    slots = slots_of(state, [(row, place) for place in range(begin, begin + num_tokens)])
    slots = np.pad(slots, (0, padding), constant_values=-1)
    formats = np.full(MAX_WRITES, format_of(state, row), np.int32)
    pool = state.pool
    for layer in range(pool.num_layers):
        k, v = (np.pad(x[layer], ((0, padding), (0, 0), (0, 0))) for x in kv)
        pool = fj.write(pool, layer, slots, k, v, formats)
    return state.with_pools([pool])


@jax.jit
def decode(
    state: CacheState, seq_ids: jax.Array, kv: KeysAndValues, q: jax.Array
) -> tuple[CacheState, tuple[jax.Array, jax.Array]]:
    """Adds a token to each row, in every layer, and attends: what a model does.

    Args:
      state: The cache.
      seq_ids: i32[R]. Rows.
      kv: Keys and values of the new tokens, each [L, R, 1, H, D].
      q: [R, 1, Hq, D]. Queries, the same in every layer.

    Returns:
      `(state, (out, ok))`, out: [L, R, 1, Hq, D].
    """
    ones = (seq_ids != NULL_SEQ).astype(jnp.int32)
    state, ok = fj.extend(state, seq_ids, ones, max_new_tokens=1)
    batch = PagedBatch.of(state, seq_ids, ones, num_tokens=1)

    def use_layer(batch, xs):
        layer, k, v = xs
        batch = batch.write(layer, k, v)
        return batch, batch.attend(layer, q)

    layers = jnp.arange(state.pool.num_layers, dtype=jnp.int32)
    batch, out = jax.lax.scan(use_layer, batch, (layers, *kv))
    return state.with_pools(batch.pools), (out, ok)


def robust_payload(pool: BlockPool, tokens: Sequence[int]) -> KeysAndValues:
    """Keys and values f32[L, T, H, D] of tokens from 1 to 127, of each layer and head their own."""
    layers = 2.0 ** np.arange(pool.num_layers)[:, None, None, None]
    heads = 4.0 ** np.arange(pool.num_kv_heads)[:, None]
    ids = np.asarray(tokens, np.float32).reshape(-1, 1, 1)
    k = layers * heads * ids * np.ones(pool.head_dim)
    return KeysAndValues(k.astype(np.float32), (-k / 2).astype(np.float32))


def put_row(state: CacheState, row: int, tokens: Sequence[int], begin: int = 0) -> CacheState:
    """Writes tokens into a row, from `begin` on."""
    return write_kv(state, row, robust_payload(state.pool, tokens), begin)


def read(state: CacheState, row: int) -> KeysAndValues:
    """A row's keys and values in float32, each [L, T, H, D], without what lies behind them."""
    length = int(state.tables.held_lens[row])
    layers = [
        fj.gather(state, layer, row, format_of(state, row))
        for layer in range(state.pool.num_layers)
    ]
    return KeysAndValues(
        *(
            np.stack([np.asarray(x, np.float32)[:length] for x in kv])
            for kv in zip(*layers, strict=True)
        )
    )


def tokens_in(pool: BlockPool, kv: KeysAndValues) -> list[int]:
    """The tokens that keys and values stand for; all layers and heads must agree."""
    tokens = np.rint(kv.k[0, :, 0, 0])
    for have, want in zip(kv, robust_payload(pool, tokens), strict=True):
        np.testing.assert_allclose(have, want, rtol=4e-3)
    return tokens.astype(int).tolist()


def row_tokens(state: CacheState, row: int) -> list[int]:
    """The tokens that a row holds."""
    return tokens_in(state.pool, read(state, row))


def random_kv(pool: BlockPool, num_tokens: int, seed: int = 0) -> KeysAndValues:
    """Normal keys and values f32[L, T, H, D]."""
    shape = pool.num_layers, num_tokens, pool.num_kv_heads, pool.head_dim
    rng = np.random.default_rng(seed)
    return KeysAndValues(*(rng.normal(size=shape).astype(np.float32) for _ in range(2)))


def poisoned(state: CacheState) -> CacheState:
    """The same cache, every word of its pool NaN or a number far too large."""
    pool = state.pool

    def poison(x: jax.Array) -> jax.Array:
        bits = np.dtype(f"uint{8 * x.dtype.itemsize}")
        words = np.full(x.shape, np.iinfo(bits).max, bits)
        return jax.device_put(words.view(x.dtype), x.sharding)

    return state.with_pools([jax.tree.map(poison, pool)])


def empty_state(formats: Iterable[TokenFormat] = TokenFormat, **changes) -> CacheState:
    """A cache with formats enabled, on a device of its own, as that of a manager is."""
    return enable_formats(fj.init(small_spec(**changes), jax.local_devices()[0]), formats)


def mixed_state(
    rows: Mapping[int, tuple[TokenFormat, int]],
    seed: int = 0,
    formats: Iterable[TokenFormat] = TokenFormat,
    **changes,
) -> CacheState:
    """Rows of random tokens in different formats, in a pool that is NaN elsewhere."""
    state = poisoned(empty_state(formats, **changes))
    state, ok = with_rows(state, rows)
    assert ok
    for row, (_, num_tokens) in rows.items():
        state = write_kv(state, row, random_kv(state.pool, num_tokens, seed + row))
    return state


def expected_attention(
    state: CacheState,
    layer: int,
    seq_ids: Sequence[int],
    q: jax.Array,
    q_lens: jax.Array | None,
    options: AttentionOptions,
) -> np.ndarray:
    """Reference attention over what `gather` returns of each row; all zeros for no row."""
    pool, room = state.pool, MAX_WRITES
    shape = (len(seq_ids), 1, pool.num_kv_heads, room, pool.head_dim)
    k, v, lens = np.zeros(shape, np.float32), np.zeros(shape, np.float32), []
    for i, seq_id in enumerate(seq_ids):
        length = 0 if seq_id == NULL_SEQ else int(state.tables.held_lens[seq_id])
        lens.append(length)
        if length:
            kv = read(state, seq_id)
            k[i, 0, :, :length], v[i, 0, :, :length] = (x[layer].swapaxes(0, 1) for x in kv)
    held = kv_pool(jnp.asarray(k), jnp.asarray(v))
    block_ids = jnp.arange(len(seq_ids), dtype=jnp.int32)[:, None]
    rows = {"block_ids": block_ids, "held_lens": jnp.asarray(lens, jnp.int32), "q_lens": q_lens}
    call = attention_call(q.astype(jnp.float32), held, 0, options=options, **rows)
    return np.asarray(reference_attention(call)).reshape(q.shape)
