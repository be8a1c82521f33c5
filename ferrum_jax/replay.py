"""Replays a trace of requests through the prefix cache, to see how much each policy finds.

    python -m ferrum_jax.replay TRACE.jsonl --capacity 1000 10000 --policy lru arc --plot hits.png

A trace is a file of JSON lines in the format of Mooncake: each has `timestamp` (milliseconds) and
`hash_ids`, the blocks of the prompt in order, each id naming all tokens up to the block's end.
What else a line has (`input_length`, `output_length`) is not needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import importlib
import json
import math
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ferrum_jax.checks import INT32_LIMIT, check_count, check_writable, writing
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.policies.blocks import BlockPolicyFactory, block_policy_names, make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId

OPTIMUM = "optimum"
"""What `replay_all` calls the hit rates of `optimal_hit_rate`."""

_NEVER = sys.maxsize


@dataclasses.dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
      arrival_seconds: When it came.
      hash_ids: Its blocks; each id names all tokens up to the block's end.
    """

    arrival_seconds: float
    hash_ids: TokenIds


def read_trace(path: str | pathlib.Path) -> list[TracedRequest]:
    """Reads a trace.

    Args:
      path: A file of JSON lines in UTF-8, with or without a byte order mark.

    Returns:
      The requests in the order of the lines.

    Raises:
      ValueError: If a line is not a request, naming the line; or if there is none.
      OSError: If the file cannot be read.
    """
    trace: list[TracedRequest] = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                trace.append(_read_request(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"Line {number} of {path} is not a request ({error!r:.200}). It needs a "
                    '"timestamp" in milliseconds and a list of "hash_ids".'
                ) from error
    if not any(request.hash_ids for request in trace):
        raise ValueError(f"{path} has no request with blocks.")
    return trace


def _read_request(line: str) -> TracedRequest:
    record = json.loads(line)
    seconds = float(record["timestamp"]) / 1000
    if not math.isfinite(seconds):
        raise ValueError(f'"timestamp" must be finite, got {record["timestamp"]!r}')
    return TracedRequest(seconds, TokenIds(record["hash_ids"]))


def replay(
    trace: Sequence[TracedRequest],
    policy: str | BlockPolicyFactory,
    capacity: int,
    *,
    num_skipped: int = 0,
) -> float:
    """Sends a trace through a prefix cache, one request after the other.

    A request looks up its blocks, holds what it finds, lets others go where room is short, caches
    the rest and ends, as in the manager; only the pool is missing.

    Args:
      trace: Requests in the order in which they came.
      policy: A block policy's name, or what makes one.
      capacity: Blocks of the pool. Of a longer request the beginning is cached.
      num_skipped: Requests at the beginning that fill the cache, and do not count.

    Returns:
      Blocks found over blocks asked for.

    Example:
      >>> trace = [TracedRequest(float(i), TokenIds([1, 2, 3 + i])) for i in range(2)]
      >>> replay(trace, "lru", capacity=8)
      0.3333333333333333
    """
    check_count("capacity", capacity)
    # A pool with room for every block of the trace never evicts: a larger one finds the same.
    capacity = min(capacity, max(1, sum(len(request.hash_ids) for request in trace)))
    cache = _make_cache(policy, capacity)
    free = list(range(capacity))
    num_found = num_asked = 0
    for i, request in enumerate(trace):
        num_hits = _serve(cache, request, free, capacity)
        if i >= num_skipped:
            num_found += num_hits
            num_asked += len(request.hash_ids)
    return num_found / max(1, num_asked)


def optimal_hit_rate(
    trace: Sequence[TracedRequest], capacity: int, *, num_skipped: int = 0
) -> float:
    """Returns what a cache could reach that knew the future.

    It drops what will be asked for last, deeper blocks first, and does not keep at all what would
    be dropped at once.

    Args:
      trace: As for `replay`.
      capacity: As for `replay`.
      num_skipped: As for `replay`.

    References:
      Belady: A study of replacement algorithms for a virtual-storage computer, IBM Systems
      Journal 5(2), 1966.
    """
    check_count("capacity", capacity)
    cached: dict[int, int] = {}  # When each block is asked for next.
    farthest: list[tuple[int, int, int]] = []
    num_found = num_asked = 0
    for i, (request, next_uses) in enumerate(zip(trace, _next_uses(trace), strict=True)):
        if i >= num_skipped:
            num_found += _num_leading(request.hash_ids, cached)
            num_asked += len(request.hash_ids)
        for index, (hash_id, next_use) in enumerate(zip(request.hash_ids, next_uses, strict=True)):
            if next_use == _NEVER:
                cached.pop(hash_id, None)
            else:
                cached[hash_id] = next_use
                heapq.heappush(farthest, (-next_use, -index, hash_id))
        while len(cached) > capacity:
            next_use, _, hash_id = heapq.heappop(farthest)
            if cached.get(hash_id) == -next_use:
                del cached[hash_id]
    return num_found / max(1, num_asked)


def replay_all(
    trace: Sequence[TracedRequest],
    policies: Mapping[str, str | BlockPolicyFactory],
    capacities: Sequence[int],
    *,
    num_skipped: int = 0,
    progress: Callable[[Sequence[tuple[str, int]]], Iterable[tuple[str, int]]] = iter,
) -> dict[str, list[float]]:
    """Replays a trace with each policy at each capacity.

    Args:
      trace: As for `replay`.
      policies: By the name to list it under, a block policy's name or what makes one.
      capacities: Blocks of the pool, one after the other.
      num_skipped: As for `replay`.
      progress: Wraps the list of what is to be run, to tell how far it is.

    Returns:
      For each policy, and for `OPTIMUM`, the hit rate at each capacity.
    """
    hit_rates: dict[str, list[float]] = {name: [] for name in (*policies, OPTIMUM)}
    for name, capacity in progress([(n, c) for n in hit_rates for c in capacities]):
        if name == OPTIMUM:
            hit_rate = optimal_hit_rate(trace, capacity, num_skipped=num_skipped)
        else:
            hit_rate = replay(trace, policies[name], capacity, num_skipped=num_skipped)
        hit_rates[name].append(hit_rate)
    return hit_rates


def format_table(hit_rates: Mapping[str, Sequence[float]], capacities: Sequence[int]) -> str:
    """Returns hit rates in percent as a table: a line for each policy, a column a capacity."""
    width = max(map(len, hit_rates))
    lines = [" " * width + "".join(f"{capacity:>10,}" for capacity in capacities)]
    for name, row in hit_rates.items():
        lines.append(f"{name:<{width}}" + "".join(f"{100 * rate:>10.2f}" for rate in row))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: Its arguments; those of the process if absent.
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
    """Refuses options that would stop the run only after its work, and imports modules."""
    for capacity in args.capacity:
        check_count("capacity", capacity, limit=INT32_LIMIT)
    check_count("limit", 1 if args.limit is None else args.limit, limit=INT32_LIMIT)
    check_count("skip", args.skip, minimum=0, limit=INT32_LIMIT)
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            check_writable(name, path)
    if args.plot is not None:
        # That the package is missing is told before the work begins, too.
        formats = _import_figure().Figure().canvas.get_supported_filetypes()
        suffix = args.plot.suffix[1:].lower()
        if suffix and suffix not in formats:
            raise ValueError(
                f"--plot {args.plot} names no known format; known are {', '.join(sorted(formats))}."
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
    except ValueError:  # Of thousands of digits, too.
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
        "--policy", nargs="+", metavar="NAME", help="block policies (default: all that are known)"
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
        help="let the first SKIP requests fill the cache uncounted",
    )
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the hit rates")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the hit rates")
    return parser


