"""Serving a language model: tokens/s and the time to the first token, beside other engines.

32 requests that arrive at once, with prompts of 20 to 400 tokens, or with a prefix of 300 tokens
that all share; and requests that arrive at random, at 0.8 of what the engine can serve. The same
requests go, in turn, to the engine, to `serve` (the loop in one program), to a dense static batch,
and to other engines where `--peers-python` names a Python that has them.

Beside the figures stands the floor: the time that the model's matrix products alone take for the
engine's steps, in the same run.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from benchmarks import dense
from benchmarks.harness import make_parser, print_table, progress, run, say
from benchmarks.hub_folder import write_folder
from examples.models import downloads, families, weights
from examples.models.floor import products_seconds
from examples.models.shape import ModelConfig
from ferrum_jax.integrations.engine import Engine, EngineOptions, RequestOptions, StepShape
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.integrations.serve import serve
from ferrum_jax.integrations.serve_loop import ServeOptions

NUM_REQUESTS, BLOCK_SIZE, LONGEST = 32, 16, 512
SHARED_TOKENS = 300

Prompts = list[list[int]]
Times = dict[str, Any]
Model = tuple[Callable[..., Any], Any]


def make_prompts(kind: str, vocab_size: int, seed: int) -> Prompts:
    """Returns the prompts of a workload: "ragged", or "shared" with one prefix of 300 tokens."""
    rng = np.random.default_rng(seed)
    lens = np.linspace(20, 400, NUM_REQUESTS) if kind == "ragged" else np.linspace(13, 57, 32)
    head = [] if kind == "ragged" else rng.integers(2, vocab_size, SHARED_TOKENS).tolist()
    lens = rng.permutation(lens.astype(int))
    return [head + rng.integers(2, vocab_size, size).tolist() for size in lens]


class PagedEngine:
    """The engine, on a manager with prefix caching; each run begins with an empty cache."""

    def __init__(
        self, config: ModelConfig, model: Model, step: StepOptions, max_rows: int = NUM_REQUESTS
    ):
        num_blocks = max_rows * LONGEST // BLOCK_SIZE
        self._manager = fj.PagedKvCacheManager(
            fj.CacheConfig(
                block_size=BLOCK_SIZE,
                max_blocks=num_blocks,
                initial_blocks=num_blocks,
                enable_prefix_caching=True,
                prefix_cache_config=fj.PrefixCacheConfig(
                    max_prefixes=num_blocks,
                    min_prefix_length=BLOCK_SIZE,
                    prefix_ttl_seconds=1e9,
                    enable_cross_request_sharing=True,
                ),
            ),
            fj.CacheGeometry.of(
                config, max_seqs=max_rows, max_sequence_length=LONGEST, dtype="float32"
            ),
        )
        self._engine = Engine(*model, self._manager, EngineOptions(max_rows=max_rows, step=step))

    def samples(self, prompts: Prompts, limits: Sequence[int]) -> Times:
        """Serves samples of prompts, each with its number of new tokens; counts blocks in use."""
        self._manager.reset_prefixes()
        num_samples, most = len(limits) // len(prompts), 0
        stats = self._manager.stats()
        started = time.perf_counter()
        answers = [
            answer
            for prompt in prompts
            for answer in self._engine.submit(
                prompt, RequestOptions(max_new_tokens=max(limits)), n=num_samples
            )
        ]
        while self._engine.step():
            for answer, limit in zip(answers, limits, strict=True):
                if len(answer.taken) >= limit:
                    answer.cancel()
            stats = self._manager.stats()
            most = max(most, stats.total_blocks - stats.free_blocks - stats.evictable_blocks)
        block_bytes = stats.total_memory_bytes // stats.total_blocks
        return {"seconds": time.perf_counter() - started, "bytes": most * block_bytes}

    def __call__(self, prompts: Prompts, num_new: int, arrivals: Sequence[float] = ()) -> Times:
        """Serves prompts that arrive at some seconds after the start, or all at once."""
        self._manager.reset_prefixes()
        before = self._engine.step_counts
        arrivals = arrivals or [0.0] * len(prompts)
        waiting = sorted(zip(arrivals, prompts, strict=True), key=lambda pair: pair[0])
        answers, first, ends = [], {}, {}
        started = time.perf_counter()
        while True:
            now = time.perf_counter() - started
            while waiting and waiting[0][0] <= now:
                arrival, prompt = waiting.pop(0)
                options = RequestOptions(max_new_tokens=num_new)
                answers.append((arrival, self._engine.submit(prompt, options)))
            has_more = self._engine.step()
            now = time.perf_counter() - started
            for number, (arrival, answer) in enumerate(answers):
                if number not in first and answer.taken:
                    first[number] = now - arrival
                if number not in ends and answer.is_done:
                    ends[number] = now - arrival
            if not has_more:
                if not waiting:
                    break
                time.sleep(max(0.0, waiting[0][0] - now))
        after = [(ends[i] - first[i]) / max(1, num_new - 1) for i in first]
        seconds = time.perf_counter() - started
        counts = self._engine.step_counts
        steps = [(*shape, counts[shape] - before.get(shape, 0)) for shape in counts]
        return {"seconds": seconds, "first": list(first.values()), "each": after, "steps": steps}


class OneProgram:
    """`serve`: the whole queue in one program, without prefix caching."""

    def __init__(self, config: ModelConfig, model: Model, step: StepOptions):
        self._model, self._step = model, step
        self._spec = fj.CacheSpec.of(
            config,
            dtype="float32",
            num_blocks=NUM_REQUESTS * LONGEST // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_seqs=NUM_REQUESTS,
            max_sequence_length=LONGEST,
        )
        self._state = fj.init(self._spec)

    def __call__(self, prompts: Prompts, num_new: int) -> Times:
        """Serves prompts, all there at once."""
        options = ServeOptions(max_new_tokens=num_new, step=self._step)
        started = time.perf_counter()
        rows = np.arange(NUM_REQUESTS)
        served = serve(*self._model, self._state, rows, prompts, options=options)
        assert bool(served.ok.all())
        self._state = served.state
        return {"seconds": time.perf_counter() - started, "first": []}


class DenseBatch:
    """One static batch: a padded prefill, then a loop over all rows."""

    def __init__(self, config: ModelConfig, model: Model, num_rows: int = NUM_REQUESTS):
        self._model, self._num_rows = model, num_rows
        self._cache = dense.init_cache(config, num_rows, LONGEST, "float32")
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._cache))

    def __call__(self, prompts: Prompts, num_new: int) -> Times:
        """Serves prompts, all there at once; one per row of the cache."""
        lens = np.asarray([len(prompt) for prompt in prompts], np.int32)
        tokens = np.zeros((self._num_rows, int(lens.max())), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        started = time.perf_counter()
        logits, cache = dense.prefill(*self._model, tokens, lens, self._cache)
        first = jax.block_until_ready(jnp.argmax(logits, axis=1).astype(jnp.int32))
        first_seconds = time.perf_counter() - started
        out, _, self._cache = dense.decode_greedy(
            *self._model, first, jnp.asarray(lens), cache, max_new_tokens=num_new
        )
        jax.block_until_ready(out)
        return {
            "seconds": time.perf_counter() - started,
            "first": [first_seconds] * len(prompts),
        }


class Peer:
    """Another engine in a process of its own; see `serve_peer`."""

    def __init__(self, python: str, name: str, folder: pathlib.Path):
        script = pathlib.Path(__file__).with_name("serve_peer.py")
        self._process = subprocess.Popen(
            [python, str(script), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        if self._answers.readline().strip() != "ready":
            raise RuntimeError(f"{name} did not start in {python}. Try {script} by hand.")

    def __call__(self, prompts: Prompts, num_new: int) -> Times:
        """Serves prompts, all there at once."""
        print(json.dumps([prompts, num_new]), file=self._requests, flush=True)
        return json.loads(self._answers.readline())

    def close(self) -> None:
        """Ends the process."""
        self._requests.close()
        self._process.wait(60)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs all contestants in turn, and yields what there is after each workload."""
    rounds, num_new = (1, 16) if args.quick else (args.rounds, 64)
    config, params, _ = weights.load(downloads.resolve(args.model))
    whole = families.from_params(config, params)
    model = families.functional(whole)
    step = StepOptions(chunk_tokens=args.chunk_tokens, chunks_per_step=args.chunks_per_step)
    engine = PagedEngine(config, model, step)
    contestants: dict[str, Callable[..., Times]] = {
        "engine": engine,
        "engine, exact": PagedEngine(config, model, dataclasses.replace(step, exact=True)),
        "serve": OneProgram(config, model, step),
        "dense batch": DenseBatch(config, model),
    }
    figures: dict[str, Any] = {
        "workloads": [],
        "stream": [],
        "samples": [],
        "products": [],
        "runs": {},
    }
    peers = args.peers if args.peers_python else ()
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = pathlib.Path(name_of_folder)
        if peers:
            write_folder(folder, config, params)
        for name in peers:
            contestants[name] = Peer(args.peers_python, name, folder)
        for kind in ("ragged", "shared"):
            prompts = make_prompts(kind, config.vocab_size, 0)
            runs = _take_turns(contestants, prompts, num_new, rounds)
            steps = runs["engine"][-1]["steps"]
            floor = products_seconds(
                whole, {StepShape(*x): n for *x, n in steps}, step.chunk_tokens
            )
            figures["runs"][kind] = runs
            rows = _summary(kind, runs, num_new, floor)
            figures["workloads"] += rows
            print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
            yield figures
        for contestant in contestants.values():
            if isinstance(contestant, Peer):
                contestant.close()
        onednn = Peer(args.peers_python, "onednn", folder) if peers else None
        figures["products"] = _products(config, params, step, onednn)
        if onednn is not None:
            onednn.close()
        yield figures
    fastest = min(run["seconds"] for run in figures["runs"]["ragged"]["engine"])
    figures["stream"] = _stream(engine, config.vocab_size, num_new, 0.8 * NUM_REQUESTS / fastest)
    yield figures
    figures["samples"] = _samples(config, model, step, 16 if args.quick else 256)
    yield figures
    for rows in (figures["stream"], figures["samples"], figures["products"]):
        print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def _take_turns(
    contestants: Mapping[str, Callable[..., Times]], prompts: Prompts, num_new: int, rounds: int
) -> dict[str, list[Times]]:
    """Runs a workload by each contestant in turn; each begins a round once."""
    for name, contestant in contestants.items():
        say(f"{name} warms up")
        contestant(prompts, num_new)
    runs: dict[str, list[Times]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in progress(range(rounds), "round"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(contestants[name](prompts, num_new))
    return runs


def _summary(
    kind: str, runs: Mapping[str, list[Times]], num_new: int, floor: float
) -> list[dict[str, Any]]:
    """Returns a row for each contestant, of its best run, and one for the floor."""
    rows = []
    for name, of_name in runs.items():
        best = min(of_name, key=lambda run_of: run_of["seconds"])
        first = float(np.mean(best["first"])) if best["first"] else None
        rows.append((name, best["seconds"], first))
    return [
        {
            "workload": kind,
            "engine": name,
            "tokens/s": NUM_REQUESTS * num_new / seconds,
            "seconds": seconds,
            "first token, s": first,
            "times the floor": seconds / floor,
        }
        for name, seconds, first in [*rows, ("floor", floor, None)]
    ]


def _stream(
    engine: PagedEngine, vocab_size: int, num_new: int, rate: float
) -> list[dict[str, Any]]:
    """Runs requests that arrive at random, so many a second."""
    prompts = make_prompts("ragged", vocab_size, 1)
    arrivals = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(prompts))).tolist()
    times = engine(prompts, num_new, arrivals)
    return [
        {
            "at 0.8 of capacity": what,
            "p50": float(np.percentile(times[name], 50)),
            "p99": float(np.percentile(times[name], 99)),
        }
        for name, what in (("first", "first token, s"), ("each", "each token after it, s"))
    ]


