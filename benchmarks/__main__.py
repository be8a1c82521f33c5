"""Lists the benchmarks, runs one or all of them, and draws what they wrote.

python -m benchmarks                      lists them
python -m benchmarks NAME [options]       runs one
python -m benchmarks all [--quick]        runs all that fit this machine
python -m benchmarks plot FILE.json ...   draws stored runs
python -m benchmarks page                 updates docs/benchmarks.md from benchmarks/results
"""

import argparse
import dataclasses
import importlib
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks import page, plots
from benchmarks.catalogue import CATALOGUE
from benchmarks.harness import ROOT, print_table, read_report

_ASK_DEVICE = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A run of one benchmark, or why there is none.

    Attributes:
      stem: Name of its files, without the suffix.
      name: The benchmark.
      options: Options of its command line.
      why_not: Why it is left out; None if it is run.
    """

    stem: str
    name: str
    options: Sequence[str]
    why_not: str | None


def plan(device: tuple[str, str], trace: pathlib.Path | None, *, quick: bool) -> Iterator[Step]:
    """Yields every run that belongs to `all`, and those that this machine cannot make.

    Args:
      device: JAX's platform and its name for the device.
      trace: A trace of requests, if there is one.
      quick: Whether the runs are short.
    """
    platform, kind = device
    where = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    for name, entry in CATALOGUE.items():
        why_not = entry.why_not(platform, trace)
        for ending, options in entry.runs.items():
            asked = [*options, *(["--quick"] if quick else [])]
            if entry.needs_trace:
                asked += ["--trace", str(trace)]
            yield Step(stem=f"{name}-{where}{ending}", name=name, options=asked, why_not=why_not)


def run_all(argv: Sequence[str]) -> int:
    """Runs all benchmarks that fit this machine, each in a process of its own.

    Args:
      argv: Arguments of `all`.

    Returns:
      The exit status: 1 if one of them failed.
    """
    args = _parse_all(argv)
    folder = page.RESULTS if args.refresh else args.out or pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Figures go to {folder}.", flush=True)
    trace = args.trace and args.trace.resolve()
    outcomes: list[tuple[str, str]] = []
    for step in plan(_device(), trace, quick=args.quick):
        outcome = _run_step(step, folder.resolve(), draws=not args.refresh)
        outcomes.append((step.stem if step.why_not is None else step.name, outcome))
    print()
    print_table(("benchmark", "outcome"), outcomes)
    if args.refresh:
        refresh_page([])
    return int(any(outcome.startswith("failed") for _, outcome in outcomes))


def draw(argv: Sequence[str]) -> int:
    """Draws stored runs, each into a PNG beside its JSON file.

    Args:
      argv: Arguments of `plot`.

    Returns:
      The exit status.
    """
    parser = _make_parser("plot", draw)
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE.json")
    for path in parser.parse_args(argv).files:
        _require_matplotlib(parser)
        try:
            plots.save(read_report(path), path.with_suffix(".png"))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print(path.with_suffix(".png"))
    return 0


def refresh_page(argv: Sequence[str]) -> int:
    """Redraws the pictures and rewrites the tables of docs/benchmarks.md.

    Args:
      argv: Arguments of `page`; there are none.

    Returns:
      The exit status.
    """
    parser = _make_parser("page", refresh_page)
    parser.parse_args(argv)
    _require_matplotlib(parser)
    for path in page.refresh():
        print(path)
    return 0


def print_list(argv: Sequence[str]) -> int:
    """Lists the benchmarks and the other commands.

    Args:
      argv: Ignored.

    Returns:
      The exit status.
    """
    del argv
    print_table(
        ("benchmark", "what it asks", "takes, on two cores"),
        [(name, entry.asks, entry.takes) for name, entry in CATALOGUE.items()],
    )
    print(f"\n{__doc__}")
    return 0


_COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "list": print_list,
    "all": run_all,
    "plot": draw,
    "page": refresh_page,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: Arguments; those of the process if absent.

    Returns:
      The exit status.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["list"]
    if name in ("-h", "--help"):
        name = "list"
    if name in _COMMANDS:
        return _COMMANDS[name](rest)
    if name in CATALOGUE:
        importlib.import_module(f"benchmarks.{name}").main(rest)
        return 0
    names = ", ".join((*CATALOGUE, *_COMMANDS))
    print(f"There is no benchmark {name!r}. There are: {names}.", file=sys.stderr)
    return 2


def _make_parser(name: str, command: Callable[..., int]) -> argparse.ArgumentParser:
    summary = (command.__doc__ or "").partition("\n")[0]
    return argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=summary)


def _parse_all(argv: Sequence[str]) -> argparse.Namespace:
    parser = _make_parser("all", run_all)
    parser.add_argument("--quick", action="store_true", help="short runs, to check that they work")
    parser.add_argument("--trace", type=pathlib.Path, metavar="FILE", help="replay it, too")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="for JSON and PNG files (default: a new one)",
    )
    where.add_argument(
        "--refresh",
        action="store_true",
        help="keep the figures in benchmarks/results, and update docs/benchmarks.md",
    )
    args = parser.parse_args(argv)
    if args.quick and args.refresh:
        parser.error("--quick runs are not kept: --refresh takes whole ones.")
    if args.refresh:
        _require_matplotlib(parser)
    return args


def _require_matplotlib(parser: argparse.ArgumentParser) -> None:
    if not plots.is_available():
        parser.error(plots.MISSING)


def _device() -> tuple[str, str]:
    """Asks another process, since a process that uses a GPU takes its memory."""
    command = [sys.executable, "-c", _ASK_DEVICE]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    platform, kind = output.strip().split(maxsplit=1)
    return platform, kind


def _run_step(step: Step, folder: pathlib.Path, *, draws: bool) -> str:
    """Runs a benchmark, which writes its figures and may draw them; returns how it went."""
    if step.why_not is not None:
        print(f"\n== {step.name} is left out: {step.why_not}", flush=True)
        return f"left out: {step.why_not}"
    files = ["--json", str(folder / f"{step.stem}.json")]
    if draws and plots.is_available():
        files += ["--plot", str(folder / f"{step.stem}.png")]
    print(f"\n== python -m benchmarks {step.name} {' '.join(step.options)}", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "benchmarks", step.name, *step.options, *files]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status != 0:
        return f"failed with status {status}"
    return f"{time.monotonic() - start:.0f} seconds"


if __name__ == "__main__":
    sys.exit(main())
