"""Attention to keys and values in the blocks of a pool.

A *backend* computes it: native code on CPU (`cpu`), Pallas kernels on GPU and TPU (`gpu`, `tpu`),
or XLA's operations anywhere (`xla`). `reference` is for tests.
"""

from ferrum_jax.attention.backend import AttentionBackend
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.cpu import prepare_kernels
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.attention.paged import explain_backend, paged_attention
from ferrum_jax.attention.selection import BackendChoice, BackendExplanation

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "AttentionOptions",
    "BackendChoice",
    "BackendExplanation",
    "explain_backend",
    "paged_attention",
    "prepare_kernels",
]
