"""Shared by all benchmarks: command line, interleaved timing, tables, and report files.

A benchmark has a function that measures and returns figures; `run` puts the rest around it.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from benchmarks import plots

ROOT = pathlib.Path(__file__).resolve().parent.parent
"""The checkout."""

_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "vllm", "google-tunix")
_NOT_CODE = (":!benchmarks/results", ":!docs")  # What a run may change before the next one.
_SECONDS_BETWEEN_LINES = 5.0

_Item = TypeVar("_Item")


def make_parser(name: str, doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Returns the command line that all benchmarks have; each adds options of its own.

    Args:
      name: The benchmark's module.
      doc: Docstring of the benchmark.
      quick: What `--quick` does to it.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc)
    parser.set_defaults(benchmark=name)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=_new_file, metavar="FILE.png", help="draw the figures")
    return parser


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Any],
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a benchmark from its command line.

    Args:
      parser: From `make_parser`.
      measure: Measures, prints tables, and returns figures: anything that JSON can hold. Or yields
        all that it has so far, again and again: a run that is killed leaves the last of these.
      argv: Arguments; those of the process if absent.
    """
    args = parser.parse_args(argv)
    if args.plot and not plots.is_available():
        parser.error(plots.MISSING)
    started, start = environment(), time.monotonic()
    say(f"{plots.machine(started)}, load average {started['load_average']}")
    measured, text = measure(args), ""
    for figures in measured if isinstance(measured, Iterator) else (measured,):
        seconds = {"seconds": time.monotonic() - start}
        load = {"load_average_before": started["load_average"], "load_average": load_average()}
        report = {
            "benchmark": args.benchmark,
            "options": _options(args),
            "environment": {**started, **load, **seconds},
            "figures": figures,
        }
        text = json.dumps(report, indent=2) + "\n"
        if args.json:
            _replace(args.json, text)
    if args.plot:
        plots.save(json.loads(text), args.plot)


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what a benchmark wrote.

    Args:
      path: A file that `--json` named.

    Raises:
      ValueError: If it is not a benchmark's report.
    """
    report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not {"benchmark", "environment", "figures"} <= set(report):
        raise ValueError(f"{path} is not a benchmark's report. Write one with --json.")
    return report


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warmups: int = 2
) -> dict[str, list[float]]:
    """Times functions in turn, so that other load on the machine affects all of them equally.

    Each turn has another order, so that none always follows the same one.

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
    order, dice = list(functions.items()), random.Random(0)
    for _ in progress(range(repeats), "round"):
        dice.shuffle(order)
        for name, function in order:
            # The previous call may still be freeing its memory: let this one follow itself.
            # After a gather of everything a dense cache took 6.2 instead of 2.1 ms, and a paged
            # one 8.1 instead of 2.9.
            for _ in range(2):
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


def progress(items: Iterable[_Item], unit: str) -> Iterator[_Item]:
    """Yields items and prints the progress on stderr.

    On a terminal it is a bar, if tqdm is installed; elsewhere a line every few seconds.

    Args:
      items: The items.
      unit: What an item is called.
    """
    items, tqdm = list(items), _import_tqdm()
    if tqdm is not None and sys.stderr.isatty():
        yield from tqdm.tqdm(items, unit=unit, leave=False)
        return
    said = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            print(f"{unit} {i + 1} of {len(items)}", file=sys.stderr, flush=True)
            said = time.monotonic()
        yield item


def say(text: str = "") -> None:
    """Prints text between the progress bars that may stand on the terminal."""
    tqdm = _import_tqdm()
    (print if tqdm is None else tqdm.tqdm.write)(text)
    sys.stdout.flush()


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows in columns: text to the left, numbers to the right with three digits."""
    cells = [[format_cell(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    is_number = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))]
    lines = []
    for line in (list(headers), ["-" * width for width in widths], *cells):
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    say("\n".join(lines))


def format_cell(x: Any) -> str:
    """Returns a value as tables show it: a float with three digits or, if large, whole.

    Example:
      >>> [format_cell(x) for x in (0.12345, 12345.6, 12345, "blocks", None)]
      ['0.123', '12,346', '12,345', 'blocks', '']
    """
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.3g}" if abs(x) < 999.5 else f"{x:,.0f}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def environment() -> dict[str, Any]:
    """Returns a description of the machine and of its software."""
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
        "commit": commit(),
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "load_average": load_average(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def commit(root: pathlib.Path = ROOT) -> str:
    """Returns a checkout's commit, "dirty" behind it if its code differs; or "unknown".

    Args:
      root: Its folder.
    """

    def git(*args: str) -> str:
        command = ["git", *args]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # Around a copy that is no checkout there may be one of another project.
        git("ls-files", "--error-unmatch", "benchmarks/harness.py")
        head, changes = (
            git("rev-parse", "HEAD"),
            git("status", "--porcelain", "--", ".", *_NOT_CODE),
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} dirty" if changes else head


def cpu_model() -> str:
    """Returns the processor's name, as far as the system tells it."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """Returns how many processes wanted to run, over 1, 5 and 15 minutes, if the system tells."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _new_file(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} for {text!r}")
    return path


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file at once: whenever the process ends, it holds the old text or the new one."""
    if path.exists() and not path.is_file():  # A pipe or /dev/null stays what it is.
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options a run was given; of a path, the last part."""
    options = {}
    for name, value in vars(args).items():
        if name not in ("benchmark", "json", "plot") and value is not None:
            is_path = isinstance(value, str | pathlib.Path)
            options[name] = pathlib.PurePath(value).name if is_path else value
    return options


def _import_tqdm() -> types.ModuleType | None:
    try:
        return importlib.import_module("tqdm")
    except ImportError:
        return None
