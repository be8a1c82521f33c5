"""Decodes prompts of different lengths in one batch: a language model on a paged cache.

Run `python examples/generate.py --help` for the options.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from examples.models import downloads, families, floor, inputs, prompts, weights
from examples.models.cache import CacheOptions, make_cache
from examples.models.tally import Tally, answer_all
from ferrum_jax import PagedKvCacheManager
from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention import prepare_kernels
from ferrum_jax.decoding.sampling import Sampling
from ferrum_jax.integrations.engine import (
    Completion,
    Engine,
    EngineOptions,
    RequestOptions,
    StepShape,
)
from ferrum_jax.integrations.mixed import StepOptions

_FEWEST_ROWS = 8  # A step of fewer rows takes nearly as long: it reads the same weights.


def main(arguments: Sequence[str] | None = None) -> None:
    """Decodes prompts through the paged cache, and prints texts and statistics."""
    args = _parse(arguments)
    given = prompts.read_prompts(args.prompt, args.prompts_file)
    downloads.keep_programs()
    prepare_kernels(args.dtype)
    path = downloads.resolve(args.model)
    print(f"Loading {path.name} on {jax.devices()[0].device_kind}", file=sys.stderr)
    # XLA on CPU converts 16-bit weights at every use, which takes eight times as long.
    weight_dtype = "float32" if jax.default_backend() == "cpu" else args.dtype
    config, params, tokenizer = weights.load(path, weight_dtype)
    token_ids = prompts.encode_prompts(given, tokenizer, config.vocab_size, chat=args.chat)

    num_rows = min(len(token_ids), args.batch_size)
    cache_options = CacheOptions(
        dtype=args.dtype,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        num_rows=num_rows,
        caches_prefixes=not args.no_prefix_caching,
    )
    manager = make_cache(config, token_ids, args.max_new_tokens, cache_options)
    model = families.from_params(config, params)
    options = _engine_options(token_ids, num_rows, args.sampling)
    with Engine(*families.functional(model), manager, options) as engine:
        print("Compiling", file=sys.stderr)
        started = time.perf_counter()
        engine.warm_up(_shapes(options, refills=len(token_ids) > num_rows))
        compile_seconds = time.perf_counter() - started
        request = RequestOptions(
            max_new_tokens=args.max_new_tokens,
            stop_token_ids=() if args.ignore_eos else tokenizer.eos_token_ids,
        )
        with tqdm.tqdm(total=len(token_ids) * args.max_new_tokens, unit="tok") as progress:
            answers, tally = answer_all(engine, manager, token_ids, request, progress)
    print("Timing the model's matrix products alone", file=sys.stderr)
    chunk_tokens = options.step.chunk_tokens
    results = [
        {
            "prompt_token_ids": answer.prompt,
            "new_token_ids": answer.tokens,
            "text": tokenizer.decode(answer.tokens),
        }
        for answer in answers
    ]
    report = {
        "compile_seconds": compile_seconds,
        "floor_seconds": floor.products_seconds(model, engine.step_counts, chunk_tokens),
        "preempted": engine.num_preempted,
        **_report(answers, tally, manager, num_rows),
    }
    for result in results:
        print(f"\n> {tokenizer.decode(result['prompt_token_ids'])}\n{result['text']}")
    _print_table(report)
    if args.json:
        inputs.write_json(args.json, {"results": results, **report})


def _engine_options(
    token_ids: Sequence[Sequence[int]], num_rows: int, sampling: Sampling
) -> EngineOptions:
    """Returns the engine's options: its steps read no more chunks than the prompts have."""
    step = StepOptions()
    num_chunks = sum(ceil_div(len(ids), step.chunk_tokens) for ids in token_ids)
    step = StepOptions(chunks_per_step=min(step.chunks_per_step, num_chunks))
    return EngineOptions(max_rows=num_rows, step=step, sampling=sampling)


