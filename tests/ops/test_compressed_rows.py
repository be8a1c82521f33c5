"""Every operation on rows in compressed formats, and the programs that they become."""

import collections
import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.attention import paged_attention
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.ops.migration import resize
from ferrum_jax.types import TokenFormat
from tests.support import compiled
from tests.support.caches import held_lens, num_free, same_bits, snapshot
from tests.support.compressed import (
    empty_state,
    format_of,
    mixed_state,
    poisoned,
    put_row,
    row_tokens,
    small_spec,
    with_rows,
)
from tests.support.mixed_rows import (
    INT4,
    INT8,
    NATIVE,
    ROWS,
    formats,
    new_state,
    pool_bits,
    queries,
)
from tests.support.pools import keys, with_arrays

# Structure of programs.


def test_a_decode_step_over_all_formats_works_in_place():
    state = resize(compiled.new_state("bfloat16"), 2039)  # Scratch is of the rows' size.
    state = enable_formats(state, TokenFormat)
    compiled.assert_in_place(compiled.scanned_layers, state)


def primitives(fn, *args):
    """How often each primitive occurs in a program, inner ones counted."""
    counts = collections.Counter()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            counts[eqn.primitive.name] += 1
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return counts


def test_formats_that_no_token_uses_cost_no_more_than_rounding():
    """What is computed a block of them is computed in the loop over those that there are."""
    pool = empty_state(TokenFormat).pool
    slots = np.arange(16, dtype=np.int32)[:, None] * pool.slots_per_block
    kv = np.ones((16, 1, pool.num_kv_heads, pool.head_dim), np.float32)
    write = jax.jit(lambda pool, slots, kv, formats: fj.write(pool, 0, slots, kv, kv, formats))
    compiled = write.lower(pool, slots, kv, np.zeros_like(slots)).compile().as_text()
    outside = re.search(r"^ENTRY .*?^}", compiled, re.M | re.S).group()
    shapes = {
        tuple(map(int, shape.split(","))) for shape in re.findall(r" = \w+\[([\d,]+)\]", outside)
    }
    sizes = {shape: math.prod(shape) for shape in shapes - {keys(pool).shape}}
    assert max(sizes.values()) == kv.size, sizes


def test_formats_that_are_not_enabled_cost_nothing():
    state = fj.init(small_spec())
    slots, layer = jnp.zeros(3, jnp.int32), jnp.int32(0)
    kv = [jnp.zeros((3, 2, 16), jnp.float32)] * 2
    q, rows = queries(3), jnp.zeros((3, 8), jnp.int32)
    lens = jnp.ones(3, jnp.int32)

    def write(formats):
        return primitives(lambda pool: fj.write(pool, layer, slots, *kv, formats), state.pool)

    def attend(formats):
        return primitives(
            lambda pool: paged_attention(
                q, pool, layer, block_ids=rows, held_lens=lens, token_formats=formats
            ),
            state.pool,
        )

    assert write(slots) == write(None)
    assert write(None)["scatter"] == 2, "keys and values"
    assert attend(slots) == attend(None)
    enabled = enable_formats(state, [INT8]).pool
    formats = primitives(lambda pool: fj.write(pool, layer, slots, *kv, slots), enabled)
    assert formats["scatter"] > 2, "the count sees scatters"

    def step(state):
        state, ok = fj.extend(state, slots[:1], slots[:1], max_new_tokens=1)
        state, ok_too = fj.truncate(state, slots[:1], slots[:1])
        return fj.free(state, slots[:1]), ok & ok_too

    with_formats = primitives(step, enable_formats(state, [INT8]))
    without = primitives(step, state)
    assert without["gather"] < with_formats["gather"], "no row's format is looked up"


# Rows.


