"""One decoding step of attention on a GPU: our kernel against others, as parts of a plain copy.

Run `XLA_PYTHON_CLIENT_MEM_FRACTION=.7 python -m benchmarks.gpu_attention --json FILE`. Of the 80 GB
of an H100 that leaves JAX 55 GiB, and a dense cache takes up to 32; PyTorch, whose keys lie in
JAX's memory, gets by with the rest. All shapes are gone over twice, first with our kernel alone, in
less than ten minutes; after every shape FILE holds all figures so far. `--tune` tries tile sizes
instead and prints the best for each shape.

Every figure is of many calls, each of which depends on the last one's result and reads other keys.
A program or a CUDA graph holds a hundred of them, or as many as read 1.2 GB. Bytes a second are
those of the keys and values as they are stored, scales included.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_contestants import (
    HEADS,
    Builder,
    Case,
    call_of,
    contestants,
    free_memory,
    paged,
)
from benchmarks.harness import make_parser, print_table, progress, run, say, summarize
from ferrum_jax.attention import gpu, xla
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.gpu.tuning import Tiling, tiling_for
from ferrum_jax.types import TokenFormat

_COMPRESSED = (TokenFormat.Int8.name,)
_CONTEXTS = (8192, 1024, 32768)
_ROWS = (16, 64, 1, 256)
_REPEATS = 10
_MIN_REPEATS = 3
_SECONDS = 1.0  # Of a contestant on a shape.
_SAMPLE_SECONDS = 0.02  # So long, the host's start and end of it do not count.
_LAUNCH_SECONDS = {"in one program": 10e-6, "in one graph": 10e-6}
_EAGER_LAUNCH_SECONDS = 50e-6
_CHECKED_ROWS = 4
_CHECKED_BLOCKS = max(_CONTEXTS) // 16
_CHECKED_SCALE = 16
_NO_MEMORY = "out of memory"


class Trial(NamedTuple):
    """Something to time.

    Attributes:
      label: What it is, as columns of its figure.
      case: On what.
      build: Makes it ready.
      is_checked: Whether our kernel's result is held against the XLA one's.
    """

    label: Mapping[str, Any]
    case: Case
    build: Builder
    is_checked: bool = False


@jax.jit
def _copied(x: jax.Array) -> jax.Array:
    return x + 1.0


def copy_bandwidth(small: bool) -> float:
    """Returns bytes a second, read and written together, of copying 2 GiB (or 2 MiB)."""
    free_memory()
    x = jnp.zeros((1 << (19 if small else 29),), jnp.float32)

    def run(times):
        out = x
        for _ in range(times):
            out = _copied(x)
        jax.block_until_ready(out)

    run(1)
    return 2 * x.nbytes / float(np.median(sampled(run)))


def sampled(run: Callable[[int], None]) -> list[float]:
    """Times a program, in about a second: the longer it takes, the fewer times it runs.

    Args:
      run: Runs it a given number of times.

    Returns:
      Seconds of a run, each a sample of several; of one alone, if that takes longer than a second.
    """

    def seconds(times):
        start = time.perf_counter()
        run(times)
        return (time.perf_counter() - start) / times

    first = seconds(1)
    if first > _SECONDS:
        return [first]
    second = seconds(1)  # The first has brought the kernels onto the device.
    times = max(1, int(_SAMPLE_SECONDS / second))
    repeats = int(_SECONDS / (times * second))
    return [seconds(times) for _ in range(max(_MIN_REPEATS, min(_REPEATS, repeats)))]


def attempt(measure: Callable[[], dict[str, Any]], failed: str) -> dict[str, Any]:
    """Returns figures, or why there are none under the name `failed`."""
    try:
        return measure()
    except Exception as error:  # Others' kernels fail in ways of their own; the run goes on.
        lines = str(error).strip().splitlines() or [""]
        return {failed: f"{type(error).__name__}: {lines[0][:90]}"}


def measure(case: Case, build: Builder, copied: Sequence[float]) -> dict[str, Any]:
    """Times one contestant, against the last of some copies' bytes a second."""
    free_memory()
    contestant = build(case)
    seconds = sampled(contestant.run)
    calls = case.copies * case.loops
    figure = summarize(seconds)
    gigabytes_per_second = case.live_bytes * calls / figure["median_ms"] / 1e6
    figures = {
        "microseconds": figure["median_ms"] * 1e3 / calls,
        "min_microseconds": figure["min_ms"] * 1e3 / calls,
        "repeats": len(seconds),
        "launched": contestant.launched,
        "gigabytes_per_second": gigabytes_per_second,
    }
    if copied:
        launch_seconds = _LAUNCH_SECONDS.get(contestant.launched, _EAGER_LAUNCH_SECONDS)
        figures["of_copy"] = gigabytes_per_second * 1e9 / copied[-1]
        # Of so little to read, the time is that of launching kernels, and of their start and end.
        figures["is_launch_bound"] = case.live_bytes / copied[-1] < launch_seconds
    return figures


