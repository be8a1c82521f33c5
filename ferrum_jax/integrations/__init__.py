"""Model adapters and decode loops on a paged cache.

`PagedBatch` is a model's view of the cache; `prefill` and `generate` run a model on it. Attention
modules for Flax are in `ferrum_jax.integrations.nnx` and `.linen`, which are imported separately:
the rest of the package does not need Flax.

A call outside `jit` may consume (donate) an argument; afterwards only the result may be used:

| call | consumes |
|---|---|
| `allocate`, `extend`, `free`, `gather`, `paged_attention`, `record_queries` | nothing |
| `prefill`, `write`, `copy_blocks`, `PagedBatch.write` | the pool |
| `generate`, `fork`, `share`, `truncate` | the whole state |
"""

from ferrum_jax.integrations.batch import PagedBatch, Rotary, attend_new
from ferrum_jax.integrations.generate import NULL_TOKEN, Generated, GenerateOptions, generate
from ferrum_jax.integrations.models import ModelFn
from ferrum_jax.integrations.prefill import PrefillOptions, prefill
from ferrum_jax.integrations.queries import record_queries
from ferrum_jax.integrations.sampling import Sampling

__all__ = [
    "NULL_TOKEN",
    "GenerateOptions",
    "Generated",
    "ModelFn",
    "PagedBatch",
    "PrefillOptions",
    "Rotary",
    "Sampling",
    "attend_new",
    "generate",
    "prefill",
    "record_queries",
]
