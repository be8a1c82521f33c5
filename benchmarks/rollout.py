"""A rollout of RL training: tokens/s and peak cache bytes, beside dense batches.

8 prompts of 256 tokens, 8 samples of each, answers of 16 to 256 tokens; a random model of 4 layers
of width 512. `rollout` computes each prompt once and refills its rows; a dense batch stores every
prompt 8 times, and runs until the longest answer ends. Where google-tunix is installed, its vanilla
sampler runs a model of the same shape in turn.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ferrum_jax as fj
from benchmarks.harness import make_parser, print_table, progress, run, say
from benchmarks.serve import LONGEST, DenseBatch, Model, Prompts
from examples.models import families
from examples.models.llama import LlamaConfig
from examples.models.shape import ModelConfig
from ferrum_jax.integrations import StepOptions

NUM_PROMPTS, NUM_SAMPLES, BLOCK_SIZE = 8, 8, 16
NUM_ROWS = NUM_PROMPTS * NUM_SAMPLES
SHORTEST_ANSWER, LONGEST_ANSWER, PROMPT_TOKENS = 16, 256, 256

CONFIG = LlamaConfig(
    vocab_size=2048,
    width=512,
    num_layers=4,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_width=1536,
    norm_epsilon=1e-6,
    rope_base=1_000_000.0,
    normalizes_heads=True,
)
"""The shape of a Qwen 3 model."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is rolled out.

    Attributes:
      prompts: Token ids of each prompt.
      limits: i32[P, G]. Tokens of each answer.
    """

    prompts: Prompts
    limits: np.ndarray

    @classmethod
    def make(cls, num_tokens: int, longest: int) -> "Workload":
        """Returns random prompts of a length, and answers of up to `longest` tokens."""
        rng = np.random.default_rng(0)
        prompts = rng.integers(2, CONFIG.vocab_size, (NUM_PROMPTS, num_tokens)).tolist()
        limits = rng.integers(SHORTEST_ANSWER, longest + 1, (NUM_PROMPTS, NUM_SAMPLES))
        limits.flat[0] = longest  # The width of the answers is one whatever is drawn.
        return cls(prompts, limits.astype(np.int32))

    @property
    def copies(self) -> Prompts:
        """The prompt of each sample."""
        return [prompt for prompt in self.prompts for _ in range(NUM_SAMPLES)]

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return int(self.limits.max())


class Rollout:
    """`rollout`, on a cache that is used again."""

    def __init__(self, config: ModelConfig, model: Model, step: StepOptions):
        self._model, self._step = model, step
        longest_sample = -(-LONGEST // BLOCK_SIZE)
        self._state = fj.init(
            fj.CacheSpec.of(
                config,
                dtype="float32",
                num_blocks=NUM_ROWS * longest_sample,
                block_size=BLOCK_SIZE,
                max_seqs=NUM_ROWS,
                max_sequence_length=LONGEST,
            )
        )

    def __call__(self, work: Workload) -> dict[str, float]:
        """Returns seconds, and the bytes of the most blocks in use."""
        limits = jnp.asarray(work.limits)
        options = fj.ServeOptions(max_new_tokens=work.longest, limits=limits, step=self._step)
        started = time.perf_counter()
        out = fj.rollout(
            *self._model, self._state, work.prompts, samples=NUM_SAMPLES, options=options
        )
        num_tokens = np.asarray(out.num_tokens)
        seconds = time.perf_counter() - started
        assert (num_tokens == work.limits).all()
        self._state = out.state
        pool_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.pools))
        share = int(out.max_blocks[0]) / self._state.tables.num_blocks
        return {"seconds": seconds, "bytes": pool_bytes * share}


class Dense:
    """One static batch with a row per sample."""

    def __init__(self, config: ModelConfig, model: Model):
        self._batch = DenseBatch(config, model, NUM_ROWS)

    def __call__(self, work: Workload) -> dict[str, float]:
        """Returns seconds, and the bytes of the cache."""
        times = self._batch(work.copies, work.longest)
        return {"seconds": times["seconds"], "bytes": self._batch.bytes}


class Tunix:
    """The sampler of google-tunix's vanilla rollout, with a random Qwen 3 of the same shape."""

    def __init__(self, config: ModelConfig):
        qwen3 = importlib.import_module("tunix.models.qwen3.model")
        sampler = importlib.import_module("tunix.generate.sampler")
        shape = qwen3.ModelConfig(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.width,
            hidden_dim=config.mlp_width,
            num_heads=config.num_q_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=int(config.rope_base),
            norm_eps=config.norm_epsilon,
            use_tied_embedding=config.ties_embeddings,
        )
        cache = sampler.CacheConfig(
            cache_size=LONGEST,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        model = qwen3.Qwen3(shape, rngs=nnx.Rngs(params=0))
        self._sampler = sampler.Sampler(model, _Numbers(), cache)
        per_place = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        self._bytes = 4 * per_place * NUM_ROWS * LONGEST

    def __call__(self, work: Workload) -> dict[str, float]:
        """Returns seconds, and the bytes of the cache."""
        texts = [" ".join(map(str, prompt)) for prompt in work.copies]
        started = time.perf_counter()
        # No token ends an answer, as for the other contestants.
        self._sampler(texts, max_generation_steps=work.longest, eos_tokens=[CONFIG.vocab_size])
        return {"seconds": time.perf_counter() - started, "bytes": self._bytes}


class _Numbers:
    """A tokenizer of texts that are token ids."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        """Returns 0: prompts are given no first token."""
        return 0

    def eos_id(self) -> int:
        """Returns a token that prompts do not have."""
        return 1

    def pad_id(self) -> int:
        """Returns the token of padding."""
        return 0


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs all contestants in turn, and yields the figures."""
    rounds = 1 if args.quick else args.rounds
    work = Workload.make(*((32, 24) if args.quick else (PROMPT_TOKENS, LONGEST_ANSWER)))
    model = families.functional(families.init_model(CONFIG, rngs=nnx.Rngs(params=0)))
    step = StepOptions(chunk_tokens=args.chunk_tokens, chunks_per_step=args.chunks_per_step)
    contestants: dict[str, Callable[[Workload], dict[str, float]]] = {
        "rollout": Rollout(CONFIG, model, step),
        "dense batch": Dense(CONFIG, model),
    }
    if importlib.util.find_spec("tunix") is not None:
        contestants["tunix, vanilla"] = Tunix(CONFIG)
    else:
        say("google-tunix is not installed, and is left out")
    for name, contestant in contestants.items():
        say(f"{name} warms up")
        contestant(work)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in progress(range(rounds), "round"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(contestants[name](work))
    rows = _summary(runs, int(work.limits.sum()))
    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    yield {"contestants": rows, "runs": runs}


def _summary(
    runs: Mapping[str, Sequence[Mapping[str, float]]], num_tokens: int
) -> list[dict[str, Any]]:
    """Returns a row for each contestant, of its best run; ratios are to the first one."""
    best = {name: min(of_name, key=lambda one: one["seconds"]) for name, of_name in runs.items()}
    first = next(iter(best.values()))
    return [
        {
            "contestant": name,
            "tokens/s": num_tokens / one["seconds"],
            "seconds": one["seconds"],
            "times rollout": one["seconds"] / first["seconds"],
            "peak cache, MiB": one["bytes"] / (1 << 20),
            "times its bytes": one["bytes"] / first["bytes"],
        }
        for name, one in best.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("rollout", __doc__, quick="one round of short prompts and answers")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=16, help="see StepOptions")
    parser.add_argument("--chunks-per-step", type=int, default=16, help="see StepOptions")
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
