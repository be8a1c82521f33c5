"""The prefix cache: a radix tree of cached blocks that prompts with equal beginnings share."""

from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.report import LookupReport, Stop

__all__ = ["LookupReport", "PrefixCache", "Stop"]
