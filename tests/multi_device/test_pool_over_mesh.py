"""A pool over a mesh of four devices, compared with the same pool on one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj
from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.ops import migration, storage, transfer, writing
from ferrum_jax.sharding import check_replicated, init_sharded
from tests.support import sharded_llama
from tests.support.caches import EXCHANGE, filled, lies_over, num_compilations, snapshot, tiny_spec
from tests.support.pools import keys, values

AUTO = AxisType.Auto
ROWS, LENGTHS = [3, 0, 1], {3: 10, 0: 7, 1: 1}


@pytest.fixture(params=[AUTO, AxisType.Explicit], ids=str)
def mesh(request):
    return jax.make_mesh((4,), ("tp",), axis_types=(request.param,))


@pytest.fixture
def auto_mesh():
    return jax.make_mesh((4,), ("tp",), axis_types=(AUTO,))


def spread(state, mesh):
    """The same content over a mesh."""
    pool = state.pool
    spec = tiny_spec(num_kv_heads=pool.num_kv_heads, head_dim=pool.head_dim, dtype=pool.dtype)
    leaves, structure = jax.tree.flatten(init_sharded(spec, mesh, "tp"))
    old = jax.tree.leaves(state)
    return structure.unflatten(
        [jax.device_put(x, y.sharding) for x, y in zip(old, leaves, strict=True)]
    )


def both(mesh, dtype="float32"):
    """One cache with some rows in it, on one device and over the mesh."""
    spec = tiny_spec(num_kv_heads=4, head_dim=8, dtype=dtype)
    return filled(spec, LENGTHS), spread(filled(spec, LENGTHS), mesh)


def same(one, other):
    """Whether two trees hold the same bits, wherever they lie."""
    return all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(snapshot(one), snapshot(other), strict=True)
    )


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def new_tokens(num_tokens):
    """Queries, keys and values of `num_tokens` tokens in each of three rows."""
    shapes = [(3, num_tokens, heads, 8) for heads in (8, 4, 4)]
    return tuple(numbers(seed, *shape) for seed, shape in enumerate(shapes))


def attend_in_each_layer(state, q, k, v, options):
    """Writes and attends in each layer, as a model does whose layers are unrolled."""
    num_tokens = q.shape[1]
    batch = PagedBatch.of(state, ROWS, np.minimum([10, 7, 1], num_tokens), num_tokens=num_tokens)
    out = jnp.zeros(q.shape, jnp.float32)
    for layer in range(state.pool.num_layers):
        batch = batch.write(layer, k, v)
        out = out + batch.attend(layer, q, options)
    return state.with_pools(batch.pools), out


def attend_in_a_scan(state, q, k, v, options):
    """The same, the pool being what a scan carries along."""
    num_tokens = q.shape[1]
    batch = PagedBatch.of(state, ROWS, np.minimum([10, 7, 1], num_tokens), num_tokens=num_tokens)

    def body(carry, layer):
        batch, out = carry
        batch = batch.write(layer, k, v)
        return (batch, out + batch.attend(layer, q, options)), None

    layers = jnp.arange(state.pool.num_layers, dtype=jnp.int32)
    (batch, out), _ = lax.scan(body, (batch, jnp.zeros(q.shape, jnp.float32)), layers)
    return state.with_pools(batch.pools), out


@pytest.mark.parametrize(
    ("dtype", "step", "num_tokens"),
    [
        ("float32", attend_in_each_layer, 1),
        ("bfloat16", attend_in_a_scan, 1),
        ("float32", attend_in_a_scan, 3),
    ],
    ids=["float32-unrolled", "bfloat16-scanned", "chunks"],
)
def test_write_and_attend_exchange_nothing_and_work_in_place(mesh, dtype, step, num_tokens):
    alone, state = both(mesh, dtype)
    options = AttentionOptions(sliding_window=6, sinks=jnp.asarray(numbers(9, 8)))
    tokens = new_tokens(num_tokens)
    want, want_out = jax.jit(step)(alone, *tokens, options)

    heads = NamedSharding(mesh, P(None, None, "tp"))
    placed = [jax.device_put(x, heads) for x in tokens]
    program = jax.jit(step, donate_argnums=0).lower(state, *placed, options).compile()
    assert not re.findall(EXCHANGE, program.as_text())
    memory = program.memory_analysis()
    local_bytes = 2 * keys(state.pool).addressable_shards[0].data.nbytes
    assert memory.alias_size_in_bytes >= local_bytes

    got, out = program(state, *placed, options)
    assert keys(state.pool).is_deleted()
    for array in (keys(got.pool), values(got.pool), out):
        assert lies_over(array, P(None, None, "tp"))
    assert got.tables.block_ids.sharding.is_fully_replicated
    assert same(got, want)
    np.testing.assert_allclose(np.asarray(out), np.asarray(want_out), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        writing.write_on_cpu,
        writing.write_each_token,
        writing.write_each_vector,
        writing.write_whole_blocks,
    ],
)
def test_write_exchanges_no_tokens_in_the_form_of_any_platform(mesh, form, monkeypatch):
    monkeypatch.setattr(storage, "write_numbers", lambda *args: form(*args[:4]))
    storage._write.clear_cache()
    alone, state = both(mesh)
    _, k, v = (x[:, 0] for x in new_tokens(1))
    slots = np.asarray([1, 7, 99], np.int32)
    want = fj.write(alone.pool, 1, slots, k, v)
    for lies in (P(None, "tp"), P()):
        args = state.pool, 1, slots, *jax.device_put((k, v), NamedSharding(mesh, lies))
        assert not re.findall(EXCHANGE, jax.jit(fj.write).lower(*args).compile().as_text())
    assert same(fj.write(*args), want)
    storage._write.clear_cache()


@pytest.mark.parametrize("check_vma", [True, False])
def test_write_works_within_a_shard_map_of_the_caller(auto_mesh, check_vma):
    arrays, tokens = numbers(0, 4, 6, 2, 3, 5, 8), numbers(1, 4, 7, 3, 8)
    slots = np.random.default_rng(2).integers(-3, 40, (4, 7)).astype(np.int32)

    def write_mine(array, slots, tokens):
        return writing.write_numbers(array[0], jnp.int32(1), slots[0], tokens[0])[None]

    each = jax.shard_map(
        write_mine, mesh=auto_mesh, in_specs=(P("tp"),) * 3, out_specs=P("tp"), check_vma=check_vma
    )
    program = jax.jit(each).lower(arrays, slots, tokens)
    assert "ferrum_jax_write" in program.as_text()
    got = program.compile()(arrays, slots, tokens)
    for i, array in enumerate(got):
        want = writing.write_each_token(jnp.asarray(arrays[i]), jnp.int32(1), slots[i], tokens[i])
        np.testing.assert_array_equal(array, want)


def test_write_and_attend_exchange_nothing_for_replicated_or_host_tokens(auto_mesh):
    _, state = both(auto_mesh)
    tokens = new_tokens(1)
    for placed in (tokens, jax.device_put(tokens, NamedSharding(auto_mesh, P()))):
        program = jax.jit(attend_in_each_layer).lower(state, *placed, None).compile()
        assert not re.findall(EXCHANGE, program.as_text())


def test_paged_attention_over_a_mesh_runs_without_jit(mesh):
    alone, state = both(mesh)
    q, tables = new_tokens(1)[0][:, 0], state.tables
    rows = {
        "block_ids": jnp.asarray(np.asarray(tables.block_ids)[ROWS]),
        "held_lens": jnp.asarray(np.asarray(tables.held_lens)[ROWS]),
    }
    want = paged_attention(jnp.asarray(q), alone.pool, 1, **rows)
    got = paged_attention(jnp.asarray(q), state.pool, 1, **rows)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6, atol=1e-6)


def test_operations_on_tables_change_every_device_alike_without_exchange(mesh):
    alone, state = both(mesh)
    calls = [
        lambda s: fj.extend(s, ROWS, [2, 5, 1], max_new_tokens=8)[0],
        lambda s: fj.fork(s, [0], [2])[0],
        lambda s: fj.truncate(s, [3], [4])[0],
        lambda s: fj.free(s, [0]),
        lambda s: fj.allocate(s, [0], [4])[0],
    ]
    for call in calls:
        program = jax.jit(call).lower(state).compile()
        assert not re.findall(EXCHANGE, program.as_text())
        alone, state = call(alone), call(state)
        assert same(state, alone)
        assert lies_over(keys(state.pool), P(None, None, "tp"))
        check_replicated(state)
    fj.check_state(state)


def test_resize_and_move_blocks_keep_the_pool_over_its_mesh(mesh):
    alone, state = both(mesh)
    for num_blocks in (24, 12):
        alone, state = migration.resize(alone, num_blocks), migration.resize(state, num_blocks)
        assert same(state, alone) and state.pool.sharding is not None
    alone, state = fj.free(alone, [3]), fj.free(state, [3])
    plan = migration.plan_defragment(np.asarray(alone.tables.ref_counts))
    (alone, _), (state, _) = (
        migration.move_blocks(alone, *plan),
        migration.move_blocks(state, *plan),
    )
    assert same(state, alone)
    assert lies_over(keys(state.pool), P(None, None, "tp"))


def test_export_blocks_and_import_blocks_over_a_mesh_keep_every_bit(mesh, dtype, monkeypatch):
    alone, state = both(mesh, dtype)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4 * keys(state.pool)[0].nbytes)
    block_ids = np.asarray([4, 1, 0, 5, 2], np.int32)
    blocks = transfer.export_blocks(state.pool, block_ids)
    assert len(blocks.chunks) > 1
    pool = transfer.import_blocks(state.pool, block_ids[::-1].copy(), blocks)
    want = transfer.import_blocks(
        alone.pool, block_ids[::-1].copy(), transfer.export_blocks(alone.pool, block_ids)
    )
    assert same(pool, want)


def split_weights(params, mesh):
    """Spreads a model's matrices over the mesh: by output features, then by input features."""

    def placed(path, x):
        name = jax.tree_util.keystr(path)
        spec = P()
        if "qkv" in name or "gate_up" in name:
            spec = P("tp")
        elif "out" in name or "down" in name:
            spec = P(None, "tp")
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, params)


