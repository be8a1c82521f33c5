"""Hit rate of each block policy on a trace of requests, beside the optimum.

It is what `python -m ferrum_jax.replay` does, which has more options, told as a benchmark. The
yardstick is a cache that knows the future. A trace is a file in Mooncake's format, for one its
`conversation_trace.jsonl` (github.com/kvcache-ai/Mooncake, FAST25-release/traces).
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import make_parser, progress, run, say
from ferrum_jax.policies.blocks import block_policy_names
from ferrum_jax.replay import format_table, read_trace, replay_all

_QUICK_REQUESTS = 1000


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Replays the trace with each policy at each capacity, and prints the hit rates."""
    try:
        trace = read_trace(args.trace)
    except (OSError, ValueError) as error:
        raise SystemExit(f"replay: {error}") from error
    if args.quick:
        trace = trace[:_QUICK_REQUESTS]
    num_blocks = sum(len(request.hash_ids) for request in trace)
    say(f"{len(trace):,} requests, {num_blocks:,} blocks; blocks found, in %:")
    hit_rates = replay_all(
        trace,
        {policy: policy for policy in block_policy_names()},
        args.capacity,
        progress=functools.partial(progress, unit="replay"),
    )
    say(format_table(hit_rates, args.capacity))
    return {
        "trace": args.trace.name,
        "num_requests": len(trace),
        "num_blocks": num_blocks,
        "capacities": args.capacity,
        "hit_rates": hit_rates,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("replay", __doc__, quick=f"the first {_QUICK_REQUESTS:,} requests")
    parser.add_argument(
        "--trace", type=pathlib.Path, metavar="FILE", required=True, help="a file of JSON lines"
    )
    parser.add_argument(
        "--capacity",
        type=int,
        nargs="+",
        default=[1000, 3000, 10_000, 30_000],
        help="blocks of the pool (default: %(default)s)",
    )
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
