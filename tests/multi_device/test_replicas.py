"""Replicas of a cache along a mesh axis, compared with one cache per replica on one device."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj
from ferrum_jax import GenerateOptions, Sampling
from ferrum_jax.decoding.prefill import PrefillOptions
from ferrum_jax.errors import RefusedError
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.integrations.replicas import prefill_replicas, serve_replicas
from ferrum_jax.replicas import Replicas
from ferrum_jax.types import NULL_SEQ
from tests.support import head_parallel
from tests.support.caches import EXCHANGE, lies_over, num_compilations, snapshot, tiny_spec
from tests.support.head_parallel import PARAMS, PROMPTS, SPEC, Decoder

S = SPEC.max_seqs
ROWS = [S + 4, 0, 2, S, S + 1]  # Of each prompt: two of replica 0, three of replica 1.
FORKS = [S + 5, 3]  # Children of the first two rows.
OPTIONS = GenerateOptions(max_new_tokens=6)
WITHIN = ("replica_groups=[2,2]<=[4]", "replica_groups={{0,1},{2,3}}")
"""Groups of the devices of each replica, in the text of a program."""


def grid(*types):
    """Two replicas of two devices each."""
    return jax.make_mesh((2, 2), ("data", "tp"), axis_types=types)


def pair():
    """Two replicas of one device each."""
    devices = jax.devices()[:2]
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def part(replicas, i):
    """The cache of one replica, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[i], replicas.caches)


def allocated(state, _, seq_ids, num_tokens):
    return fj.allocate(state, seq_ids, num_tokens)


def forked_and_generated(model_fn, state, params, seq_ids, first, pairs):
    """Forks rows, then decodes all of them."""
    state, ok = fj.fork(state, *pairs)
    out = fj.generate(model_fn, params, state, seq_ids, first, options=OPTIONS)
    return out.state, (out.tokens, out.ok & ok)


def rollout(model_fn, params, replicas):
    """Logits after the prompts, and greedy tokens of all rows, in place and without exchange."""
    rows, all_rows = replicas.split(ROWS[:3]), replicas.split(ROWS + FORKS)
    lens = [len(prompt) for prompt in PROMPTS]
    replicas, ok = replicas.run(allocated, (), rows.seq_ids, rows.spread(lens[:3]))
    replicas.require(ok, "allocate")
    options = PrefillOptions(chunk_tokens=4, rows_per_step=2)
    logits, replicas = prefill_replicas(model_fn, params, replicas, ROWS, PROMPTS, options=options)
    first = np.argmax(np.asarray(logits), -1).astype(np.int32)
    children = replicas.split(FORKS)
    parents = children.spread(np.asarray(ROWS[:2]) % S, NULL_SEQ)
    step = functools.partial(forked_and_generated, model_fn)
    first = all_rows.spread(np.append(first, first[:2]))
    args = replicas, step, params, all_rows.seq_ids, first, (parents, children.seq_ids)
    program = jax.jit(Replicas.run, static_argnums=1, donate_argnums=0).lower(*args).compile()
    text = program.as_text()
    exchanges = [line for line in text.splitlines() if re.search(EXCHANGE, line)]
    assert all(any(groups in line for groups in WITHIN) for line in exchanges), exchanges
    # The largest is of activations: no pool and no weights are exchanged.
    assert not any(re.search(r"\[(\d+,)*48,", line.split("(")[0]) for line in exchanges)
    old = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in pools_of(replicas)]
    replicas, (tokens, ok) = Replicas.run(*args)
    assert [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in pools_of(replicas)] == old
    replicas.require(ok, "generate")
    return np.asarray(logits), np.asarray(all_rows.collect(tokens)), replicas


def pools_of(replicas):
    return jax.tree.leaves(replicas.caches.pools)


