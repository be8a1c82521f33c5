"""A manager whose pool is sharded over a mesh of four devices, compared with one on one device."""

import functools
import random
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ferrum_jax import Device, KeyValue, LayerGroup
from ferrum_jax.compression import CompressionMethod, rewrite
from ferrum_jax.config import TierConfig
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.generate import GenerateOptions, generate
from ferrum_jax.decoding.prefill import prefill
from ferrum_jax.manager.pool import programs
from ferrum_jax.ops import storage, transfer
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.sharding import init_sharded
from ferrum_jax.types import TokenFormat
from tests.support import sharded_llama
from tests.support.caches import EXCHANGE, lies_over, snapshot, tiny_spec
from tests.support.internals import row_blocks
from tests.support.managers import PREFIXES, Clock, cached_prefixes, make_manager, refused
from tests.support.multi_device import make_multi
from tests.support.pools import keys

MAX_TOKENS, NUM_BLOCKS, NAMES = 30, 16, "abc"
NUM_ROUNDS = 6


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
    return jax.make_mesh((4,), ("tp",), axis_types=(request.param,))


def manager_over(mesh, *, geometry=None, **config):
    """A manager over a mesh, or on one of its devices without one."""
    model = {"num_kv_heads": 4, "head_dim": 8, "max_sequence_length": MAX_TOKENS}
    given = {"target_devices": [Device("cpu", 2)], "max_blocks": NUM_BLOCKS, **config}
    return make_manager(geometry={**model, **(geometry or {})}, mesh=mesh, **given)


@functools.partial(jax.jit, donate_argnums=0)
def scribble(state, seq_ids, seed):
    """Writes random tokens wherever a row holds some."""
    pool, tables = state.pool, state.tables
    batch = PagedBatch.of(state, seq_ids, tables.seq_lens[seq_ids], num_tokens=MAX_TOKENS)
    shape = pool.num_layers, 2, 1, MAX_TOKENS, pool.num_kv_heads, pool.head_dim
    for i, name in enumerate(state.layers.names()):
        kv = jax.random.normal(jax.random.key(seed + i), shape, np.float32)

        def write(batch, layer, kv=kv, name=name):
            return batch.write(layer, *kv[layer], group=name), None

        batch, _ = jax.lax.scan(write, batch, np.arange(pool.num_layers, dtype=np.int32))
    return state.with_pools(batch.pools).with_tables([tables]), None


def compress(manager, name, dice):
    method = dice.choice([None, CompressionMethod(scorer="key_difference", num_recent=2)])
    manager.compress_cache(name, dice.choice([0.6, 0.5]), method)


def begin(manager, name, dice):
    prompt = dice.choices([0, 1], k=dice.randint(0, 14))
    manager.allocate(manager.new_request(name, prompt_token_ids=prompt))


def share(manager, name, dice):
    manager.share_prefix(name, dice.choice([*NAMES.replace(name, "")]), dice.randint(0, 3))


def write(manager, name, dice):
    manager.run(scribble, [manager.get_handle(name)], np.int32(dice.randint(0, 999)))


OPERATIONS = {
    **{"begin": begin, "write": write, "compress": compress, "share": share},
    "extend": lambda m, name, dice: m.extend(m.get_handle(name), dice.randint(0, 9)),
    "commit": lambda m, name, dice: m.commit(m.get_handle(name)),
    "swap_out": lambda m, name, dice: m.swap_out(name),
    "swap_in": lambda m, name, dice: m.swap_in(name),
    "end": lambda m, name, dice: m.deallocate(name),
    "defragment": lambda m, name, dice: m.defragment(),
    "gc": lambda m, name, dice: m.gc(),
}
"""Calls of a manager about one request, with random arguments."""


