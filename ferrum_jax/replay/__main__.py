"""Replays a trace of requests through the prefix cache; prints each block policy's hit rate.

    python -m ferrum_jax.replay TRACE.jsonl --capacity 1000 10000 --policy lru arc --plot hits.png

A trace is a file of JSON lines in the format of Mooncake: each has `timestamp` (milliseconds) and
`hash_ids`, the blocks of the prompt in order; each id stands for all tokens up to the block's end.
Other fields of a line (`input_length`, `output_length`) are ignored.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence

from ferrum_jax.checks import INT32_LIMIT, check_count, check_writable, writing
from ferrum_jax.policies.blocks import block_policy_names, make_block_policy
from ferrum_jax.replay.traces import OPTIMUM, format_table, read_trace, replay_all


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: Arguments; those of the process if absent.
    """
    parser = _make_parser()
    args = parser.parse_args(argv)
    try:
        _check_before_work(args)
        policies = args.policy or block_policy_names()
        for policy in policies:
            make_block_policy(policy, 1)
        trace = read_trace(args.trace)[: args.limit]
        if args.skip >= len(trace):
            raise ValueError(f"--skip {args.skip} leaves none of {len(trace)} requests to count.")
        num_blocks = sum(len(request.hash_ids) for request in trace)
        print(f"{len(trace):,} requests, {num_blocks:,} blocks; blocks found, in %:")
        hit_rates = replay_all(
            trace,
            {policy: policy for policy in policies},
            args.capacity,
            num_skipped=args.skip,
            progress=_show_progress,
        )
        print(format_table(hit_rates, args.capacity))
        if args.json is not None:
            report = {
                "trace": args.trace.name,
                "num_requests": len(trace),
                "num_skipped": args.skip,
                "num_blocks": num_blocks,
                "capacities": args.capacity,
                "hit_rates": hit_rates,
            }
            with writing("--json", args.json):
                args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if args.plot is not None:
            with writing("--plot", args.plot):
                _plot(hit_rates, args.capacity, args.plot)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(2, f"replay: {' '.join(str(error).split())}\n")


def _check_before_work(args: argparse.Namespace) -> None:
    """Checks the options that would fail only after the work, and imports modules."""
    for capacity in args.capacity:
        check_count("capacity", capacity, limit=INT32_LIMIT)
    check_count("limit", 1 if args.limit is None else args.limit, limit=INT32_LIMIT)
    check_count("skip", args.skip, minimum=0, limit=INT32_LIMIT)
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            check_writable(name, path)
    if args.plot is not None:
        # A missing package is reported before the work, too.
        formats = _import_figure().Figure().canvas.get_supported_filetypes()
        suffix = args.plot.suffix[1:].lower()
        if suffix and suffix not in formats:
            raise ValueError(
                f"--plot {args.plot} has no known format; known are {', '.join(sorted(formats))}."
            )
    for module in args.imports:
        try:
            importlib.import_module(module)
        except Exception as error:  # A user's module may raise anything.
            raise ImportError(
                f"--import {module} fails: {type(error).__name__}: {error}"
            ) from error


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Also for an integer of thousands of digits.
        raise argparse.ArgumentTypeError(f"must be an integer, got {text[:40]!r}") from None


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ferrum_jax.replay",
        description="Replays a trace of requests through the prefix cache.",
    )
    parser.add_argument("trace", type=pathlib.Path, help="a file of JSON lines")
    parser.add_argument(
        "--capacity",
        type=_integer,
        nargs="+",
        default=[1000, 3000, 10_000, 30_000],
        help="blocks of the pool (default: %(default)s)",
    )
    parser.add_argument(
        "--policy", nargs="+", metavar="NAME", help="block policies (default: all known ones)"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules to import first, which register policies",
    )
    parser.add_argument("--limit", type=_integer, help="replay the first LIMIT requests only")
    parser.add_argument(
        "--skip",
        type=_integer,
        default=0,
        help="do not count the first SKIP requests, which fill the cache",
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the hit rates")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the hit rates")
    return parser


def _show_progress(runs: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Shows the progress on stderr: as a bar if tqdm is installed, else in numbers."""
    try:
        import tqdm
    except ImportError:
        for i, run in enumerate(runs):
            print(f"\r{i}/{len(runs)} runs", end="", file=sys.stderr, flush=True)
            yield run
        print(f"\r{len(runs)}/{len(runs)} runs", file=sys.stderr)
    else:
        yield from tqdm.tqdm(runs, unit="run")


def _import_figure() -> types.ModuleType:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "--plot draws with matplotlib, which is not installed: pip install matplotlib."
        ) from error


def _plot(
    hit_rates: Mapping[str, Sequence[float]], capacities: Sequence[int], path: pathlib.Path
) -> None:
    """Draws hit rate against capacity."""
    figure = _import_figure().Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in hit_rates.items():
        style = "k--" if name == OPTIMUM else "o-"
        axes.plot(capacities, [100 * rate for rate in row], style, label=name)
    axes.set(xscale="log", xlabel="capacity (blocks)", ylabel="blocks found (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
