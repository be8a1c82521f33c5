"""What it costs to find, take, keep and evict a cached prefix, and how that grows.

`python -m benchmarks.prefix` times the prefix cache alone: it is host work, and no device is
asked. Beside it stand an empty Python loop over the same blocks, and figures of other systems
that were measured on a machine of this kind (two cores of an AMD EPYC), not in this run.
"""

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness import make_parser, print_table, progress, run, say
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.policies.registry import make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.tokens import TokenIds

BLOCK_SIZE, PROMPT_TOKENS, VOCABULARY = 16, 4096, 50_000
ELSEWHERE_US = {
    "SGLang 0.5.23, radix tree in Python": 15.6,
    "SGLang 0.5.23, radix tree in Rust": 6.4,
    "vLLM 0.32, hashes ready": 162.0,
    "vLLM 0.32, hashing counted": 622.0,
}


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
        """Does what a request does from its beginning to its end."""
        lease = self.cache.acquire(self.cache.lookup(tokens, None, 0.0), None)
        num_new = len(tokens) // BLOCK_SIZE - lease.num_blocks
        own = range(self._next_block, self._next_block + num_new)
        self._next_block += num_new
        self.cache.commit(lease, tokens, [*[-1] * lease.num_blocks, *own], 0.0)
        self.cache.release(lease, 0.0)


def median_us(function: Callable[[], Any], repeats: int) -> float:
    """Returns the median time of a call, in microseconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


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
        filler.cache.release(filler.cache.acquire(found, None), 0.0)

    return {
        "lookup, block ids included": median_us(
            lambda: filler.cache.lookup(prompt, None, 0.0).block_ids, repeats
        ),
        "the same 17 nodes deep, 16 siblings each": median_us(
            lambda: deep.cache.lookup(prompt, None, 0.0).block_ids, repeats
        ),
        "empty Python loop over its 256 blocks": median_us(loop, repeats),
        "take and give back the 256 blocks": median_us(hold, repeats),
        "pack a list of 4,096 ids (once a prompt)": median_us(lambda: TokenIds(ids), repeats),
    }


def time_growth(num_prefixes: int, repeats: int, *, siblings: bool) -> tuple[float, float, float]:
    """Times a hit, an insertion and an eviction among many prefixes.

    Args:
      num_prefixes: How many are cached.
      repeats: Calls of each.
      siblings: Whether all of them part within one block, behind a beginning in common.

    Returns:
      `(hit, insert, evict)` in microseconds; the insertion is a whole request of four blocks.
    """
    filler = Filler()
    beginning = filler.tokens(2 * BLOCK_SIZE + 3) if siblings else []

    def prompt() -> TokenIds:
        return TokenIds(beginning + filler.tokens(4 * BLOCK_SIZE - len(beginning)))

    for _ in range(num_prefixes):
        filler.serve(prompt())
    known = prompt()
    filler.serve(known)
    hit = median_us(lambda: filler.cache.lookup(known, None, 0.0).block_ids, repeats)
    new = iter([prompt() for _ in range(repeats)])
    insert = median_us(lambda: filler.serve(next(new)), repeats)
    evict = median_us(lambda: filler.cache.evict(1, 0.0), repeats)
    return hit, insert, evict


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times both parts, and prints a table of each."""
    repeats = 300 if args.quick else 2000
    lookup = time_lookup(repeats)
    say(f"A fully cached prompt of {PROMPT_TOKENS:,} tokens, blocks of {BLOCK_SIZE}:")
    rows: list[tuple[str, float, str]] = [(name, us, "this run") for name, us in lookup.items()]
    rows += [(name, us, "measured elsewhere") for name, us in ELSEWHERE_US.items()]
    print_table(("operation", "median us", "where"), rows)
    sizes = (100, 1000) if args.quick else (100, 1000, 10_000, 100_000)
    growth = []
    for siblings, size in progress(itertools.product((False, True), sizes), "size"):
        kind = "siblings" if siblings else "unlike"
        growth.append((size, kind, *time_growth(size, repeats, siblings=siblings)))
    say("\nAmong many prefixes of four blocks, median us:")
    print_table(("prefixes", "which are", "hit", "whole request", "evict a block"), growth)
    names = ("prefixes", "kind", "hit_us", "request_us", "evict_us")
    return {
        "lookup_us": lookup,
        "elsewhere_us": ELSEWHERE_US,
        "growth": [dict(zip(names, row, strict=True)) for row in growth],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    run(make_parser("prefix", __doc__, quick="fewer prefixes and repeats"), measure, argv)


if __name__ == "__main__":
    main()