def _make_cache(policy: str | BlockPolicyFactory, capacity: int) -> PrefixCache:
    config = PrefixCacheConfig(
        max_prefixes=capacity,
        min_prefix_length=1,
        prefix_ttl_seconds=math.inf,
        enable_cross_request_sharing=True,
    )
    # A hash id stands for a block, so that a block is of one token.
    return PrefixCache(config, block_size=1, policy=make_block_policy(policy, capacity))


def _serve(cache: PrefixCache, request: TracedRequest, free: list[BlockId], capacity: int) -> int:
    """Serves one request, and returns how many of its blocks were cached."""
    now = request.arrival_seconds
    # A lookup leaves the last token to compute: here it is one that belongs to no block.
    match = cache.lookup(request.hash_ids + [0], None, now)
    lease = cache.acquire(match, None)
    kept, num_hits = request.hash_ids[:capacity], len(match.blocks)
    num_new = len(kept) - num_hits
    if num_new > len(free):
        free += cache.evict(num_new - len(free), now)
    block_ids = match.block_ids + [free.pop() for _ in range(num_new)]
    free += cache.commit(lease, kept, block_ids, now).evicted
    cache.release(lease, now)
    return num_hits


def _next_uses(trace: Sequence[TracedRequest]) -> list[list[int]]:
    """Returns for each block of each request which request asks for it next."""
    next_use: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for i in range(len(trace) - 1, -1, -1):
        next_uses.append([next_use.get(hash_id, _NEVER) for hash_id in trace[i].hash_ids])
        next_use.update(dict.fromkeys(trace[i].hash_ids, i))
    return next_uses[::-1]


def _num_leading(hash_ids: Iterable[int], cached: Mapping[int, int]) -> int:
    """Returns how many blocks are cached before the first one that is not."""
    num_hits = 0
    for hash_id in hash_ids:
        if hash_id not in cached:
            break
        num_hits += 1
    return num_hits


def _show_progress(runs: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Shows on stderr how many runs are done: as a bar if tqdm is there, or else in numbers."""
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
