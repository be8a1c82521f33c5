"""Arguments that operations refuse: of a wrong shape or dtype, or consumed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.ops.arguments import as_ids
from tests.support.busy import busy_state
from tests.support.caches import contents, filled, payload, same_bits, snapshot
from tests.support.integers import DTYPES, LEAST, MOST, edges


def extend(state, seq_ids, num_tokens):
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=4)


WRONG_SHAPES = {
    "seq_ids must be a vector such as [0, 1], got shape ()": lambda s: fj.allocate(s, 3, 1),
    "num_tokens has shape (1,), but seq_ids has (2,). Give one": lambda s: fj.allocate(
        s, [3, 4], [1]
    ),
    "num_tokens has shape (1,), but seq_ids has (3,)": lambda s: extend(s, [0, 3, 4], [1]),
    "seq_ids must be a vector": lambda s: fj.free(s, 0),
    "parents has shape (1,), but children has (2,). Give one number for each of children, or a "
    "single one, not in a list, for all": lambda s: fj.fork(s, [0], [3, 4]),
    "children must be a vector such as [0, 1], got shape (1, 1)": lambda s: fj.fork(
        s, [[0]], [[3]]
    ),
    "sources has shape (2,), but targets has (1,)": lambda s: fj.share(s, [0, 1], [2], 1),
    "num_tokens has shape (2,), but targets has (1,)": lambda s: fj.share(s, [0], [1], [2, 3]),
    "seq_lens has shape (3,), but seq_ids has (1,)": lambda s: fj.truncate(s, [0], [1, 2, 3]),
    "layer must be a single integer, got shape (1,)": lambda s: fj.gather(s, [0], 0),
    "seq_id must be a single integer, got shape (2,)": lambda s: fj.gather(s, 0, [0, 1]),
    "sources has shape (1,), but targets has (3,)": lambda s: fj.copy_blocks(
        s.pool, [0], [1, 2, 3]
    ),
}
"""What the error says, and the call."""


@pytest.mark.parametrize("message", WRONG_SHAPES)
def test_a_wrong_shape_is_refused_by_the_name_of_the_argument_and_changes_nothing(message):
    state = busy_state()
    before = snapshot(state)
    with pytest.raises(AssertionError, match=re.escape(message)):
        WRONG_SHAPES[message](state)
    with pytest.raises(AssertionError, match=re.escape(message)):
        jax.eval_shape(WRONG_SHAPES[message], state)
    assert same_bits(state, before)


def test_one_parent_or_source_serves_every_row(spec):
    state = filled(spec, {0: 4})
    state, ok = fj.fork(state, 0, [3, 1])
    assert bool(ok) and [contents(state, row) for row in (3, 1)] == [contents(state, 0)] * 2
    state, ok = fj.share(state, jnp.int32(0), [1, 3], 3)
    assert bool(ok) and int(state.tables.ref_counts[state.tables.block_ids[0, 0]]) == 3
    fj.check_state(state)


@pytest.mark.parametrize("wrong", [1.0, None, True, "4"])
def test_extend_refuses_a_max_new_tokens_that_is_not_an_integer(spec, wrong):
    with pytest.raises(ValueError, match="max_new_tokens must be an integer"):
        fj.extend(fj.init(spec), [0], [1], max_new_tokens=wrong)


CONSUMERS = {
    "fork": lambda s: fj.fork(s, [0], [3]),
    "share": lambda s: fj.share(s, [0], [2], 3),
    "truncate": lambda s: fj.truncate(s, [0], 3),
    "copy_blocks": lambda s: fj.copy_blocks(s.pool, [0], [1]),
    "write": lambda s: fj.write(s.pool, 0, [0], *payload(s.pool, 0, [1])),
}
ON_POOLS = {name: CONSUMERS[name] for name in ("copy_blocks", "write")}
ON_TABLES = {
    "allocate": lambda s: fj.allocate(s, [3], 1),
    "extend": lambda s: extend(s, [0], 1),
    "free": lambda s: fj.free(s, [0]),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_consumed_state_is_refused_with_the_remedy(consumer):
    state = busy_state()
    CONSUMERS[consumer](state)
    users = {**CONSUMERS, "gather": lambda s: fj.gather(s, 0, 0)}
    if consumer in ON_POOLS:
        for use in ON_TABLES.values():
            use(state)  # Tables outlive a pool that is replaced.
    else:
        users |= ON_TABLES
    for name, use in users.items():
        kind = "pool" if name in ON_POOLS else "state"
        with pytest.raises(ValueError, match=f"This {kind} was consumed.*Use the {kind} that"):
            use(state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_ids_keeps_integers_of_any_dtype_or_takes_the_nearest_int32(dtype):
    numbers = edges(dtype)
    with jax.enable_x64(True):
        given = jnp.asarray(np.asarray(numbers, dtype))
        for got in (as_ids(given), jax.jit(as_ids)(given)):
            assert got.dtype == jnp.int32
            assert got.tolist() == [min(max(n, LEAST), MOST) for n in numbers]
    for n in numbers:
        if LEAST <= n <= MOST:
            assert as_ids(n) == as_ids([n])[0] == as_ids(np.asarray(n, dtype)) == n
        else:
            for given in (n, [0, n], np.asarray(n, dtype)):
                with pytest.raises(ValueError, match="within int32"):
                    as_ids(given)


@pytest.mark.parametrize(
    "wrong",
    [0.5, [1.0], np.float32([1, 2]), True, np.asarray([True]), "1", [None], 2**70, [-(2**70)]],
    ids=str,
)
def test_as_ids_refuses_what_is_not_an_integer(wrong):
    with pytest.raises(ValueError, match="must be integers within int32"):
        as_ids(wrong)


@pytest.mark.parametrize("dtype", ["float32", "bool", "bfloat16"])
def test_as_ids_refuses_a_device_array_of_another_dtype_eager_or_traced(dtype):
    for convert in (as_ids, jax.jit(as_ids)):
        with pytest.raises(ValueError, match=f"must be integers, got a device array of {dtype}"):
            convert(jnp.zeros(2, dtype))


def test_as_ids_copies_ids_of_the_host():
    given = np.int32([1, 2])
    ids = as_ids(given)
    given[:] = 7
    assert ids.tolist() == [1, 2] and as_ids([]).dtype == np.int32
