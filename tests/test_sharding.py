"""One pool over several devices, and over several processes."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

import ferrum_jax as fj
from tests import sharded_llama
from tests.devices import ROOT, environment, run_cases


@pytest.mark.parametrize("name", ["sharding_cases", "mesh_manager_cases"])
def test_a_pool_over_four_devices_is_as_one_on_one(name):
    run_cases(name, num_devices=4)


@pytest.fixture(scope="module")
def processes():
    """What each of two processes says that decode together, two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", str(rank), port],
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