@pytest.fixture(scope="module")
def alone():
    """Logits after each prompt, and greedy tokens, on one device."""
    state, rows = fj.init(SPEC), range(len(PROMPTS))
    logits, state = fj.prefill(Decoder(), PARAMS, state, rows, PROMPTS)
    first = np.argmax(np.asarray(logits), -1).astype(np.int32)
    out = fj.generate(Decoder(), PARAMS, state, list(rows), first, options=OPTIONS)
    return np.asarray(logits), np.asarray(out.tokens)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_rollout_on_replicas_equals_one_on_one_device_and_exchanges_nothing(alone, axis_type):
    mesh = grid(axis_type, axis_type)
    with jax.set_mesh(mesh):
        model_fn = Decoder("tp" if axis_type == AxisType.Explicit else None)
        replicas = Replicas.init(SPEC, mesh, "data", "tp")
        logits, tokens, replicas = rollout(model_fn, head_parallel.over(mesh), replicas)
    np.testing.assert_allclose(logits, alone[0], rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == [*alone[1].tolist(), *alone[1][:2].tolist()]
    assert all(lies_over(x, P("data", None, None, "tp")) for x in pools_of(replicas))
    lens = np.concatenate([np.asarray(part(replicas, i).seq_lens) for i in range(2)])
    want = np.asarray([len(prompt) + OPTIONS.max_new_tokens for prompt in PROMPTS])
    assert lens[ROWS].tolist() == want.tolist() and lens[FORKS].tolist() == want[:2].tolist()
    for i in range(2):
        fj.check_state(part(replicas, i))


def test_serve_on_replicas_answers_as_serve_on_one_device_and_compiles_once():
    options = fj.ServeOptions(
        max_new_tokens=6,
        sampling=Sampling(temperature=0.8),
        step=StepOptions(chunk_tokens=3, chunks_per_step=2),
        limits=[6, 5, 6, 2, 6],
    )
    more = {"options": options, "key": jax.random.key(5)}
    want = fj.serve(Decoder(), PARAMS, fj.init(SPEC), [0, 1], PROMPTS, **more)
    replicas = Replicas.init(SPEC, pair(), "data")
    for _ in range(2):
        before = num_compilations()
        out = serve_replicas(Decoder(), PARAMS, replicas, [1, S, 0, S + 2], PROMPTS, **more)
        replicas = out.replicas
        assert out.tokens.tolist() == want.tokens.tolist()
        assert out.num_tokens.tolist() == want.num_tokens.tolist() and out.ok.all()
        assert set(out.replica.tolist()) == {0, 1}
    assert num_compilations() == before
    assert not any(part(replicas, i).seq_lens.any() for i in range(2))


OPERATIONS = {
    "allocate": lambda state, _, a, b, n: fj.allocate(state, a, n),
    "extend": lambda state, _, a, b, n: fj.extend(state, a, n, max_new_tokens=9),
    "free": lambda state, _, a, b, n: (fj.free(state, a), np.True_),
    "fork": lambda state, _, a, b, n: fj.fork(state, a, b),
    "truncate": lambda state, _, a, b, n: fj.truncate(state, a, n),
}


def test_random_operations_on_replicas_keep_every_bit_as_on_one_device():
    spec = tiny_spec(num_kv_heads=2)
    replicas = Replicas.init(spec, grid(AxisType.Auto, AxisType.Explicit), "data", "tp")
    states, oks = [fj.init(spec), fj.init(spec)], []
    rng = np.random.default_rng(1)
    for number in range(60):
        name = rng.choice([*OPERATIONS])
        if number < 4:
            name = "allocate"
        args = [rng.integers(-1, 5, (2, 2)) for _ in range(2)] + [rng.integers(0, 10, (2, 2))]
        args = [x.astype(np.int32) for x in args]
        replicas, ok = replicas.run(OPERATIONS[name], (), *args)
        for i in range(2):
            states[i], want = OPERATIONS[name](states[i], (), *(x[i] for x in args))
            assert bool(ok[i]) == bool(want)
            same = zip(snapshot(part(replicas, i)), snapshot(states[i]), strict=True)
            assert all(a.tobytes() == b.tobytes() for a, b in same), name
            oks.append(bool(want))
    assert len(set(oks)) == 2


def test_rows_are_grouped_by_replica_and_collected_in_their_order():
    replicas, rng = Replicas.init(tiny_spec(), pair(), "data"), np.random.default_rng(0)
    for count in (1, 4, 10):
        ids = rng.permutation(10)[:count]
        rows, numbers = replicas.split(ids), rng.integers(0, 99, (count, 3))
        spread = rows.spread(numbers, -1)
        for i in range(2):
            its_rows = rows.seq_ids[i][rows.seq_ids[i] >= 0]
            assert (its_rows + 5 * i).tolist() == [x for x in ids if x // 5 == i]
            assert ids[rows.members(i)].tolist() == (its_rows + 5 * i).tolist()
        assert (spread[rows.seq_ids < 0] == -1).all()
        assert rows.collect(jax.numpy.asarray(spread)).tolist() == numbers.tolist()


def test_refusals_name_the_replica():
    spec = tiny_spec()
    replicas = Replicas.init(spec, pair(), "data")
    rows = replicas.split([0, 5, 6, 7])
    replicas, ok = replicas.run(allocated, (), rows.seq_ids, rows.spread([3, 15, 15, 15]))
    assert ok.tolist() == [True, False]
    with pytest.raises(RefusedError, match=r"^Replica 1: Not ok: allocate.* 12 of 12 blocks"):
        replicas.require(ok, "allocate rows 0, 5, 6 and 7")
    prefill = functools.partial(prefill_replicas, Decoder(), PARAMS, replicas)
    with pytest.raises(ValueError, match="^Replica 0: Row 0 has 3 tokens"):
        prefill([0, 5], [[1, 2], [3]])
    with pytest.raises(RefusedError, match="^Replica 1: Not ok: prefill 3 rows"):
        prefill([5, 6, 7], [[1] * 15, [1] * 15, [1] * 15])
    assert part(replicas, 1).seq_lens.tolist() == [0] * 5
    serve = functools.partial(serve_replicas, Decoder(), PARAMS, replicas, prompts=[[1]])
    options = fj.ServeOptions(max_new_tokens=1)
    with pytest.raises(ValueError, match="^Replica 0: Rows.* hold tokens"):
        serve(seq_ids=[0, 5], options=options)
    with pytest.raises(ValueError, match=r"as many rows of each replica, got \[1, 2\]"):
        serve(seq_ids=[1, 5, 6], options=options)
    with pytest.raises(ValueError, match="seq_ids must be rows from 0 to 9"):
        prefill([10], [[1]])
    with pytest.raises(ValueError, match="one row per prompt"):
        prefill([1], [[1], [2]])


def test_replicas_refuse_axes_that_do_not_fit():
    mesh = grid(AxisType.Auto, AxisType.Auto)
    with pytest.raises(ValueError, match="batch_axis 'rows' must be an axis"):
        Replicas.init(tiny_spec(), mesh, "rows")
    with pytest.raises(ValueError, match="both 'data'"):
        Replicas.init(tiny_spec(), mesh, "data", "data")
    with pytest.raises(ValueError, match=r"num_kv_heads \(1\)"):
        Replicas.init(tiny_spec(), mesh, "data", "tp")
