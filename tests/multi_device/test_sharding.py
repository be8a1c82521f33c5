"""One pool over several devices, and over several processes."""

import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ferrum_jax as fj
from tests.support import sharded_llama
from tests.support.caches import num_compilations, tiny_spec
from tests.support.devices import ROOT, environment, run_cases


@pytest.mark.parametrize("name", ["sharding_cases", "mesh_cases"])
def test_a_pool_over_four_devices_is_as_one_on_one(name):
    run_cases(name, num_devices=4)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_program_with_parameters_on_a_mesh_is_compiled_once_for_a_cache_made_there(axis_type):
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(axis_type,))
    params = jax.device_put(np.float32(2), NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def step(params, state):
        state, ok = fj.extend(state, np.int32([0]), 1, max_new_tokens=1)
        kv = jnp.full((1, state.pool.num_kv_heads, state.pool.head_dim), params)
        return fj.CacheState(fj.write(state.pool, 0, np.int32([0]), kv, kv), state.tables), ok

    state, _ = step(params, fj.init(tiny_spec(), mesh))
    assert state.pool.k.sharding.mesh == mesh
    before = num_compilations()
    state, ok = step(params, state)
    assert bool(ok) and num_compilations() == before


@pytest.fixture(scope="module")
def processes():
    """What each of two processes says that decode together, two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.multi_device.two_processes", str(rank), port],
            env=environment(num_devices=2),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, printed, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def test_two_processes_decode_the_tokens_of_one(processes):
    logits, tokens, _ = sharded_llama.decode(*sharded_llama.model(), fj.init(sharded_llama.SPEC))
    for process in processes:
        assert process["local"] == 2
        assert process["tokens"] == tokens.tolist()
        np.testing.assert_allclose(process["logits"], logits, rtol=1e-5, atol=1e-5)


def test_processes_that_agree_are_not_accused(processes):
    for process in processes:
        assert process["said"]["after decoding"] is None
        assert process["said"]["again as one"] is None


@pytest.mark.parametrize(
    ("when", "what"),
    [
        ("after extending differently", ".seq_lens of process 1"),
        ("after allocating differently", ".block_ids of process 1"),
        ("before it happens", "['seq_ids'] of process 1"),
        ("of another length", "the structure of process 1"),
    ],
)
def test_every_process_hears_which_tables_have_diverged_and_where(processes, when, what):
    first, second = (process["said"][when] for process in processes)
    assert first is not None and first == second
    assert what in first and "of process 0 " not in first
