"""One pool over the devices of two processes (`jax.distributed`)."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

import ferrum_jax as fj
from tests.support import sharded_llama
from tests.support.devices import ROOT, environment

pytestmark = pytest.mark.slow  # Each process starts JAX and compiles its own programs.


@pytest.fixture(scope="module")
def processes():
    """The reports of two processes that decode together, with two devices each."""
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


def test_init_sharded_over_two_processes_decodes_the_tokens_of_one_process(processes):
    logits, tokens, _ = sharded_llama.decode(*sharded_llama.model(), fj.init(sharded_llama.SPEC))
    for process in processes:
        assert process["local"] == 2
        assert process["tokens"] == tokens.tolist()
        np.testing.assert_allclose(process["logits"], logits, rtol=1e-5, atol=1e-5)


def test_check_replicated_accepts_processes_that_agree(processes):
    for process in processes:
        assert process["said"]["after decoding"] is None
        assert process["said"]["again as one"] is None


@pytest.mark.parametrize(
    ("when", "what"),
    [
        ("after extending differently", ".held_lens of process 1"),
        ("after allocating differently", ".block_ids of process 1"),
        ("before it happens", "['seq_ids'] of process 1"),
        ("of another length", "the structure of process 1"),
    ],
)
def test_check_replicated_names_the_diverged_tables_in_every_process(processes, when, what):
    first, second = (process["said"][when] for process in processes)
    assert first is not None and first == second
    assert what in first and "of process 0 " not in first
