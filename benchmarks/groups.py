"""Layer groups: bytes of live cache and time of a decode step, with windows that free their blocks.

The layers have the shapes of Gemma 3 270M: 18 layers, of which each sixth sees all tokens and the
others 512; one KV head of 256 numbers, four query heads, float32, random weights, no vocabulary.
The same layers run on a cache of layer groups, on one group for all layers (which keeps all tokens,
while attention is told the window), and on a dense static cache.

A second table has the operations alone, on the tables of one group and of several.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from benchmarks.dense import DenseBatch, DenseCache
from benchmarks.harness import make_parser, print_table, progress, run, say, time_interleaved
from ferrum_jax.arithmetic import ceil_div

NUM_LAYERS, FULL, WINDOW = 18, (5, 11, 17), 512
WIDTH, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN = 640, 4, 1, 256, 2048
BLOCK_SIZE = 16
CHUNK = 512  # Tokens by which rows are extended before decoding.
BURST = 16  # Calls of an operation that are waited for together.

_PAYLOAD = fj.KeyValue(NUM_KV_HEADS, HEAD_DIM, "float32")
_LOCAL = tuple(layer for layer in range(NUM_LAYERS) if layer not in FULL)
GROUPS = fj.equal_sized(
    [fj.LayerGroup("full", FULL, _PAYLOAD), fj.LayerGroup("local", _LOCAL, _PAYLOAD, WINDOW)]
)


def init_weights(seed: int = 0) -> list[dict[str, jax.Array]]:
    """Returns random weights of each layer."""
    shapes = {
        "q": (WIDTH, NUM_Q_HEADS * HEAD_DIM),
        "k": (WIDTH, NUM_KV_HEADS * HEAD_DIM),
        "v": (WIDTH, NUM_KV_HEADS * HEAD_DIM),
        "out": (NUM_Q_HEADS * HEAD_DIM, WIDTH),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    rng = np.random.default_rng(seed)
    return [
        {
            name: jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)
            for name, shape in shapes.items()
        }
        for _ in range(NUM_LAYERS)
    ]


def run_layers(params: list[dict[str, jax.Array]], x: jax.Array, batch: Any) -> tuple[Any, Any]:
    """Runs x [R, 1, WIDTH] through all layers; returns the last activations and the pools."""
    for layer, weights in enumerate(params):
        options = fj.AttentionOptions(sliding_window=None if layer in FULL else WINDOW)
        q = (x @ weights["q"]).reshape(*x.shape[:2], NUM_Q_HEADS, HEAD_DIM)
        k, v = ((x @ weights[name]).reshape(*x.shape[:2], NUM_KV_HEADS, HEAD_DIM) for name in "kv")
        batch = batch.write(layer, k, v)
        seen = batch.attend(layer, q, options)
        x = x + seen.reshape(*x.shape[:2], -1) @ weights["out"]
        x = x + (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]
    return x, batch.pools


@functools.partial(jax.jit, donate_argnames="state")
def _paged_step(params: Any, state: fj.CacheState, x: jax.Array) -> tuple[Any, fj.CacheState]:
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)
    state, _ = fj.extend(state, rows, 1, max_new_tokens=1)
    batch = fj.PagedBatch.of(state, rows, jnp.ones_like(rows), num_tokens=1)
    x, pools = run_layers(params, x, batch)
    return x, state.with_pools(pools)


@functools.partial(jax.jit, donate_argnames="cache")
def _dense_step(params: Any, cache: DenseCache, x: jax.Array, seq_lens: jax.Array):
    ones = jnp.ones_like(seq_lens)
    batch = DenseBatch(pools=cache, seq_lens=seq_lens, q_lens=ones, num_tokens=1)
    return run_layers(params, x, batch)


class Paged:
    """Decode steps on a paged cache of rows that hold a context each."""

    def __init__(self, params: Any, num_rows: int, context: int, groups: Any):
        blocks = ceil_div(2 * context, BLOCK_SIZE)
        sizes = {"block_size": BLOCK_SIZE, "max_seqs": num_rows, "max_blocks_per_seq": blocks}
        layers = {"groups": groups} if groups else _shorthand()
        num_groups = len(groups) if groups else 1
        needed = fj.CacheSpec(**layers, num_blocks=1, **sizes)
        # All full groups, and what a window and a chunk take: rounded up.
        per_row = ceil_div(context + CHUNK, BLOCK_SIZE) + (num_groups - 1) * (
            ceil_div(WINDOW + CHUNK, BLOCK_SIZE) + 1
        )
        spec = dataclasses.replace(needed, num_blocks=num_rows * per_row)
        self._params, self._x = params, jnp.ones((num_rows, 1, WIDTH))
        rows = np.arange(num_rows, dtype=np.int32)
        state = fj.init(spec)
        for length in [CHUNK] * (context // CHUNK) + [context % CHUNK]:
            state, ok = fj.extend(state, rows, length, max_new_tokens=CHUNK)
            fj.require(ok, f"extend {num_rows} rows by {length}", state)
        self._state = state

    @property
    def live_bytes(self) -> int:
        """Bytes of the blocks that rows hold."""
        pools = zip(self._state.pools, self._state.page_tables, strict=True)
        return sum(
            (tables.num_blocks - int(tables.num_free)) * (_num_bytes(pool) // pool.num_blocks)
            for pool, tables in pools
        )

    def __call__(self) -> jax.Array:
        """Makes one step."""
        x, self._state = _paged_step(self._params, self._state, self._x)
        return x


class Dense:
    """Decode steps on a dense cache with room for twice the context."""

    def __init__(self, params: Any, num_rows: int, context: int):
        k = (num_rows, NUM_KV_HEADS, HEAD_DIM, context + CHUNK)
        v = (num_rows, NUM_KV_HEADS, context + CHUNK, HEAD_DIM)
        self._cache = DenseCache(
            tuple(jnp.zeros(k) for _ in params),
            tuple(jnp.zeros(v) for _ in params),
            tuple(range(len(params))),
            np.dtype("float32"),
        )
        self._params, self._x = params, jnp.ones((num_rows, 1, WIDTH))
        self._seq_lens = jnp.full(num_rows, context, jnp.int32)

    @property
    def live_bytes(self) -> int:
        """Bytes of the cache."""
        return _num_bytes(self._cache)

    def __call__(self) -> jax.Array:
        """Makes one step."""
        x, self._cache = _dense_step(self._params, self._cache, self._x, self._seq_lens)
        return x


def _shorthand() -> dict[str, Any]:
    return {
        "num_layers": NUM_LAYERS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
    }


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def decode_figures(context: int, num_rows: int, repeats: int) -> dict[str, Any]:
    """Times a decode step of each cache at one context, in turn."""
    params = init_weights()
    runs: dict[str, Callable[[], Any]] = {
        "groups": Paged(params, num_rows, context, GROUPS),
        "one group": Paged(params, num_rows, context, None),
        "dense": Dense(params, num_rows, context),
    }
    seconds = time_interleaved(runs, repeats)
    live = {name: cache.live_bytes for name, cache in runs.items()}  # After some steps of a token.
    figures: dict[str, Any] = {"context": context, "rows": num_rows}
    for name, times in seconds.items():
        figures[f"{name} MiB"] = live[name] / 2**20
        figures[f"{name} ms"] = statistics.median(times) * 1e3
    for name in ("one group", "dense"):
        figures[f"bytes of {name}"] = live["groups"] / live[name]
        ratios = np.divide(seconds["groups"], seconds[name])
        figures[f"time of {name}"] = float(np.median(ratios))
    return figures


# The operations alone.


def _tiny(head_dim: int = 1) -> fj.KeyValue:
    return fj.KeyValue(1, head_dim, "int8")


_ALLOCATED = {
    "one group": [fj.LayerGroup("a", [0], _tiny())],
    "two groups": [fj.LayerGroup("a", [0], _tiny()), fj.LayerGroup("b", [1], _tiny())],
    "two, one with a window": [
        fj.LayerGroup("a", [0], _tiny()),
        fj.LayerGroup("b", [1], _tiny(), 256),
    ],
    "two pools": [fj.LayerGroup("a", [0], _tiny()), fj.LayerGroup("b", [1], _tiny(2))],
    "six, five with a window": [
        fj.LayerGroup(str(i), [i], _tiny(), 256 if i else None) for i in range(6)
    ],
}


class Operations:
    """A burst of allocate, extend and free of 16 rows, each a program with the state donated."""

    def __init__(self, groups: Any):
        spec = fj.CacheSpec(
            groups=groups,
            num_blocks=4096,
            block_size=BLOCK_SIZE,
            max_seqs=32,
            max_blocks_per_seq=256,
        )
        self._state = fj.init(spec)
        self._rows = np.arange(16, dtype=np.int32)
        self._lens = np.full(16, 256, np.int32)
        self._allocate, self._extend, self._free = (
            jax.jit(program, donate_argnums=0) for program in (fj.allocate, _extend, fj.free)
        )

    def __call__(self) -> Any:
        """Allocates rows, extends them by a block at a time, and frees them."""
        state, _ = self._allocate(self._state, self._rows, self._lens)
        for _ in range(BURST):
            state, ok = self._extend(state, self._rows)
        self._state = self._free(state, self._rows)
        return ok


def _extend(state: fj.CacheState, rows: jax.Array) -> tuple[fj.CacheState, jax.Array]:
    return fj.extend(state, rows, BLOCK_SIZE, max_new_tokens=BLOCK_SIZE)


def operation_figures(repeats: int) -> list[dict[str, Any]]:
    """Times a burst of operations on each kind of tables, in turn."""
    seconds = time_interleaved(
        {name: Operations(groups) for name, groups in _ALLOCATED.items()}, repeats
    )
    calls = BURST + 2
    return [
        {
            "tables": name,
            "median_us": statistics.median(times) * 1e6 / calls,
            "min_us": min(times) * 1e6 / calls,
            "times one group": float(np.median(np.divide(times, seconds["one group"]))),
            "min times one group": min(times) / min(seconds["one group"]),
        }
        for name, times in seconds.items()
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times everything that the command line asks for, and prints it."""
    contexts = args.contexts or ((1024, 4096) if args.quick else (1024, 4096, 16384))
    repeats = args.repeats or (5 if args.quick else 25)
    decode = [
        decode_figures(context, args.rows, repeats) for context in progress(contexts, "context")
    ]
    print_table(tuple(decode[0]), [tuple(row.values()) for row in decode])
    operations = operation_figures(10 * repeats)
    say()
    print_table(tuple(operations[0]), [tuple(row.values()) for row in operations])
    return {"decode": decode, "operations": operations}


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = make_parser("groups", __doc__, "contexts of 1024 and 4096, fewer repeats")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens of each row")
    parser.add_argument("--rows", type=int, default=2, help="sequences (default: 2)")
    parser.add_argument("--repeats", type=int, help="timed steps of each cache")
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
