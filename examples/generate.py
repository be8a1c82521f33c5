"""Several prompts of different lengths, one language model, one paged cache.

Run `python examples/generate.py --help` for the options.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from examples import llama, prompts, weights
from ferrum_jax import CacheConfig, CacheGeometry, CacheState, Device, PagedKvCacheManager
from ferrum_jax.integrations.generate import NULL_TOKEN, Generated, GenerateOptions, generate
from ferrum_jax.integrations.prefill import PrefillOptions, prefill
from ferrum_jax.integrations.sampling import Sampling

SLICE_TOKENS = 16  # New tokens a row between two looks at the progress bar.


@dataclasses.dataclass
class Tally:
    """What a run took.

    Attributes:
      prompt_tokens: Tokens read.
      new_tokens: Tokens generated.
      compile_seconds: Spent on making the programs.
      prefill_seconds: Spent on reading prompts.
      decode_seconds: Spent on generating.
      peak_blocks: Most blocks in use at once.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_blocks: int = 0


class Decoder:
    """A model with a cache that takes prompts in batches.

    Args:
      model: The model.
      manager: Its cache.
      num_rows: Sequences decoded at once.
      max_new_tokens: Tokens to generate for each prompt at most.
      sampling: How tokens are chosen.
      stop_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        model: llama.Llama,
        manager: PagedKvCacheManager,
        num_rows: int,
        max_new_tokens: int,
        sampling: Sampling,
        stop_token_ids: tuple[int, ...],
    ):
        self._model_fn, self._params = llama.functional(model)
        self._manager, self._num_rows = manager, num_rows
        self._max_new_tokens = max_new_tokens
        self._options = GenerateOptions(
            max_new_tokens=min(SLICE_TOKENS, max_new_tokens),
            sampling=sampling,
            stop_token_ids=stop_token_ids,
        )
        self._key = jax.random.key(0)
        self.tally = Tally()

    def warm_up(self, batches: Sequence[dict[int, list[int]]]) -> None:
        """Compiles for batches such as these, on rows that hold nothing."""
        started = time.perf_counter()
        shape = PrefillOptions()
        for num_rows in {_rows_of_a_step(batch, shape) for batch in batches}:
            self._manager.run(self._prefill, [None], [[0] * num_rows * shape.chunk_tokens])
        nothing = np.full(self._num_rows, NULL_TOKEN, np.int32)
        self._manager.run(self._generate, [None] * self._num_rows, nothing, nothing)
        self.tally.compile_seconds += time.perf_counter() - started

    def run(self, batch: dict[int, list[int]], progress: "tqdm.tqdm[Any]") -> dict[int, list[int]]:
        """Decodes a batch of prompts, by number, and returns their new tokens."""
        handles = [
            self._manager.allocate(self._manager.new_request(number, len(ids)))
            for number, ids in batch.items()
        ]
        started = time.perf_counter()
        logits = self._manager.run(self._prefill, handles, list(batch.values()))
        self._key, key = jax.random.split(self._key)
        first = np.asarray(self._options.sampling.sample(logits, key))
        self.tally.prefill_seconds += time.perf_counter() - started
        self.tally.prompt_tokens += sum(map(len, batch.values()))

        started = time.perf_counter()
        rows = [*handles, *[None] * (self._num_rows - len(handles))]
        tokens = np.full(self._num_rows, NULL_TOKEN, np.int32)
        tokens[: first.size] = first
        new_tokens: list[list[int]] = [[] for _ in handles]
        for done in range(0, self._max_new_tokens, SLICE_TOKENS):
            limits = np.full(self._num_rows, self._max_new_tokens - done, np.int32)
            out = self._manager.run(self._generate, rows, tokens, limits, extends=True)
            made, counts, tokens, ok = (np.asarray(x) for x in out)
            if not ok:
                raise SystemExit("The cache ran out of blocks. Raise --num-blocks.")
            for row, so_far in enumerate(new_tokens):
                so_far.extend(made[row, : counts[row]].tolist())
            progress.update(int(counts.sum()))
            if (tokens == NULL_TOKEN).all():
                break
        self.tally.decode_seconds += time.perf_counter() - started
        self.tally.new_tokens += sum(map(len, new_tokens))
        stats = self._manager.stats()
        used = stats.total_blocks - stats.free_blocks
        self.tally.peak_blocks = max(self.tally.peak_blocks, used)
        for number in batch:
            self._manager.deallocate(number)
        return dict(zip(batch, new_tokens, strict=True))

    def _prefill(
        self, state: CacheState, seq_ids: np.ndarray, token_ids: Sequence[Sequence[int]]
    ) -> tuple[CacheState, jax.Array]:
        logits, state = prefill(self._model_fn, self._params, state, seq_ids, token_ids)
        return state, jax.block_until_ready(logits)

    def _generate(
        self, state: CacheState, seq_ids: np.ndarray, tokens: np.ndarray, limits: np.ndarray
    ) -> tuple[CacheState, tuple[jax.Array, ...]]:
        options = dataclasses.replace(self._options, limits=limits)
        out: Generated = generate(
            self._model_fn, self._params, state, seq_ids, tokens, options=options, key=self._key
        )
        return out.state, (out.tokens, out.num_tokens, out.next_tokens, out.ok)


def main(arguments: Sequence[str] | None = None) -> None:
    """Decodes prompts through the paged cache, and reports."""
    args = _parse(arguments)
    path = weights.resolve(args.model)
    print(f"Loading {path.name} on {jax.devices()[0].device_kind}", file=sys.stderr)
    # XLA on CPU converts 16-bit weights at every use, which takes eight times as long.
    weight_dtype = "float32" if jax.default_backend() == "cpu" else args.dtype
    config, params, tokenizer = weights.load(path, weight_dtype)
    token_ids = prompts.read_prompts(args.prompt, args.prompts_file, tokenizer, chat=args.chat)

    num_rows = min(len(token_ids), args.batch_size)
    batches, manager = _plan(args, config, token_ids, num_rows)
    decoder = Decoder(
        llama.from_params(config, params),
        manager,
        num_rows,
        args.max_new_tokens,
        Sampling(temperature=args.temperature),
        () if args.ignore_eos else tokenizer.eos_token_ids,
    )
    print("Compiling", file=sys.stderr)
    decoder.warm_up(batches)
    new_tokens: dict[int, list[int]] = {}
    with tqdm.tqdm(total=len(token_ids) * args.max_new_tokens, unit="tok") as progress:
        for batch in batches:
            new_tokens |= decoder.run(batch, progress)
    results = [
        {
            "prompt_token_ids": ids,
            "new_token_ids": new_tokens[number],
            "text": tokenizer.decode(new_tokens[number]),
        }
        for number, ids in enumerate(token_ids)
    ]
    for result in results:
        print(f"\n> {tokenizer.decode(result['prompt_token_ids'])}\n{result['text']}")
    longest = max(map(len, token_ids)) + args.max_new_tokens
    report = _report(decoder.tally, manager, num_rows * longest)
    _print_table(report)
    if args.json:
        args.json.write_text(json.dumps({"results": results, **report}, indent=1))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    add("--prompts-file", type=pathlib.Path, metavar="FILE", help="a prompt a line, or .jsonl")
    add("--chat", action="store_true", help="wrap prompts in the model's chat template")
    add("--model", metavar="PATH", help="GGUF file or safetensors folder; SmolLM2-135M if absent")
    add("--max-new-tokens", type=_count, default=64, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--ignore-eos", action="store_true", help="go on after the end of an answer")
    add("--block-size", type=_count, default=16, help="tokens a block")
    add("--num-blocks", type=_count, help="blocks of the pool; enough for a batch if absent")
    add("--batch-size", type=_count, default=32, help="prompts decoded at once, at most")
    dtypes = ("float32", "bfloat16", "float16")
    add(
        "--dtype",
        choices=dtypes,
        default="float32",
        help="of the cache; off CPU, of the weights too",
    )
    add("--json", type=pathlib.Path, metavar="FILE", help="write tokens and statistics")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _plan(
    args: argparse.Namespace,
    config: llama.LlamaConfig,
    token_ids: Sequence[list[int]],
    num_rows: int,
) -> tuple[list[dict[int, list[int]]], PagedKvCacheManager]:
    """Splits prompts into batches, and makes a cache that holds the largest."""
    longest = max(map(len, token_ids)) + args.max_new_tokens
    if longest > config.max_sequence_length:
        raise SystemExit(
            f"The longest prompt and {args.max_new_tokens} new tokens are {longest} tokens; the "
            f"model holds {config.max_sequence_length}. Shorten it, or lower --max-new-tokens."
        )
    needed = [-(-(len(ids) + args.max_new_tokens) // args.block_size) for ids in token_ids]
    num_blocks = args.num_blocks or sum(sorted(needed)[-num_rows:])
    if max(needed) > num_blocks:
        raise SystemExit(
            f"One prompt with its new tokens needs {max(needed)} blocks, there are {num_blocks}. "
            "Raise --num-blocks."
        )
    manager = PagedKvCacheManager(
        CacheConfig(
            block_size=args.block_size,
            max_blocks=num_blocks,
            initial_blocks=num_blocks,
            target_devices=(Device.of(jax.devices()[0]),),
        ),
        CacheGeometry(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=args.dtype,
            max_seqs=num_rows,
            max_sequence_length=longest,
        ),
    )
    return _batches(token_ids, needed, num_rows, num_blocks), manager


def _batches(
    token_ids: Sequence[list[int]], needed: Sequence[int], num_rows: int, num_blocks: int
) -> list[dict[int, list[int]]]:
    """Splits prompts, in order, so that each batch's blocks fit even at its longest."""
    batches: list[dict[int, list[int]]] = [{}]
    room = num_blocks
    for number, (ids, blocks) in enumerate(zip(token_ids, needed, strict=True)):
        if len(batches[-1]) == num_rows or blocks > room:
            batches.append({})
            room = num_blocks
        batches[-1][number] = ids
        room -= blocks
    return batches


