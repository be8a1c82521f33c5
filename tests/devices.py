"""Processes with a number of CPU devices of their own: JAX must be told before it starts."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def environment(num_devices: int) -> dict[str, str]:
    """The environment of a process that has so many CPU devices."""
    flags = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    )
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run_cases(name: str, num_devices: int) -> None:
    """Runs the tests of `tests/<name>.py` on so many devices; fails with what they print."""
    cases = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}.py"],
        env=environment(num_devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert cases.returncode == 0, cases.stdout + cases.stderr
