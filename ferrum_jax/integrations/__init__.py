"""Model adapters, decode loops and serving on a paged cache.

`PagedBatch` is a model's view of the cache; `prefill`, `generate`, `serve` and `rollout` run a
model on it, and an `Engine` serves requests as they come. Attention modules for Flax are in
`ferrum_jax.integrations.nnx` and `.linen`, which are imported separately: the rest of the package
does not need Flax.

A call outside `jit` may consume (donate) an argument; afterwards only the result may be used:

| call | consumes |
|---|---|
| `allocate`, `extend`, `free`, `gather`, `paged_attention`, `record_queries` | nothing |
| `prefill`, `prompt_logprobs`, `write`, `copy_blocks`, `PagedBatch.write` | the pool |
| `generate`, `serve`, `rollout`, `fork`, `share`, `truncate` | the whole state |
"""

from ferrum_jax.integrations.batch import PagedBatch, Rotary, attend_new
from ferrum_jax.integrations.engine import (
    Completion,
    Engine,
    EngineOptions,
    RequestOptions,
    StepShape,
    TakenToken,
)
from ferrum_jax.integrations.generate import Generated, GenerateOptions, generate
from ferrum_jax.integrations.logprobs import NULL_TOKEN, Chosen, token_logprobs, top_logprobs
from ferrum_jax.integrations.mixed import MixedBatch, StepOptions
from ferrum_jax.integrations.models import ModelFn
from ferrum_jax.integrations.prefill import PrefillOptions, prefill
from ferrum_jax.integrations.prompt_logprobs import (
    PromptLogprobs,
    PromptLogprobsOptions,
    prompt_logprobs,
)
from ferrum_jax.integrations.queries import record_queries
from ferrum_jax.integrations.rollout import Rollout, Samples, rollout
from ferrum_jax.integrations.sampling import Sampling, token_keys
from ferrum_jax.integrations.serve import Served, serve
from ferrum_jax.integrations.serve_loop import ServeOptions

__all__ = [
    "Chosen",
    "Completion",
    "Engine",
    "EngineOptions",
    "GenerateOptions",
    "Generated",
    "MixedBatch",
    "ModelFn",
    "NULL_TOKEN",
    "PagedBatch",
    "PrefillOptions",
    "PromptLogprobs",
    "PromptLogprobsOptions",
    "RequestOptions",
    "Rollout",
    "Rotary",
    "Samples",
    "Sampling",
    "ServeOptions",
    "Served",
    "StepOptions",
    "StepShape",
    "TakenToken",
    "attend_new",
    "generate",
    "prefill",
    "prompt_logprobs",
    "record_queries",
    "rollout",
    "serve",
    "token_keys",
    "token_logprobs",
    "top_logprobs",
]
