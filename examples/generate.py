"""Decodes prompts of different lengths in one batch: a language model on a paged cache.

Run `python examples/generate.py --help` for the options.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from examples.models import downloads, families, inputs, prompts, weights
from examples.models.decoder import CacheOptions, Decoder, Tally, plan
from ferrum_jax import PagedKvCacheManager
from ferrum_jax.integrations.generate import GenerateOptions
from ferrum_jax.integrations.sampling import Sampling

SLICE_TOKENS = 16  # New tokens per row between two updates of the progress bar.


def main(arguments: Sequence[str] | None = None) -> None:
    """Decodes prompts through the paged cache, and prints texts and statistics."""
    args = _parse(arguments)
    given = prompts.read_prompts(args.prompt, args.prompts_file)
    path = downloads.resolve(args.model)
    print(f"Loading {path.name} on {jax.devices()[0].device_kind}", file=sys.stderr)
    # XLA on CPU converts 16-bit weights at every use, which takes eight times as long.
    weight_dtype = "float32" if jax.default_backend() == "cpu" else args.dtype
    config, params, tokenizer = weights.load(path, weight_dtype)
    token_ids = prompts.encode_prompts(given, tokenizer, config.vocab_size, chat=args.chat)

    options = CacheOptions(
        dtype=args.dtype,
        block_size=args.block_size,
        num_blocks=args.num_blocks,
        batch_size=args.batch_size,
        caches_prefixes=not args.no_prefix_caching,
    )
    batches, manager = plan(config, token_ids, args.max_new_tokens, options)
    num_rows = min(len(token_ids), args.batch_size)
    decoder = Decoder(
        families.from_params(config, params),
        manager,
        num_rows,
        args.max_new_tokens,
        GenerateOptions(
            max_new_tokens=min(SLICE_TOKENS, args.max_new_tokens),
            sampling=args.sampling,
            stop_token_ids=() if args.ignore_eos else tokenizer.eos_token_ids,
        ),
        caches_prefixes=options.caches_prefixes,
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
        inputs.write_json(args.json, {"results": results, **report})


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


def _report(tally: Tally, manager: PagedKvCacheManager, dense_tokens: int) -> dict[str, Any]:
    stats = manager.stats()
    block_bytes = stats.total_memory_bytes // stats.total_blocks
    return {
        "seconds": tally.prefill_seconds + tally.decode_seconds,
        "compile_seconds": tally.compile_seconds,
        "prefill_tokens_per_second": tally.computed_tokens / tally.prefill_seconds,
        "decode_tokens_per_second": tally.new_tokens / tally.decode_seconds,
        "cache": {
            **dataclasses.asdict(stats),
            "block_size": manager.block_size(),
            "peak_blocks": tally.peak_blocks,
            "peak_bytes": tally.peak_blocks * block_bytes,
            "dense_bytes": dense_tokens * block_bytes // manager.block_size(),
            "prompt_tokens": tally.prompt_tokens,
            "reused_prompt_tokens": tally.reused_tokens,
            "new_tokens": tally.new_tokens,
        },
    }


def _print_table(report: dict[str, Any]) -> None:
    cache = report["cache"]
    mib = 1 << 20
    peak, dense = (cache[f"{name}_bytes"] for name in ("peak", "dense"))
    if peak > dense:  # A few short rows: the empty parts of their last blocks outweigh the rest.
        comparison = f"a padded dense cache takes {dense / mib:.1f} MiB; blocks are not full"
    else:
        comparison = f"{peak / dense:.0%} of a padded dense cache ({dense / mib:.1f} MiB)"
    rows = (
        ("prompts", f"{cache['prompt_tokens']} tokens",
         f"{cache['reused_prompt_tokens']} of them found in the prefix cache"),
        ("prefill", f"{cache['prompt_tokens'] - cache['reused_prompt_tokens']} tokens",
         f"{report['prefill_tokens_per_second']:.0f} tokens/s"),
        ("decode", f"{cache['new_tokens']} tokens",
         f"{report['decode_tokens_per_second']:.0f} tokens/s"),
        ("compile", "", f"{report['compile_seconds']:.1f} s"),
        ("blocks used", f"{cache['peak_blocks']} of {cache['total_blocks']}",
         f"{cache['block_size']} tokens each"),
        ("peak cache", f"{peak / mib:.1f} MiB", comparison),
    )  # fmt: skip
    print()
    for name, amount, note in rows:
        print(f"{name:<12} {amount:>12}  {note}")


if __name__ == "__main__":
    inputs.run_script(main)
