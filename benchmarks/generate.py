"""Whole-model decoding: tokens/s through the paged cache and through a dense static one.

Both run the same model, weights and loop (all steps in one program, the cache donated), from the
same lengths, in turn. The dense cache has places for the longest row and its new tokens, in the
layout that measured fastest (`benchmarks/dense.py`).
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from benchmarks import dense
from benchmarks.harness import make_parser, print_table, progress, run, time_interleaved
from examples.models import downloads, families, weights
from examples.models.shape import ModelConfig
from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.decoding.generate import GenerateOptions, generate

ModelFn = Callable[..., tuple[jax.Array, Any]]


class Paged:
    """Decodes from fixed lengths through the paged cache, again and again."""

    def __init__(
        self,
        config: ModelConfig,
        model: tuple[ModelFn, Any],
        lens: np.ndarray,
        args: argparse.Namespace,
    ):
        self._model, self._lens, self._rows = model, lens, np.arange(lens.size, dtype=np.int32)
        num_new, block_size = args.num_new, args.block_size
        blocks = ceil_div(lens + num_new, block_size)
        spec = fj.CacheSpec(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=args.dtype,
            num_blocks=int(blocks.sum()),
            block_size=block_size,
            max_seqs=lens.size,
            max_blocks_per_seq=int(blocks.max()),
        )
        self.bytes = spec.pool_bytes
        self._state, _ = fj.allocate(fj.init(spec), self._rows, lens)
        self._tokens = np.ones(lens.size, np.int32)
        self._options = GenerateOptions(max_new_tokens=num_new)

    def __call__(self) -> None:
        """Generates from the start again."""
        state, _ = fj.truncate(self._state, self._rows, self._lens)
        out = generate(*self._model, state, self._rows, self._tokens, options=self._options)
        self._state = jax.block_until_ready(out.state)


class Dense:
    """The same through a dense cache."""

    def __init__(
        self,
        config: ModelConfig,
        model: tuple[ModelFn, Any],
        lens: np.ndarray,
        args: argparse.Namespace,
    ):
        self._model, self._lens, self._num_new = model, jnp.asarray(lens), args.num_new
        max_tokens = int(lens.max()) + args.num_new
        self._cache = dense.init_cache(config, lens.size, max_tokens, args.dtype)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._cache))
        self._tokens = jnp.ones(lens.size, jnp.int32)

    def __call__(self) -> None:
        """Generates from the start again; the loop's first token is given, as in `generate`."""
        *_, cache = dense.decode_greedy(
            *self._model,
            self._tokens,
            self._lens,
            self._cache,
            max_new_tokens=self._num_new + 1,
        )
        self._cache = jax.block_until_ready(cache)


def context_lengths(kind: str, num_rows: int) -> np.ndarray:
    """Returns i32[num_rows]: 512 each, or spread evenly over 100 to 2000, shuffled."""
    if kind == "uniform":
        return np.full(num_rows, 512, np.int32)
    spread = np.linspace(100, 2000, num_rows) if num_rows > 1 else np.array([1050])
    return np.random.default_rng(0).permutation(spread).astype(np.int32)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the comparison on every batch and prints its table."""
    args.num_new = args.num_new or (4 if args.quick else 16)
    args.repeats = args.repeats or (2 if args.quick else 7)
    batches = args.batches or ([4] if args.quick else [1, 8, 32])
    config, params, _ = weights.load(downloads.resolve(args.model))
    model = families.functional(families.from_params(config, params))
    figures = []
    for kind, num_rows in progress(itertools.product(("uniform", "ragged"), batches), "batch"):
        lens = context_lengths(kind, num_rows)
        runs = {
            "paged": Paged(config, model, lens, args),
            "dense": Dense(config, model, lens, args),
        }
        figures.append(_compare(kind, lens, runs, args))
    print_table(tuple(figures[0]), [tuple(row.values()) for row in figures])
    return figures


def _compare(
    kind: str, lens: np.ndarray, runs: dict[str, Paged | Dense], args: argparse.Namespace
) -> dict[str, Any]:
    """Times both in turn and returns a row of figures."""
    seconds = time_interleaved(runs, repeats=args.repeats)
    num_tokens = lens.size * args.num_new
    contexts = f"{kind} {lens.min()}-{lens.max()}"
    row: dict[str, Any] = {"contexts": contexts, "batch": lens.size, "dtype": args.dtype}
    for name, times in seconds.items():
        row[f"{name} tokens/s"] = num_tokens / float(np.median(times))
    row["paged/dense"] = float(np.median(np.divide(seconds["dense"], seconds["paged"])))
    for name, decoder in runs.items():
        row[f"{name} MiB"] = decoder.bytes >> 20
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("generate", __doc__, quick="one small batch, few steps and repeats")
    parser.add_argument("--model", metavar="PATH", help="see examples/generate.py")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences of each")
    parser.add_argument("--num-new", type=int, help="steps of one run")
    parser.add_argument("--block-size", type=int, default=16, help="tokens")
    parser.add_argument("--dtype", default="float32", help="of the caches; weights are float32")
    parser.add_argument("--repeats", type=int, help="timed runs of each")
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
