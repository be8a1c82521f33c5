"""Google's package `gemma` on a paged cache: its models, and a sampler like its own.

The package is the extra `gemma`, and needs Python 3.12 or later. It is imported when a sampler is
made.
"""

from ferrum_jax.integrations.gemma.model import GemmaModel
from ferrum_jax.integrations.gemma.results import SamplerOutput, SamplerState
from ferrum_jax.integrations.gemma.sampler import PagedSampler
from ferrum_jax.integrations.gemma.sampling import MethodSampling

__all__ = ["GemmaModel", "MethodSampling", "PagedSampler", "SamplerOutput", "SamplerState"]
