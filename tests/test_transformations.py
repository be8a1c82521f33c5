"""Under `vmap`, `scan`, `while_loop` and `cond` the operations do what they do one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from tests.support.caches import contents, filled, held_lens, same_bits, snapshot, tiny_spec

SPEC = tiny_spec(dtype="bfloat16")


def program(state, rows, counts):
    """Every operation once; rows i32[2], counts i32[2]."""
    oks = []
    state, ok = fj.allocate(state, rows, counts)
    oks.append(ok)
    state, ok = fj.extend(state, rows, counts, max_new_tokens=9)
    oks.append(ok)
    state, ok = fj.fork(state, rows[:1], rows[:1] + 2)
    oks.append(ok)
    state, ok = fj.share(state, rows[:1], rows[1:], counts[1:])
    oks.append(ok)
    state, ok = fj.truncate(state, rows[:1] + 2, counts[:1])
    oks.append(ok)
    state = fj.free(state, rows[1:])
    k, v = fj.gather(state, counts[0] % 2, rows[0])
    return state, jnp.stack(oks), k, v


def random_rows(seed):
    rng = np.random.default_rng(seed)
    return rng.permutation(3)[:2].astype(np.int32), rng.integers(1, 8, 2).astype(np.int32)


def random_states(num):
    """Caches with different contents, in bytes and in tables."""
    rng = np.random.default_rng(0)
    return [filled(SPEC, {4: int(n)}) for n in rng.integers(1, 15, num)]


def stacked(states):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def test_vmap_over_replicas_equals_one_by_one():
    states = random_states(6)
    args = [random_rows(seed) for seed in range(6)]
    args[3] = (args[3][0], np.int32([2**31 - 1, -1]))  # One replica's failure is its own.
    rows, counts = (np.stack(x) for x in zip(*args, strict=True))
    together = jax.jit(jax.vmap(program))(stacked(states), rows, counts)
    one = jax.jit(program)
    outcomes = set()
    for i, (state, arg) in enumerate(zip(states, args, strict=True)):
        alone = one(state, *arg)
        fj.check_state(alone[0])
        assert same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], together), snapshot(alone))
        outcomes.add(tuple(alone[1].tolist()))
    assert len(outcomes) > 1, "the replicas should not all fare alike"


def test_vmap_over_rows_of_one_cache_gathers_each():
    state = filled(SPEC, {0: 7, 2: 3})
    k, v = jax.vmap(fj.gather, in_axes=(None, None, 0))(state, 1, jnp.arange(5, dtype=jnp.int32))
    for row in range(5):
        assert same_bits((k[row], v[row]), snapshot(fj.gather(state, 1, row)))


def test_vmap_over_calls_on_one_cache_gives_each_its_own():
    state = filled(SPEC, {0: 7})
    children = jnp.asarray([[1], [3], [0]], jnp.int32)
    many, ok = jax.jit(jax.vmap(fj.fork, in_axes=(None, None, 0)))(state, np.int32([0]), children)
    assert ok.tolist() == [True, True, False]
    for i, child in enumerate((1, 3)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        fj.check_state(one)
        assert contents(one, child) == contents(state, 0)


def test_scan_equals_a_python_loop():
    state = filled(SPEC, {4: 3})
    xs = [random_rows(seed) for seed in range(10)]

    def step(state, x):
        state, ok = fj.extend(state, *x, max_new_tokens=7)
        return state, ok

    rows, counts = (jnp.stack(x) for x in zip(*xs, strict=True))
    scanned, oks = jax.lax.scan(step, state, (rows, counts))
    want = []
    for x in xs:
        state, ok = step(state, x)
        want.append(bool(ok))
    assert oks.tolist() == want and {True, False} <= set(want)
    assert same_bits(scanned, snapshot(state))


@pytest.mark.parametrize("is_forked", [True, False])
def test_cond_takes_either_operation(is_forked):
    @jax.jit
    def choose(is_forked, state):
        return jax.lax.cond(
            is_forked,
            lambda state: fj.fork(state, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32))[0],
            lambda state: fj.free(state, jnp.zeros(1, jnp.int32)),
            state,
        )

    state = choose(is_forked, filled(SPEC, {0: 4}))
    fj.check_state(state)
    assert held_lens(state)[:2] == ([4, 4] if is_forked else [0, 0])
    assert contents(state, 1) == ([100, 101, 102, 103] if is_forked else [])
