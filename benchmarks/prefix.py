"""Costs of finding, acquiring, caching and evicting a prefix, by the number of cached ones.

`python -m benchmarks.prefix` times the prefix cache alone: it is host work, and no device is
asked. Beside it stand an empty Python loop over the same blocks, and figures of other systems
that were measured on a machine of this kind (two cores of an AMD EPYC), not in this run.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from benchmarks.harness import make_parser, print_table, progress, run, say
from ferrum_jax.arithmetic import PerPool
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.policies.blocks import make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.tokens import TokenIds

BLOCK_SIZE, PROMPT_TOKENS, VOCABULARY = 16, 4096, 50_000
ELSEWHERE_US = {
    "SGLang 0.5.23, radix tree in Python": 15.6,
    "SGLang 0.5.23, radix tree in Rust": 6.4,
    "vLLM 0.32, hashes ready": 162.0,
    "vLLM 0.32, hashing counted": 622.0,
}
_TURN_CALLS = 20  # The first of a turn finds its tree in no cache of the processor.

_Name = TypeVar("_Name", bound=Hashable)


class Filler:
    """A prefix cache, and prompts to put into it.

    Args:
      seed: Of the prompts.
    """

    def __init__(self, seed: int = 0):
        config = PrefixCacheConfig(
            max_prefixes=1 << 30,
            min_prefix_length=1,
            prefix_ttl_seconds=math.inf,
            enable_cross_request_sharing=True,
        )
        self.cache = PrefixCache(config, BLOCK_SIZE, make_block_policy("lru", 1 << 30))
        self._random, self._next_block = random.Random(seed), 0

    def tokens(self, num_tokens: int) -> list[int]:
        """Returns a prompt that begins like no other."""
        return [self._random.randrange(VOCABULARY) for _ in range(num_tokens)]

    def serve(self, tokens: TokenIds) -> None:
        """Runs one request from lookup to release."""
        lease = self.cache.acquire(self.cache.lookup(tokens, None, 0.0))
        num_new = len(tokens) // BLOCK_SIZE - lease.num_blocks
        own = range(self._next_block, self._next_block + num_new)
        self._next_block += num_new
        plan = self.cache.plan_commit(lease, tokens, [[*[-1] * lease.num_blocks, *own]], 0.0)
        self.cache.apply_commit(lease, plan, 0.0)
        self.cache.release(lease, 0.0)


def medians_us(functions: Mapping[_Name, Callable[[], Any]], repeats: int) -> dict[_Name, float]:
    """Times functions, some calls of each in turn, so that other load affects all equally.

    Args:
      functions: What to time, by name.
      repeats: Calls of each.

    Returns:
      The median time of a call, in microseconds, by name.
    """
    seconds: dict[_Name, list[float]] = {name: [] for name in functions}
    for _ in progress(range(repeats // _TURN_CALLS), "turn"):
        for name, function in functions.items():
            for _ in range(_TURN_CALLS):
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) * 1e6 for name, times in seconds.items()}


def time_lookup(repeats: int) -> dict[str, float]:
    """Times a fully cached prompt of 4,096 tokens."""
    filler = Filler()
    ids = filler.tokens(PROMPT_TOKENS)
    filler.serve(TokenIds(ids))
    prompt = TokenIds([*ids, 1])  # One token is always left to compute.
    found = filler.cache.lookup(prompt, None, 0.0)
    assert found.num_tokens == PROMPT_TOKENS
    deep = Filler()
    for end in range(256, PROMPT_TOKENS + 1, 256):
        for _ in range(16):
            deep.serve(TokenIds(ids[:end] + deep.tokens(2 * BLOCK_SIZE)))
    deep.serve(TokenIds(ids))
    assert deep.cache.lookup(prompt, None, 0.0).num_tokens == PROMPT_TOKENS
    blocks = range(len(found.blocks))

    def loop() -> None:
        for _ in blocks:
            pass

    def hold() -> None:
        filler.cache.release(filler.cache.acquire(found), 0.0)

    functions = {
        "lookup, block ids included": lambda: filler.cache.lookup(prompt, None, 0.0).block_ids,
        "the same 17 nodes deep, 16 siblings each": lambda: (
            deep.cache.lookup(prompt, None, 0.0).block_ids
        ),
        "empty Python loop over its 256 blocks": loop,
        "take and give back the 256 blocks": hold,
        "pack a list of 4,096 ids (once a prompt)": lambda: TokenIds(ids),
    }
    return medians_us(functions, repeats)


class Forest(NamedTuple):
    """A cache of many prefixes.

    Attributes:
      num_prefixes: How many.
      kind: "siblings", which all part within one block, behind a beginning in common, or "unlike".
    """

    num_prefixes: int
    kind: str

    def operations(self, repeats: int) -> dict[str, Callable[[], Any]]:
        """Fills one, and returns a hit, a whole request of four blocks and an eviction.

        Args:
          repeats: How often the request can be made.
        """
        filler = Filler()
        beginning = filler.tokens(2 * BLOCK_SIZE + 3) if self.kind == "siblings" else []

        def prompt() -> TokenIds:
            return TokenIds(beginning + filler.tokens(4 * BLOCK_SIZE - len(beginning)))

        for _ in range(self.num_prefixes):
            filler.serve(prompt())
        known = prompt()
        filler.serve(known)
        filler.cache.acquire(filler.cache.lookup(known, None, 0.0))  # It is not evicted.
        new = iter([prompt() for _ in range(repeats)])
        return {
            "hit": lambda: filler.cache.lookup(known, None, 0.0).block_ids,
            "request": lambda: filler.serve(next(new)),
            "evict": lambda: filler.cache.evict(PerPool([1]), 0.0),
        }


def time_growth(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Times operations among `num_prefixes` prefixes, of either kind."""
    forests = [Forest(size, kind) for kind in ("unlike", "siblings") for size in sizes]
    functions = {
        (forest, name): function
        for forest in progress(forests, "forest")
        for name, function in forest.operations(repeats).items()
    }
    medians = medians_us(functions, repeats)
    return [
        {"prefixes": forest.num_prefixes, "kind": forest.kind}
        | {f"{name}_us": medians[forest, name] for name in ("hit", "request", "evict")}
        for forest in forests
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times both parts, and prints a table of each."""
    repeats = 300 if args.quick else 2000
    lookup = time_lookup(repeats)
    say(f"A fully cached prompt of {PROMPT_TOKENS:,} tokens, blocks of {BLOCK_SIZE}:")
    rows: list[tuple[str, float, str]] = [(name, us, "this run") for name, us in lookup.items()]
    rows += [(name, us, "measured elsewhere") for name, us in ELSEWHERE_US.items()]
    print_table(("operation", "median us", "where"), rows)
    sizes = (100, 1000) if args.quick else (100, 1000, 10_000, 100_000)
    growth = time_growth(sizes, repeats)
    say("\nAmong many prefixes of four blocks, median us:")
    headers = ("prefixes", "which are", "hit", "whole request", "evict a block")
    print_table(headers, [list(row.values()) for row in growth])
    return {"lookup_us": lookup, "elsewhere_us": ELSEWHERE_US, "growth": growth}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    run(make_parser("prefix", __doc__, quick="fewer prefixes and repeats"), measure, argv)


if __name__ == "__main__":
    main()
