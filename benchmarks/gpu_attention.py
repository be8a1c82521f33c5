"""One decoding step of attention on a GPU: our kernel against others, as parts of a plain copy.

Run `python -m benchmarks.gpu_attention --json FILE`: all shapes in one run of less than ten
minutes. `--tune` tries tile sizes instead and prints the best for each shape. Every figure is of
many calls inside one program, each of which depends on the last one's result and reads other keys.
Bytes a second are those of the keys and values as they are stored, scales included.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_contestants import HEADS, Case, contestants, inputs_of, paged
from benchmarks.harness import (
    make_parser,
    print_table,
    progress,
    run,
    say,
    summarize,
    time_interleaved,
)
from ferrum_jax.attention.gpu import gpu_attention
from ferrum_jax.attention.gpu_tuning import Tiling, tiling_for
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.types import TokenFormat

_COMPRESSED = (TokenFormat.Int8.name,)
_REPEATS = 10


def copy_bandwidth(small: bool) -> float:
    """Returns bytes a second, read and written together, of copying 2 GiB (or 2 MiB)."""
    x = jnp.zeros((1 << (19 if small else 29),), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    seconds = time_interleaved({"copy": lambda: copy(x)}, _REPEATS)["copy"]
    return 2 * x.size * x.dtype.itemsize / float(np.median(seconds))


def measure(case: Case, build: Callable[[Case], Callable[[], Any]]) -> dict[str, Any]:
    """Times one contestant, or says why it could not run."""
    try:
        function = build(case)
        seconds = time_interleaved({"it": function}, _REPEATS, warmups=1)["it"]
    except Exception as error:  # Others' kernels fail in ways of their own; the run goes on.
        lines = str(error).strip().splitlines() or [""]
        return {"microseconds": None, "failed": f"{type(error).__name__}: {lines[0][:90]}"}
    calls = case.copies * case.loops
    figure = summarize(seconds)
    return {
        "microseconds": figure["median_ms"] * 1e3 / calls,
        "min_microseconds": figure["min_ms"] * 1e3 / calls,
        "gigabytes_per_second": case.live_bytes * calls / figure["median_ms"] / 1e6,
    }


def difference(case: Case, interpret: bool) -> float:
    """Returns the largest difference between our kernel and the XLA one, on one call."""
    inputs, token_format = inputs_of(case), TokenFormat[case.token_format]
    ours = gpu_attention(inputs, token_format, interpret=interpret).astype(jnp.float32)
    return float(jnp.max(jnp.abs(ours - xla_attention(inputs, token_format).astype(jnp.float32))))


def compare(case: Case, interpret: bool, copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """Times all contestants on one case, and ours on compressed tokens, for a figure of each."""
    (ours, kernel), *others = contestants(interpret).items()
    packed = [dataclasses.replace(case, token_format=name) for name in _COMPRESSED]
    runs = [(ours, kernel, case)]
    runs += [(f"{ours}, {other.token_format}", kernel, other) for other in packed]
    runs += [(name, build, case) for name, build in others]
    figures = []
    for name, build, its_case in runs:
        figure = {**dataclasses.asdict(its_case), "contestant": name, **measure(its_case, build)}
        if "gigabytes_per_second" in figure:
            figure["of_copy"] = figure["gigabytes_per_second"] * 1e9 / copy_bytes_per_second
        if build is kernel:
            figure["difference_from_xla"] = difference(its_case, interpret)
        figures.append(figure)
    return figures


def tilings(case: Case) -> Iterator[Tiling]:
    """Yields the tiling in use, and then others."""
    inputs = jax.eval_shape(lambda: inputs_of(case))
    used = tiling_for(inputs, TokenFormat[case.token_format])
    yield used
    for tokens, warps, stages in itertools.product((32, 64, 128), (4, 8), (3, 5, 7)):
        yield dataclasses.replace(used, tile_tokens=tokens, num_warps=warps, num_stages=stages)
    for num_splits in (used.num_splits // 4, used.num_splits // 2, used.num_splits * 2):
        if num_splits > 0:
            yield dataclasses.replace(used, num_splits=num_splits)


def tune(case: Case, interpret: bool, copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """Times our kernel with every tiling; the one in use comes first, then the best first."""
    figures = []
    for tiling in dict.fromkeys(tilings(case)):
        kernel = functools.partial(gpu_attention, tiling=tiling, interpret=interpret)
        figure = measure(case, functools.partial(paged, kernel=kernel))
        if "gigabytes_per_second" in figure:
            figure["of_copy"] = figure["gigabytes_per_second"] * 1e9 / copy_bytes_per_second
        figures.append({**dataclasses.asdict(case), **dataclasses.asdict(tiling), **figure})
    figures[1:] = sorted(figures[1:], key=lambda figure: figure["microseconds"] or float("inf"))
    return figures


def show(figures: Sequence[dict[str, Any]], hidden: Sequence[str] = ()) -> None:
    """Prints figures as a table; what some of them lack is left empty."""
    columns = [c for c in dict.fromkeys(itertools.chain(*figures)) if c not in hidden]
    print_table(columns, [[figure.get(column, "") for column in columns] for figure in figures])
    say()


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yields the shapes asked for, the most telling first."""
    if args.interpret:
        yield Case(heads="9/3/64", rows=2, context=40)
        return
    rows, contexts = (
        ((16, 64), (8192,))
        if args.quick or args.tune
        else (
            (16, 64, 1, 256),
            (8192, 1024, 32768),
        )
    )
    for context, num_rows, heads in itertools.product(contexts, rows, HEADS):
        case = Case(heads=heads, rows=num_rows, context=context)
        yield case
        if args.tune:  # `compare` adds them itself.
            yield from (dataclasses.replace(case, token_format=name) for name in _COMPRESSED)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Times every shape, prints a table of each, and returns all figures."""
    if jax.default_backend() != "gpu" and not args.interpret:
        raise SystemExit(
            f"There is no GPU here, only {jax.devices()}. --interpret tries the script."
        )
    start = time.monotonic()
    copied = [copy_bandwidth(args.interpret)]
    say(f"copying moves {copied[0] / 1e9:.0f} GB/s, read and written\n")
    figures = []
    for case in progress(cases(args), "shape"):
        if time.monotonic() - start > args.limit_seconds:
            say(f"Out of time before {case}: see --limit-seconds.")
            break
        part = (tune if args.tune else compare)(case, args.interpret, copied[0])
        hidden = ("min_microseconds",) if args.tune else ("min_microseconds", "token_format")
        show(part[:5] if args.tune else part, hidden)
        figures += part
    copied.append(copy_bandwidth(args.interpret))
    say(f"copying still moves {copied[1] / 1e9:.0f} GB/s; {time.monotonic() - start:.0f} s in all")
    return {"copy_bytes_per_second": copied, "figures": figures}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("gpu_attention", __doc__, quick="two batches of one context")
    parser.add_argument("--tune", action="store_true", help="try tile sizes instead")
    parser.add_argument("--interpret", action="store_true", help="test this script without a GPU")
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="start no shape after")
    run(parser, measure_all, argv)


if __name__ == "__main__":
    main()