def _shapes(options: EngineOptions, *, refills: bool) -> list[StepShape]:
    """Returns the shapes of steps that a run takes most: each takes a second to compile."""
    last = options.step_shapes[-1]
    fewest_rows = min(last.num_rows, _FEWEST_ROWS)
    return [
        shape
        for shape in options.step_shapes
        if shape == last
        or (not shape.num_chunks and shape.num_rows >= fewest_rows)
        or (refills and shape.num_rows == last.num_rows)
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    add("--prompts-file", type=pathlib.Path, metavar="FILE", help="one prompt per line, or .jsonl")
    add("--chat", action="store_true", help="wrap prompts in the model's chat template")
    add(
        "--model",
        metavar="PATH",
        help=f"GGUF file, safetensors folder, or one of {', '.join(downloads.DOWNLOADS)} "
        f"({downloads.DEFAULT_MODEL})",
    )
    add(
        "--max-new-tokens",
        type=inputs.parse_count,
        default=64,
        metavar="N",
        help="new tokens per prompt (%(default)s)",
    )
    add(
        "--temperature",
        dest="sampling",
        type=_sampling,
        default=Sampling(),
        metavar="T",
        help="0, the default, takes the most likely token",
    )
    add("--ignore-eos", action="store_true", help="continue after the end of an answer")
    add("--block-size", type=inputs.parse_count, default=16, help="tokens per block (%(default)s)")
    add(
        "--num-blocks",
        type=inputs.parse_count,
        help="blocks of the pool; enough for a batch if absent",
    )
    add("--no-prefix-caching", action="store_true", help="compute every prompt in full")
    add(
        "--batch-size",
        type=inputs.parse_count,
        default=32,
        help="most prompts decoded at once (%(default)s)",
    )
    dtypes = ("float32", "bfloat16", "float16")
    add(
        "--dtype",
        choices=dtypes,
        default="float32",
        help="dtype of the cache; off CPU, of the weights too (%(default)s)",
    )
    add("--json", type=pathlib.Path, metavar="FILE", help="write tokens and statistics")
    args = parser.parse_args(arguments)
    if args.prompts_file is not None and not args.prompts_file.is_file():
        parser.error(f"--prompts-file {args.prompts_file} is not a file")
    inputs.check_output(parser, "--json", args.json)
    return args


def _sampling(text: str) -> Sampling:
    try:
        return Sampling(temperature=float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(inputs.one_line(error)) from None


def _report(
    answers: Sequence[Completion], tally: Tally, manager: PagedKvCacheManager, num_rows: int
) -> dict[str, Any]:
    stats = manager.stats()
    block_bytes, groups = stats.total_memory_bytes // stats.total_blocks, stats.group_blocks
    prompt_tokens = sum(len(answer.prompt) for answer in answers)
    reused_tokens = sum(answer.num_cached_tokens or 0 for answer in answers)
    dense_tokens = num_rows * max(len(answer.prompt) + len(answer.tokens) for answer in answers)
    return {
        "seconds": tally.seconds,
        "tokens_per_second": (prompt_tokens - reused_tokens + tally.num_new) / tally.seconds,
        "decode_tokens_per_second": tally.decode_tokens_per_second,
        "first_token_seconds": {
            "mean": statistics.mean(tally.first_token_seconds),
            "last": tally.first_token_seconds[-1],
        },
        "cache": {
            **dataclasses.asdict(stats),
            "block_size": manager.block_size(),
            "peak_blocks": tally.peak_blocks,
            "group_blocks": tally.group_blocks,
            "peak_bytes": tally.peak_blocks * block_bytes,
            "dense_bytes": dense_tokens * block_bytes * len(groups) // manager.block_size(),
            "prompt_tokens": prompt_tokens,
            "reused_prompt_tokens": reused_tokens,
            "new_tokens": tally.num_new,
        },
    }


def _print_table(report: dict[str, Any]) -> None:
    cache, first = report["cache"], report["first_token_seconds"]
    mib = 1 << 20
    peak, dense = (cache[f"{name}_bytes"] for name in ("peak", "dense"))
    if peak > dense:  # A few short rows: the empty parts of their last blocks outweigh the rest.
        comparison = f"a padded dense cache takes {dense / mib:.1f} MiB; blocks are not full"
    else:
        comparison = f"{peak / dense:.0%} of a padded dense cache ({dense / mib:.1f} MiB)"
    rows = (
        ("prompts", f"{cache['prompt_tokens']} tokens",
         f"{cache['reused_prompt_tokens']} of them found in the prefix cache"),
        ("first token", f"{first['mean']:.2f} s", f"on average; {first['last']:.2f} s the last"),
        ("decode", f"{cache['new_tokens']} tokens",
         f"{report['decode_tokens_per_second']:.0f} tokens/s after the first one"),
        ("all", f"{report['seconds']:.2f} s",
         f"{report['tokens_per_second']:.0f} tokens/s, prompts included"),
        ("floor", f"{report['floor_seconds']:.2f} s",
         f"{report['floor_seconds'] / report['seconds']:.0%} of that: the model's matrix products "
         "alone, in the same steps"),
        ("compile", f"{report['compile_seconds']:.1f} s", "before the clock started"),
        ("blocks used", f"{cache['peak_blocks']} of {cache['total_blocks']}",
         f"{cache['block_size']} tokens each"),
        ("peak cache", f"{peak / mib:.1f} MiB", comparison),
    )  # fmt: skip
    if report["preempted"]:
        rows += (("preempted", f"{report['preempted']} times", "there were too few blocks"),)
    groups = cache["group_blocks"]
    if len(groups) > 1:  # A window has released what it passed.
        kinds: dict[str, list[int]] = {}
        for name, blocks in groups.items():
            kinds.setdefault(name.split("/")[0], []).append(blocks)
        listed = ", ".join(f"{kind} {' + '.join(map(str, kinds[kind]))}" for kind in kinds)
        rows += (("held at end", f"{sum(groups.values())} blocks", listed),)
    print()
    for name, amount, note in rows:
        print(f"{name:<12} {amount:>12}  {note}")


if __name__ == "__main__":
    inputs.run_script(main)