def random_calls(seed):
    """Yields `(operation, name, seed of the call)`, each operation about as often."""
    dice = random.Random(seed)
    for _ in range(NUM_ROUNDS):
        operations = ["begin", "begin", "begin", "extend", "write", "share", *OPERATIONS]
        dice.shuffle(operations)
        for operation in operations:
            yield operation, dice.choice(NAMES), dice.random()


def outcome_of(manager, operation, name, seed):
    """How a call is refused, or None if it is not."""
    try:
        return refused(OPERATIONS[operation], manager, name, random.Random(seed))
    except ValueError as error:
        return type(error)


def seen(manager):
    """All that there is, every bit of it; what is read is rounded: a rotation sums numbers."""
    leaves = manager.run(lambda state, _: (state, snapshot(state)), [])
    handles = {
        name: (
            h.num_tokens(),
            h.stats(),
            [x is None or np.round(np.asarray(x, np.float32), 5).tolist() for x in h.kv_cache(1)],
        )
        for name, h in manager.list_handles()
    }
    bits = [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]
    return bits, handles, row_blocks(manager), cached_prefixes(manager), manager.stats()


def check_lies_over_the_mesh(manager):
    """A quarter of the heads is on each device, and all of the tables on each."""

    def step(state, _):
        for array in state.pool.arrays.values():
            assert lies_over(array, P(None, None, "tp"))
            assert {shard.data.shape[2] for shard in array.addressable_shards} == {1}
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.tables))
        return state, None

    manager.run(step, [])


PAYLOAD = KeyValue(4, 8, "bfloat16")
KINDS = {
    "one group": ({}, {"enable_prefix_caching": True, "prefix_cache_config": PREFIXES}),
    "a window": (
        {"groups": [LayerGroup("local", [1], PAYLOAD, 5), LayerGroup("full", [0], PAYLOAD)]},
        {"max_blocks": 32},
    ),
}
"""Layers, and what else the manager does: fields of the geometry and of the configuration."""


@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_of_a_manager_over_a_mesh_keep_every_bit_as_on_one_device(
    mesh, tmp_path, kind
):
    done, (layers, config) = set(), KINDS[kind]
    managers = [
        manager_over(
            over,
            geometry={"dtype": "bfloat16", **layers},
            initial_blocks=4,
            enable_pooling=False,
            **config,
            tiers=TierConfig(host_budget_bytes=9000, disk_directory=tmp_path / str(over is None)),
            clock=Clock(),
        )
        for over in (None, mesh)
    ]
    for operation, name, seed in random_calls(seed=1):
        outcomes = [outcome_of(manager, operation, name, seed) for manager in managers]
        assert outcomes[0] is outcomes[1], (operation, outcomes)
        if outcomes[0] is None:
            done.add(operation)
        for manager in managers:
            manager.check()
        want, got = map(seen, managers)
        assert got == want, operation
        check_lies_over_the_mesh(managers[1])
    assert done == set(OPERATIONS)


def decode(manager):
    """The tokens that the example model generates through a manager, and its logits before."""
    model_fn, params = sharded_llama.model()
    handles = [
        manager.allocate(manager.new_request(i, prompt_token_ids=prompt))
        for i, prompt in enumerate(sharded_llama.PROMPTS)
    ]

    def read(state, seq_ids):
        logits, state = prefill(model_fn, params, state, seq_ids, sharded_llama.PROMPTS)
        return state, np.asarray(logits)

    def go_on(state, seq_ids, first):
        options = GenerateOptions(max_new_tokens=6)
        out = generate(model_fn, params, state, seq_ids, first, options=options)
        return out.state, np.asarray(out.tokens)

    logits = manager.run(read, handles)
    first = np.argmax(logits, axis=-1).astype(np.int32)
    return manager.run(go_on, handles, first, extends=True), logits