@pytest.fixture(scope="module")
def on_one_device():
    """What the example model does on one device."""
    return sharded_llama.decode(*sharded_llama.model(), fj.init(sharded_llama.SPEC))


@pytest.mark.parametrize("splits_weights", [False, True], ids=["whole-weights", "split-weights"])
def test_generate_over_a_mesh_equals_generate_on_one_device(
    auto_mesh, on_one_device, splits_weights
):
    mesh = auto_mesh
    want, want_tokens, alone = on_one_device
    model_fn, params = sharded_llama.model()
    if splits_weights:
        params = split_weights(params, mesh)
    empty = init_sharded(sharded_llama.SPEC, mesh, "tp")
    logits, tokens, state = sharded_llama.decode(model_fn, params, empty)
    assert tokens.tolist() == want_tokens.tolist()
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    assert same(state.tables, alone.tables)
    assert lies_over(keys(state.pool), P(None, None, "tp"))
    check_replicated(state)


def test_init_sharded_replicates_the_pool_over_other_axes():
    grid = jax.make_mesh((2, 2), ("replica", "tp"), axis_types=(AUTO, AUTO))
    alone, state = both(grid)
    assert [shard.data.shape[2] for shard in keys(state.pool).addressable_shards] == [2] * 4
    want, want_out = jax.jit(attend_in_each_layer)(alone, *new_tokens(1), None)
    got, out = jax.jit(attend_in_each_layer)(state, *new_tokens(1), None)
    assert same(got, want)
    np.testing.assert_allclose(np.asarray(out), np.asarray(want_out), rtol=1e-6, atol=1e-6)