def difference(case: Case, interpret: bool) -> float:
    """Returns the largest difference between our kernel and the XLA one on a few rows of a batch.

    It is a part of the largest result. Queries are larger than the timed ones: few tokens then
    weigh most, and a wrong one among them shows.
    """
    free_memory()
    call = call_of(case)
    call = dataclasses.replace(call, q=call.q * _CHECKED_SCALE)
    rows = np.linspace(0, case.rows - 1, _CHECKED_ROWS).astype(np.int32)
    ours = gpu.attend(call, interpret=interpret)[rows].astype(jnp.float32)
    block_ids = np.zeros((_CHECKED_ROWS, _CHECKED_BLOCKS), np.int32)
    block_ids[:, : case.block_ids.shape[1]] = np.maximum(case.block_ids[rows], 0)
    want = xla.attend(_alone(call, rows, block_ids)).astype(jnp.float32)
    return float(jnp.max(jnp.abs(ours - want)) / jnp.max(jnp.abs(want)))


@jax.jit
def _alone(call: AttentionCall, rows: jax.Array, block_ids: jax.Array) -> AttentionCall:
    """Returns rows with a pool of their own, of one size: the XLA kernel is compiled for few."""
    k, v = (x[block_ids.reshape(-1), 0][:, None] for x in call.pool.payload.split(call.pool.arrays))
    return dataclasses.replace(
        call,
        q=call.q[rows],
        pool=dataclasses.replace(call.pool, arrays=call.pool.payload.join(k, v)),
        block_ids=jnp.arange(block_ids.size, dtype=jnp.int32).reshape(block_ids.shape),
        held_lens=call.held_lens[rows],
        q_lens=call.q_lens[rows],
    )


def figure_of(
    trial: Trial, earlier: Sequence[dict[str, Any]], copied: Sequence[float], interpret: bool
) -> dict[str, Any]:
    """Returns the figure of a trial, which says why if it could not run.

    Args:
      trial: The trial.
      earlier: Figures so far. What had no memory on a shape is not tried on larger ones.
      copied: Bytes a second of the copies so far.
      interpret: Whether our kernel runs without a GPU.
    """
    case, figure = trial.case, {**dataclasses.asdict(trial.case), **trial.label}
    same = figure.keys() - {"rows", "context"}
    for other in earlier:
        is_smaller = other["rows"] * other["context"] <= case.rows * case.context
        is_same = all(other.get(key) == figure[key] for key in same)
        if is_smaller and is_same and _NO_MEMORY in other.get("failed", "").lower():
            return {**figure, "failed": f"not tried: {_NO_MEMORY} on a smaller shape"}
    figure |= attempt(lambda: measure(case, trial.build, copied), "failed")
    if trial.is_checked:
        check = functools.partial(difference, case, interpret)
        figure |= attempt(lambda: {"difference_from_xla": check()}, "check_failed")
    return figure