def _samples(
    config: ModelConfig, model: Model, step: StepOptions, most: int
) -> list[dict[str, Any]]:
    """Runs 8 samples of each of 8 prompts of 256 tokens, with 16 to 256 new tokens."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(2, config.vocab_size, 256).tolist() for _ in range(8)]
    limits = rng.integers(16, most + 1, 64).tolist()
    engine, batch = PagedEngine(config, model, step, 64), DenseBatch(config, model, 64)
    copies = [prompt for prompt in prompts for _ in range(8)]
    results = {}
    for _ in range(2):  # The first run compiles.
        results["engine"] = engine.samples(prompts, limits)
        results["dense batch"] = {**batch(copies, most), "bytes": batch.bytes}
    return [
        {
            "8 samples of 8 prompts": name,
            "tokens/s": sum(limits) / times["seconds"],
            "seconds": times["seconds"],
            "peak cache, MiB": times["bytes"] / (1 << 20),
        }
        for name, times in results.items()
    ]


def _products(
    config: ModelConfig, params: Mapping[str, Any], step: StepOptions, onednn: Peer | None
) -> list[dict[str, Any]]:
    """Times the products of a step of rows alone, and of a step with prompts, in two dtypes."""
    num_chunks, chunk_tokens = step.chunk_shape
    rows = []
    for shape in (StepShape(NUM_REQUESTS, 0), StepShape(NUM_REQUESTS, num_chunks)):
        num_tokens = shape.num_rows + shape.num_chunks * chunk_tokens
        row: dict[str, Any] = {"products of a step, ms": f"{num_tokens} tokens"}
        for dtype in ("float32", "bfloat16"):
            cast = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
            model = families.from_params(config, cast)
            row[f"XLA, {dtype}"] = 1e3 * products_seconds(model, {shape: 1}, chunk_tokens)
        if onednn is not None:
            times = onednn([[0] * num_tokens], shape.num_rows)
            row |= {f"oneDNN, {dtype}": 1e3 * seconds for dtype, seconds in times.items()}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("serve", __doc__, quick="one round of few tokens")
    parser.add_argument("--model", metavar="PATH", help="see examples/generate.py")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=16, help="see StepOptions")
    parser.add_argument("--chunks-per-step", type=int, default=32, help="see StepOptions")
    parser.add_argument("--peers-python", metavar="PATH", help="a Python with other engines")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["vllm", "transformers", "transformers_paged"],
        help="which ones",
    )
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
