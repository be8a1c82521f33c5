"""Processes of their own, for what JAX must be told before it starts: devices, a compiler."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def environment(num_devices: int) -> dict[str, str]:
    """The environment of a process that has so many CPU devices.

    Its programs move bytes and are small: the time goes into compiling them.
    """
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
        " --xla_backend_optimization_level=0"
    )
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run_cases(name: str, num_devices: int) -> None:
    """Runs `tests/multi_device/<name>.py` on so many devices; fails with what it prints."""
    cases = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"tests/multi_device/{name}.py",
        ],
        env=environment(num_devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert cases.returncode == 0, cases.stdout + cases.stderr


def compile_for_tpu(program: str, num_programs: int) -> None:
    """Runs a program that compiles for a TPU which need not be there; skips without libtpu.

    Args:
      program: Python code; it prints a line that begins with "compiled" for each that it compiled.
      num_programs: How many it is to compile.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU without one needs libtpu: pip install 'jax[tpu]'")
    # It may be loaded beside another process's, for here nobody uses a TPU.
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
