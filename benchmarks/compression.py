"""Compression of a real model's cache: bytes that each method frees, and its effect on the text.

The held-out text is Python's own help (`pydoc_data.topics`); its first tokens are the prompt. The
prompt is prefilled, its cache is compressed, and the rest of the text is decoded through the
compressed cache, one token at a time. The perplexity is that of these tokens; the agreement is how
often the most likely token is that of the uncompressed cache. The tokens that the uncompressed
cache generates are decoded too: up to the first difference, both would have generated the same.

Methods that need queries take those of the prompt's last tokens; the attention error of every
method is measured on these, so that fitted ones have seen what they are measured on there.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import make_parser, print_table, progress, run
from benchmarks.held_text import COMPRESSED_FORMATS, TOPICS, Outcome, Subject, held_texts
from examples.models import downloads, families, weights
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.compression.scores import scorer_names
from ferrum_jax.types import TokenFormat

_MIB = 2**20
_FIT_STEPS = 60
_CHEAP, _INFORMED = "key_difference", "observed_attention"
_COLUMNS = {
    "method": "method",
    "asked": "ratio asked",
    "ratio": "ratio",
    "freed_mib": "MiB freed",
    "seconds": "seconds",
    "attention_error": "attention error",
    "perplexity": "perplexity",
    "times_plain": "times plain",
    "standard_error": "+-",
    "agreement": "agreement",
    "own_agreement": "on own text",
    "same_tokens": "same tokens",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to compress, and how far.

    Attributes:
      ratio: Bytes after over bytes before, as asked.
      method: What may be done.
    """

    ratio: float
    method: CompressionMethod

    @property
    def name(self) -> str:
        """What is done, in words; nothing of how far."""
        method = self.method
        if method.token_format is None:
            return "default"
        parts = [method.token_format.name, method.scorer, "fitted" if method.fit_steps else None]
        return ", ".join(part for part in parts if part is not None)


def all_cases() -> list[Case]:
    """Returns what a whole run compares, in the order of the table."""
    cases = [_case(token_format, 0.6) for token_format in COMPRESSED_FORMATS]
    cases += [
        _case(TokenFormat.Native, ratio, scorer)
        for scorer in scorer_names()
        for ratio in (0.75, 0.5, 0.25)
    ]
    cases += [
        _case(TokenFormat.Native, ratio, scorer, _FIT_STEPS)
        for scorer in (_CHEAP, _INFORMED)
        for ratio in (0.5, 0.25)
    ]
    cases += [
        _case(token_format, ratio, scorer)
        for token_format in COMPRESSED_FORMATS
        for scorer in (_CHEAP, _INFORMED)
        for ratio in (0.25, 0.125)
    ]
    return cases + [Case(ratio, CompressionMethod()) for ratio in (0.5, 0.25, 0.125)]


def quick_cases() -> list[Case]:
    """Returns one case of each kind."""
    return [
        _case(TokenFormat.Int8, 0.6),
        _case(TokenFormat.Native, 0.5, _CHEAP),
        _case(TokenFormat.Native, 0.5, _INFORMED, num_steps=4),
        Case(0.25, CompressionMethod()),
    ]


def _case(
    token_format: TokenFormat, ratio: float, scorer: str | None = None, num_steps: int = 0
) -> Case:
    method = CompressionMethod(token_format=token_format, scorer=scorer, fit_steps=num_steps)
    return Case(ratio, method)


def num_same(choices: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns how many tokens two [R, T] have in common before they first differ: [R].

    Example:
      >>> num_same(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 9, 3], [4, 5, 6]])).tolist()
      [1, 3]
    """
    return np.cumprod(choices == others, axis=1).sum(axis=1)


def figures_of(case: Case | None, outcome: Outcome, plain: Outcome) -> dict[str, Any]:
    """Sets a case beside the uncompressed cache.

    Args:
      case: What was done; None for nothing.
      outcome: What became of it.
      plain: The same of the uncompressed cache.

    Returns:
      A row of figures; of the texts it tells the mean, and of seconds the median, since the
      first call compiles. `standard_error` is that of `times_plain`, from text to text.
    """
    losses = (plain.log_probs - outcome.log_probs).mean(axis=1)
    spread = losses.std(ddof=1) / losses.size**0.5 if losses.size > 1 else 0.0
    times_plain = float(np.exp(losses.mean()))
    row: dict[str, Any] = {"method": "uncompressed", "asked": 1.0, "ratio": 1.0, "fit_steps": 0}
    row |= dict.fromkeys(("freed_mib", "seconds", "attention_error"), 0.0)
    if case is not None:
        means = {
            key: statistics.fmean(getattr(report, key) for report in outcome.reports)
            for key in ("ratio", "attention_error", "pruning_error", "fitting_error")
        }
        freed = statistics.fmean(report.freed_bytes for report in outcome.reports)
        row |= {
            "method": case.name,
            "asked": case.ratio,
            "fit_steps": case.method.fit_steps,
            "format": outcome.reports[0].token_format.name,
            "kept_tokens": outcome.reports[0].num_kept_tokens,
            "freed_mib": freed / _MIB,
            "seconds": statistics.median(report.seconds for report in outcome.reports),
            **means,
        }
    same = num_same(outcome.own_choices, plain.own_choices)
    return row | {
        "perplexity": float(np.exp(-outcome.log_probs.mean())),
        "times_plain": times_plain,
        "standard_error": float(spread) * times_plain,
        "agreement": float((outcome.choices == plain.choices).mean()),
        "own_agreement": float((outcome.own_choices == plain.own_choices).mean()),
        "same_tokens": float(same.mean()),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compresses in every way, and prints the table."""
    args.num_texts = args.num_texts or (2 if args.quick else len(TOPICS))
    args.num_prompt = args.num_prompt or (256 if args.quick else 1024)
    args.num_text = args.num_text or (16 if args.quick else 128)
    args.num_own = args.num_own or (16 if args.quick else 64)
    cases = quick_cases() if args.quick else all_cases()
    config, params, tokenizer = weights.load(downloads.resolve(args.model))
    num_tokens = args.num_prompt + args.num_text + 1
    texts = held_texts(tokenizer.encode, args.num_texts, num_tokens)
    model = families.functional(families.from_params(config, params))
    subject = Subject(config, model, texts, args)
    plain = subject.run()
    rows = [figures_of(None, plain, plain)]
    rows += [
        figures_of(case, subject.run(case.ratio, case.method), plain)
        for case in progress(cases, "method")
    ]
    print_table(list(_COLUMNS.values()), [[row[key] for key in _COLUMNS] for row in rows])
    return {"texts": list(TOPICS[: args.num_texts]), "methods": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("compression", __doc__, quick="two short texts, a few methods")
    parser.add_argument("--model", metavar="PATH", help="see examples/generate.py")
    parser.add_argument("--num-texts", type=int, help=f"at most {len(TOPICS)}")
    parser.add_argument("--num-prompt", type=int, help="tokens of the prompt, which are compressed")
    parser.add_argument("--num-text", type=int, help="tokens of the text that go on through it")
    parser.add_argument("--num-own", type=int, help="generated tokens that go on through it")
    parser.add_argument("--num-queries", type=int, default=32, help="tokens that queries are of")
    parser.add_argument("--block-size", type=int, default=16, help="tokens")
    parser.add_argument("--dtype", default="bfloat16", help="of the cache; weights are float32")
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
