"""New processes, for what must be set before JAX starts: devices, or a compiler for TPU."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


def environment(num_devices: int) -> dict[str, str]:
    """Returns the environment of a new process with `num_devices` CPU devices."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Its programs are small: compiling takes longest.
        "PYTHONPATH": str(ROOT),
    }


def compile_for_tpu(program: str, num_programs: int) -> None:
    """Compiles programs for a TPU in a new process; no TPU is needed. Skips without libtpu.

    Args:
      program: Python code; prints a line that begins with "compiled" for each compiled program.
      num_programs: Expected number of these lines.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU without one needs libtpu: pip install 'jax[tpu]'")
    # Several processes may load libtpu at once, because none uses a TPU.
    without_tpu = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **without_tpu},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("compiled") == num_programs