def test_init_on_a_mesh_puts_the_whole_cache_on_each_device(mesh):
    spec = tiny_spec(num_kv_heads=3, head_dim=8)  # More than the devices can share out.
    states = [fj.init(spec), fj.init(spec, mesh)]
    assert all(leaf.sharding == NamedSharding(mesh, P()) for leaf in jax.tree.leaves(states[1]))
    params = jax.device_put(numbers(1, 3, 1, 3, 8), NamedSharding(mesh, P()))

    @jax.jit
    def step(state, params):
        state, ok = fj.extend(state, ROWS, 1, max_new_tokens=1)
        batch = PagedBatch.of(state, ROWS, 1, num_tokens=1).write(1, params, -params)
        return state.with_pools(batch.pools), batch.attend(1, params), ok

    outs = []
    for i, kv in enumerate((numbers(1, 3, 1, 3, 8), params)):
        states[i], _, _ = step(states[i], kv)
        before = num_compilations()
        states[i], out, ok = step(states[i], kv)
        assert bool(ok) and num_compilations() == before
        outs.append(np.asarray(out))
    assert same(*states)
    np.testing.assert_allclose(*outs, rtol=1e-6, atol=1e-6)
    check_replicated(states[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_init_on_the_mesh_of_the_parameters_compiles_a_step_once(axis_type):
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(axis_type,))
    params = jax.device_put(np.float32(2), NamedSharding(mesh, P()))

    @jax.jit
    def step(params, state):
        state, ok = fj.extend(state, np.int32([0]), 1, max_new_tokens=1)
        kv = jnp.full((1, state.pool.num_kv_heads, state.pool.head_dim), params)
        return state.with_pools([fj.write(state.pool, 0, np.int32([0]), kv, kv)]), ok

    state, _ = step(params, fj.init(tiny_spec(), mesh))
    assert keys(state.pool).sharding.mesh == mesh
    before = num_compilations()
    state, ok = step(params, state)
    assert bool(ok) and num_compilations() == before


def test_init_sharded_refuses_heads_that_the_devices_do_not_divide(mesh):
    with pytest.raises(ValueError, match=r"num_kv_heads \(6\).* 4 devices.*replicate the heads"):
        init_sharded(tiny_spec(num_kv_heads=6), mesh, "tp")


def test_init_sharded_refuses_an_unknown_axis(mesh):
    with pytest.raises(ValueError, match="axis_name 'heads'.*tp"):
        init_sharded(tiny_spec(num_kv_heads=4), mesh, "heads")


def test_check_replicated_finds_tables_that_differ_between_two_devices(mesh):
    _, state = both(mesh)
    check_replicated(state)
    lens = state.tables.held_lens
    parts = [np.asarray(lens) + (device.id == 2) for device in mesh.devices]
    parts = [jax.device_put(x, device) for x, device in zip(parts, mesh.devices, strict=True)]
    wrong = jax.make_array_from_single_device_arrays(lens.shape, lens.sharding, parts)
    tables = dataclasses.replace(state.tables, held_lens=wrong)
    with pytest.raises(AssertionError, match=r"diverged: \[0\]\.held_lens of process 0"):
        check_replicated(state.with_tables([tables]))


def test_check_replicated_refuses_a_sharded_array(mesh):
    _, state = both(mesh)
    with pytest.raises(ValueError, match=r"\.arrays\['k'\] is divided among devices"):
        check_replicated(state.pool)
