"""The list of benchmarks: the question, the duration and the requirements of each."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A benchmark as the list shows it.

    Attributes:
      asks: Its question, in a line.
      takes: How long a run takes, and a quick one.
      platform: Device that it is for: "cpu", "gpu", or None for any.
      packages: Packages that it imports beside those of ferrum_jax.
      needs_trace: Whether it needs a trace of requests.
      runs: Options of each stored run, by the suffix of its file name.
    """

    asks: str
    takes: str
    platform: str | None = None
    packages: Sequence[str] = ()
    needs_trace: bool = False
    runs: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=lambda: {"": ()})

    def why_not(self, platform: str, trace: pathlib.Path | None) -> str | None:
        """Returns why this benchmark cannot run, or None if it can.

        Args:
          platform: JAX's name for the devices here.
          trace: A trace of requests, if there is one.
        """
        if self.platform not in (None, platform):
            return f"it is for a {self.platform.upper()}, and JAX has a {platform.upper()} here"
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed: pip install -e '.[benchmarks]'"
        if self.needs_trace and trace is None:
            return "it needs a trace of requests: name one with --trace FILE"
        return None


CATALOGUE: Mapping[str, Entry] = {
    "allocator": Entry(
        asks="what do allocate, extend and free cost, whatever the pool's size?",
        takes="1 minute (quick: 20 seconds)",
    ),
    "prefix": Entry(
        asks="what do a lookup, a request and an eviction cost among many cached prompts?",
        takes="1 minute (quick: 5 seconds)",
    ),
    "replay": Entry(
        asks="how much of a trace of requests does each block policy find in the cache?",
        takes="3 minutes (quick: 15 seconds)",
        needs_trace=True,
    ),
    "tiers": Entry(
        asks="what does it cost to swap blocks to host memory or disk and back?",
        takes="1 minute (quick: 5 seconds)",
    ),
    "groups": Entry(
        asks="what do layer groups save, and what do they cost?",
        takes="5 minutes (quick: 1 minute)",
    ),
    "attention": Entry(
        asks="how fast is a decoding step of attention, compared with a plain read of memory?",
        takes="5 minutes (quick: 20 seconds)",
        platform="cpu",
    ),
    "gpu_attention": Entry(
        asks="the same on a GPU: our kernel against others, as parts of a plain copy",
        takes="9 minutes (quick: 2 minutes)",
        platform="gpu",
    ),
    "generate": Entry(
        asks="how fast is a whole model on the paged cache, against a dense one?",
        takes="10 minutes (quick: 1 minute)",
        packages=("gguf", "jinja2", "safetensors", "tokenizers"),
        runs={
            "-float32": ("--dtype", "float32"),
            "-bfloat16": ("--dtype", "bfloat16"),
        },
    ),
    "serve": Entry(
        asks="how many tokens does a serving engine give, and how soon the first one?",
        takes="15 minutes (quick: 3 minutes)",
        packages=("gguf", "jinja2", "safetensors", "tokenizers"),
    ),
    "rollout": Entry(
        asks="how many tokens does a rollout of RL training give, and in how much memory?",
        takes="5 minutes (quick: 1 minute)",
    ),
    "compression": Entry(
        asks="what does each way of compressing a cache cost a whole model's text?",
        takes="20 minutes (quick: 2 minutes)",
        packages=("gguf", "jinja2", "safetensors", "tokenizers"),
    ),
}