def _rows_of_a_step(batch: dict[int, list[int]], shape: PrefillOptions) -> int:
    """Returns the rows of the prefill step that a batch is packed into."""
    num_chunks = sum(-(-len(ids) // shape.chunk_tokens) for ids in batch.values())
    return min(shape.rows_per_step, 1 << (num_chunks - 1).bit_length())


def _report(tally: Tally, manager: PagedKvCacheManager, dense_tokens: int) -> dict[str, Any]:
    stats = manager.stats()
    block_bytes = stats.total_memory_bytes // stats.total_blocks
    return {
        "seconds": tally.prefill_seconds + tally.decode_seconds,
        "compile_seconds": tally.compile_seconds,
        "prefill_tokens_per_second": tally.prompt_tokens / tally.prefill_seconds,
        "decode_tokens_per_second": tally.new_tokens / tally.decode_seconds,
        "cache": {
            **dataclasses.asdict(stats),
            "block_size": manager.block_size(),
            "peak_blocks": tally.peak_blocks,
            "peak_bytes": tally.peak_blocks * block_bytes,
            "dense_bytes": dense_tokens * block_bytes // manager.block_size(),
            "prompt_tokens": tally.prompt_tokens,
            "new_tokens": tally.new_tokens,
        },
    }


def _print_table(report: dict[str, Any]) -> None:
    cache = report["cache"]
    mib = 1 << 20
    share = cache["peak_bytes"] / cache["dense_bytes"]
    rows = (
        ("prefill", f"{cache['prompt_tokens']} tokens",
         f"{report['prefill_tokens_per_second']:.0f} tokens/s"),
        ("decode", f"{cache['new_tokens']} tokens",
         f"{report['decode_tokens_per_second']:.0f} tokens/s"),
        ("compile", "", f"{report['compile_seconds']:.1f} s"),
        ("blocks used", f"{cache['peak_blocks']} of {cache['total_blocks']}",
         f"of {cache['block_size']} tokens"),
        ("peak cache", f"{cache['peak_bytes'] / mib:.1f} MiB",
         f"{share:.0%} of a padded dense cache ({cache['dense_bytes'] / mib:.1f} MiB)"),
    )  # fmt: skip
    print()
    for name, amount, note in rows:
        print(f"{name:<12} {amount:>12}  {note}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"{error}") from None
