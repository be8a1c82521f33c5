"""The cache inside Flax models and decode loops.

`prefill` and `generate` are the functions here; the options beside them are in the modules of the
same names. What needs Flax is in `ferrum_jax.integrations.nnx` and `.linen`, to be imported by
themselves.

What a call outside `jit` consumes, so that only the result may be used from then on:

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