@formats
def test_blocks_are_counted_by_the_format(token_format):
    state = new_state()
    size = state.pool.tokens_per_block(token_format)
    assert size > state.pool.block_size
    for count in (1, size - 1, size, size + 1, 3 * size):
        after, ok = with_rows(state, {0: (token_format, count)})
        assert ok and num_free(after) == 24 - -(-count // size)
        fj.check_state(after)
    state, _ = with_rows(state, {0: (token_format, size)})
    grown, ok = fj.extend(state, [0], [1], max_new_tokens=1)
    assert bool(ok) and num_free(grown) == num_free(state) - 1
    grown, ok = fj.extend(grown, [0], [size - 1], max_new_tokens=size - 1)
    assert bool(ok) and num_free(grown) == num_free(state) - 1
    fj.check_state(grown)
    cut, ok = fj.truncate(grown, [0], [size])
    assert bool(ok) and num_free(cut) == num_free(state)
    fj.check_state(cut)


@formats
def test_a_row_holds_as_many_tokens_as_its_format_allows(token_format):
    state = new_state()
    room = state.tables.max_blocks_per_seq * state.pool.tokens_per_block(token_format)
    state, ok = with_rows(state, {1: (token_format, 3)})
    before = snapshot(state)
    refused, ok = fj.extend(state, [1], [room - 2], max_new_tokens=2**30)
    assert not bool(ok) and same_bits(refused, before)
    full, ok = fj.extend(state, [1], [room - 3], max_new_tokens=2**30)
    assert bool(ok) and held_lens(full)[1] == room
    fj.check_state(full)
    refused, ok = fj.extend(full, [1], [1], max_new_tokens=1)
    assert not bool(ok)
    refused, ok = with_rows(state, {2: (token_format, room + 1)})
    assert not ok


@formats
def test_a_copied_block_keeps_every_bit(token_format):
    """Words of packed numbers include NaN, and `fork` goes through arrays of floats."""
    for dtype in ("float32", "float16"):
        state, _ = with_rows(new_state(dtype), {0: (token_format, 3)})
        block = int(state.tables.block_ids[0, 0])
        arrays = []
        for x in state.pool.arrays.values():
            bits = np.dtype(f"uint{8 * x.dtype.itemsize}")
            words = np.array(x).view(bits)
            words[block] = {2: 0x7C01, 4: 0x7F800001}[bits.itemsize]
            arrays.append(jnp.asarray(words.view(x.dtype)))
        pool = with_arrays(state.pool, *arrays)
        before = [x[block] for x in pool_bits(jax.tree.map(jnp.copy, pool))]
        state, ok = fj.fork(state.with_pools([pool]), [0], [1])
        copied = int(state.tables.block_ids[1, 0])
        assert bool(ok) and copied != block
        for then, now in zip(before, pool_bits(state.pool), strict=True):
            np.testing.assert_array_equal(now[copied], then)


@formats
def test_free_and_truncate_to_zero_make_a_row_native_again(token_format):
    state = new_state()
    state, _ = with_rows(state, {0: (token_format, 9), 1: (token_format, 9)})
    pruned = dataclasses.replace(
        state.tables, num_pruned=jnp.asarray([3, 4, 0, 0, 0, 0], jnp.int32)
    )
    state = state.with_tables([pruned])
    state, ok = fj.truncate(state, [0], [0])
    assert bool(ok)
    state = fj.free(state, [1, 1, 5])
    fj.check_state(state)
    assert num_free(state) == 24
    assert not np.asarray(state.tables.token_formats).any()
    assert not np.asarray(state.tables.num_pruned).any()
    state, ok = fj.allocate(state, [0, 1], [5, 4])
    assert bool(ok) and num_free(state) == 24 - 3
    state = put_row(state, 0, [1, 2, 3, 4, 5])
    assert row_tokens(state, 0) == [1, 2, 3, 4, 5]


@formats
def test_share_refuses_compressed_and_pruned_rows(token_format):
    state = new_state()
    state, _ = with_rows(state, {0: (token_format, 9), 1: (NATIVE, 9), 2: (NATIVE, 9)})
    num_pruned = jnp.asarray([0, 0, 5, 0, 0, 0], jnp.int32)
    tables = dataclasses.replace(state.tables, num_pruned=num_pruned)
    state = state.with_tables([tables])
    for source, target in ((0, 1), (1, 0), (2, 1), (1, 2), (0, 2)):
        before = snapshot(state)
        state, ok = fj.share(state, [source], [target], [4])
        assert not bool(ok) and same_bits(state, before)


REFUSED = {
    "allocate in use": lambda s: fj.allocate(s, [3, 4], [1, 1]),
    "allocate too much": lambda s: fj.allocate(s, [4, 5], [32, 32]),
    "extend a row too much": lambda s: fj.extend(s, [1, 0], [1, 24], max_new_tokens=200),
    "extend without a block": lambda s: fj.extend(
        s, [0, 1, 2, 3], [23, 81, 111, 145], max_new_tokens=200
    ),
    "extend beyond the most": lambda s: fj.extend(s, [3], [2], max_new_tokens=1),
    "fork nothing": lambda s: fj.fork(s, [3, 4], [4, 5]),
    "fork into a live row": lambda s: fj.fork(s, [3, 1], [4, 2]),
    "truncate longer": lambda s: fj.truncate(s, [2, 3], [0, 24]),
    "truncate twice": lambda s: fj.truncate(s, [2, 2], [0, 0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_no_bit(name):
    state = mixed_state(ROWS)
    before = snapshot(state)
    state, ok = REFUSED[name](state)
    assert not bool(ok) and same_bits(state, before)


def test_random_programs_keep_the_tokens_of_every_row():
    """A dull model: each row is a format and a list of tokens."""
    rng = np.random.default_rng(5)
    state, ok = with_rows(poisoned(new_state()), {4: (NATIVE, 32), 5: (NATIVE, 32)})
    rows, counts = {}, collections.Counter()  # Rows 4 and 5 only take blocks away.
    for _ in range(60):
        row, other = (int(x) for x in rng.permutation(4)[:2])
        count = int(rng.integers(1, 17))
        tokens = rng.integers(1, 128, count).tolist()
        verb = str(rng.choice(["start", "extend", "extend", "truncate", "fork", "free"]))
        before, ok = snapshot(state), True
        if verb == "start":
            token_format = TokenFormat(int(rng.integers(4)))
            if row in rows:
                continue
            state, ok = with_rows(state, {row: (token_format, count)})
            if ok:
                state, rows[row] = put_row(state, row, tokens), (token_format, tokens)
        elif verb == "extend" and row in rows:
            state, ok = fj.extend(state, [row], [count], max_new_tokens=16)
            if ok:
                token_format, old = rows[row]
                state, rows[row] = (
                    put_row(state, row, tokens, len(old)),
                    (token_format, old + tokens),
                )
        elif verb == "truncate" and row in rows:
            token_format, old = rows[row]
            length = int(rng.integers(0, len(old) + 1))
            state, ok = fj.truncate(state, [row], [length])
            if ok and length:
                rows[row] = token_format, old[:length]
            elif ok:
                del rows[row]
        elif verb == "fork" and row in rows and other not in rows:
            state, ok = fj.fork(state, [row], [other])
            if ok:
                rows[other] = rows[row]
        elif verb == "free":
            state = fj.free(state, [row])
            rows.pop(row, None)
        counts[verb, bool(ok)] += 1
        fj.check_state(state)
        assert bool(ok) or same_bits(state, before)
        assert held_lens(state) == [len(rows.get(i, (0, []))[1]) for i in range(4)] + [32, 32]
        for i, (token_format, tokens) in rows.items():
            assert format_of(state, i) == token_format and row_tokens(state, i) == tokens
    assert {verb for verb, ok in counts if ok} == {"start", "extend", "truncate", "fork", "free"}
    assert any(not ok for _, ok in counts), "nothing was ever refused"


def life(state, rows, counts, tokens):
    """What vmap should do for each replica on its own."""
    state, ok = fj.extend(state, rows, counts, max_new_tokens=9)
    batch = PagedBatch.of(state, rows, jnp.ones_like(rows), num_tokens=1)
    kv = jnp.broadcast_to(tokens[:, None, None, None], (2, 1, 1, 16)).astype(jnp.float32)
    batch = batch.write(0, kv, -kv / 2)
    out = batch.attend(0, kv)
    state, forked = fj.fork(state.with_pools(batch.pools), rows[:1], rows[:1] + 3)
    state, cut = fj.truncate(state, rows[1:], counts[1:])
    return state, jnp.stack([ok, forked, cut]), out


def test_replicas_under_vmap_may_hold_rows_of_different_formats():
    spec = small_spec(num_layers=1, num_kv_heads=1)
    rows = [
        {0: (INT4, 9), 1: (NATIVE, 6)},
        {0: (NATIVE, 7), 1: (INT4, 21)},
        {0: (INT4, 20), 1: (INT4, 4), 3: (INT4, 2)},
    ]
    replicas = []
    for held in rows:
        state, _ = with_rows(poisoned(enable_formats(fj.init(spec), [INT4])), held)
        for row, (_, length) in held.items():
            state = put_row(state, row, range(1, length + 1))
        replicas.append(state)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *replicas)
    counts = jnp.asarray([[1, 1], [1, 1], [1, 1]], jnp.int32)
    seq_ids = jnp.asarray([[0, 1]] * 3, jnp.int32)
    tokens = jnp.asarray([[50, 60]] * 3, jnp.int32)
    after, oks, out = jax.jit(jax.vmap(life))(stacked, seq_ids, counts, tokens)
    assert oks.tolist() == [[True, True, True], [True, True, True], [True, False, True]]
    for i, held in enumerate(rows):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], after)
        fj.check_state(state)
        lengths = [held[0][1], held[1][1]]
        assert row_tokens(state, 0) == [*range(1, lengths[0] + 1), 50]
        assert row_tokens(state, 1) == [1], "truncated"
        if i < 2:
            assert format_of(state, 3) == held[0][0]
            assert row_tokens(state, 3) == row_tokens(state, 0)
        # Attention is almost wholly to the newest token, which is the largest by far.
        np.testing.assert_allclose(out[i][:, 0, 0, 0], [-25, -30], rtol=2e-3)