def tilings(case: Case) -> Iterator[Tiling]:
    """Yields the tiling in use, and then others."""
    used = tiling_for(jax.eval_shape(lambda: call_of(case)))
    yield used
    for tokens, warps, stages in itertools.product((32, 64, 128), (4, 8), (3, 5, 7)):
        yield dataclasses.replace(used, tile_tokens=tokens, num_warps=warps, num_stages=stages)
    for num_splits in (used.num_splits // 4, used.num_splits // 2, used.num_splits * 2):
        if num_splits > 0:
            yield dataclasses.replace(used, num_splits=num_splits)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yields the shapes asked for, the most telling first."""
    if args.interpret:
        yield Case(heads="9/3/64", rows=2, context=40, cold_bytes=1 << 17)
        return
    few = args.quick or args.tune
    contexts, rows = (_CONTEXTS[:1], _ROWS[:2]) if few else (_CONTEXTS, _ROWS)
    for heads, context, num_rows in itertools.product(HEADS, contexts, rows):
        yield Case(heads=heads, rows=num_rows, context=context)


def rounds(args: argparse.Namespace) -> Iterator[list[Trial]]:
    """Yields what is timed on each shape: ours on all of them before anything else on any.

    A wild address in a foreign kernel ends all that comes after it in the process.
    """
    names = (TokenFormat.Native.name, *_COMPRESSED)
    ours = [
        [dataclasses.replace(case, token_format=name) for name in names] for case in cases(args)
    ]
    if args.tune:
        for case in itertools.chain.from_iterable(ours):
            kernels = {
                tiling: functools.partial(gpu.attend, tiling=tiling, interpret=args.interpret)
                for tiling in tilings(case)
            }
            yield [
                Trial(dataclasses.asdict(tiling), case, functools.partial(paged, kernel=kernel))
                for tiling, kernel in kernels.items()
            ]
        return
    (name, build), *others = contestants(args.interpret).items()
    labels = [name, *(f"{name}, {other}" for other in _COMPRESSED)]
    for formats in ours:
        named = zip(labels, formats, strict=True)
        yield [Trial({"contestant": label}, case, build, is_checked=True) for label, case in named]
    for native, *_ in ours:
        yield [Trial({"contestant": other}, native, build) for other, build in others]


def show(figures: Sequence[dict[str, Any]], hidden: Sequence[str]) -> None:
    """Prints figures as a table; what some of them lack is left empty."""
    columns = [c for c in dict.fromkeys(itertools.chain(*figures)) if c not in hidden]
    print_table(columns, [[figure.get(column, "") for column in columns] for figure in figures])
    say()


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times every shape and prints a table of each; yields all figures so far after each."""
    if jax.default_backend() != "gpu" and not args.interpret:
        raise SystemExit(
            f"There is no GPU here, only {jax.devices()}. --interpret tries the script."
        )
    start = time.monotonic()
    in_time = functools.partial(
        itertools.takewhile, lambda _: time.monotonic() - start < args.limit_seconds
    )
    hidden = ("cold_bytes", "min_microseconds", *(() if args.tune else ("token_format",)))
    copied: list[float] = []
    figures: list[dict[str, Any]] = []
    for trials in in_time(progress(rounds(args), "shape")):
        copy = attempt(lambda: {"copy": copy_bandwidth(args.interpret)}, "failed")
        copied += [copy["copy"]] if "copy" in copy else []
        part = []
        for trial in in_time(trials):
            part.append(figure_of(trial, figures, copied, args.interpret))
        if args.tune:  # The tiling in use comes first, then the best.
            part[1:] = sorted(part[1:], key=lambda it: it.get("microseconds", float("inf")))
        figures += part
        say(f"copying: {copy.get('failed') or f'{copied[-1] / 1e9:.0f} GB/s, read and written'}")
        show(part[:5] if args.tune else part, hidden)
        yield {"copy_bytes_per_second": copied, "figures": figures}
    seconds = time.monotonic() - start
    end = "all is measured" if seconds < args.limit_seconds else "out of time: see --limit-seconds"
    say(f"{seconds:.0f} s, {end}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("gpu_attention", __doc__, quick="two batches of one context")
    parser.add_argument("--tune", action="store_true", help="try tile sizes instead")
    parser.add_argument("--interpret", action="store_true", help="test this script without a GPU")
    help = "start nothing after, neither a shape nor a contestant"
    parser.add_argument("--limit-seconds", type=float, default=540.0, metavar="SECONDS", help=help)
    run(parser, measure_all, argv)


if __name__ == "__main__":
    main()