def programs_on(state):
    """What a manager runs on a pool, each lowered for a state."""
    ids, block_id, count = np.arange(4, dtype=np.int32), np.int32(2), np.int32(3)
    rows = transfer.export_blocks(state.pool, ids).chunks[0]
    source, target = TokenFormat.Native, TokenFormat.Int8
    method = CompressionMethod(scorer="key_difference", fit_steps=2)
    plan = rewrite.Rewrite(
        source=source, target=target, max_source_blocks=4, max_target_blocks=2, method=method
    )
    packed = enable_formats(state, [target])
    queries = rewrite.sample_queries(packed, np.int32(0), plan)
    return {
        "free": programs.free_rows.lower(state, ids, scrub=True),
        "release": programs.release_blocks.lower(state, (ids,), scrub=True),
        "attach": programs.attach_seq.lower(state, block_id, ids[None], ids[:1], ids[:3], None),
        "commit": programs.commit_seq.lower(state, block_id, count, ids[None], (ids,), scrub=True),
        "share": programs.share_seq.lower(state, (block_id, count), count, count, ids[None]),
        "erase": programs.erase_blocks.lower(state, (ids,)),
        "copy blocks": storage._copy_blocks.lower(state.pool, ids, ids + 4),
        "move": programs.move_blocks.lower(state, (ids,), (ids + 4,), scrub=True),
        "bring back": transfer._scatter_blocks.lower(state.pool, ids, dict(rows)),
        "compress": jax.jit(rewrite.compress_rows, static_argnums=(1, 4), donate_argnums=0).lower(
            packed, ((0, 0),), count, [queries], plan
        ),
    }


def test_programs_over_a_mesh_update_the_pool_in_place_and_exchange_no_tokens(mesh):
    spec = tiny_spec(num_kv_heads=4, head_dim=8)
    state = init_sharded(spec, mesh, "tp")
    local_bytes = 2 * keys(state.pool).addressable_shards[0].data.nbytes
    for name, lowered in programs_on(state).items():
        program = lowered.compile()
        assert program.memory_analysis().alias_size_in_bytes >= local_bytes, name
        lines = [line for line in program.as_text().splitlines() if re.search(EXCHANGE, line)]
        # A loss is that of all heads.
        assert name == "compress" or not lines, name
        assert all(re.match(r"\s*\S+ = \(?f32\[\]", line) for line in lines), lines


@pytest.mark.slow  # The same model over the same mesh generates in `test_pool_over_mesh.py`.
def test_generate_through_a_manager_over_a_mesh_equals_one_device(mesh):
    geometry = {"max_seqs": 5, "max_sequence_length": 16}
    sizes = {"geometry": geometry, "block_size": 4, "max_blocks": 12}  # As of the model's own spec.
    want, want_logits = decode(manager_over(None, **sizes))
    manager = manager_over(mesh, **sizes)
    tokens, logits = decode(manager)
    assert tokens.tolist() == want.tolist()
    np.testing.assert_allclose(logits, want_logits, rtol=1e-5, atol=1e-5)
    assert manager.get_handle(0).num_tokens() == len(sharded_llama.PROMPTS[0]) + 6
    check_lies_over_the_mesh(manager)


def test_a_mesh_without_the_target_device_is_refused():
    pair = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="target_devices begins with cpu:2.*cpu:0, cpu:1"):
        manager_over(pair)


def test_a_mesh_of_several_processes_is_refused(mesh, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ValueError, match="spans several processes.*init_sharded"):
        manager_over(mesh)


def test_axis_name_and_num_kv_heads_must_fit_the_mesh(mesh):
    with pytest.raises(ValueError, match="axis_name 'heads'"):
        manager_over(mesh, axis_name="heads")
    with pytest.raises(ValueError, match="num_kv_heads"):
        manager_over(mesh, geometry={"num_kv_heads": 6})
    with pytest.raises(ValueError, match="mesh must be a Mesh"):
        manager_over("tp")


def test_a_multi_device_manager_refuses_a_mesh(mesh):
    with pytest.raises(ValueError, match="mesh is for one pool"):
        make_multi(mesh=mesh)
