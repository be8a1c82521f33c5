"""What all benchmarks share: fair timing, a table, and a file that says where figures come from."""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "vllm")


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warmups: int = 2
) -> dict[str, list[float]]:
    """Times functions in turn, so that a neighbour's load falls on all of them alike.

    Args:
      functions: What to time, by name. JAX results are waited for.
      repeats: Timed calls of each.
      warmups: Calls of each before, which compile and fill caches.

    Returns:
      Seconds of each call, by name.

    Example:
      >>> times = time_interleaved({"nothing": lambda: None}, repeats=3)
      >>> len(times["nothing"])
      3
    """
    for function in functions.values():
        for _ in range(warmups):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            # The call before may still be giving its memory back: let this one follow itself.
            # Without it a dense cache after a gather of everything took 6.2 instead of 2.1 ms.
            jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """Returns the median and the least of some times, in milliseconds."""
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "min_ms": min(seconds) * 1e3,
    }


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows in columns: text to the left, numbers to the right with three digits."""
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    is_number = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))]
    for line in (list(headers), ["-" * width for width in widths], *cells):
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        )
        print("  ".join(padded).rstrip())


def environment() -> dict[str, Any]:
    """Returns what a reader must know of the machine and of its software."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "num_cpus": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_json(path: str | os.PathLike[str], figures: Any, started: Mapping[str, Any]) -> None:
    """Writes figures with the environment they were taken in.

    Args:
      path: File to write.
      figures: Anything JSON can hold.
      started: `environment()` from before the first timing, for its load average.
    """
    report = {
        "environment": {**environment(), "load_average_before": started["load_average"]},
        "figures": figures,
    }
    pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
