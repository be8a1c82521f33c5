"""The cache inside Flax models and decode loops."""

from ferrum_jax.integrations.batch import PagedBatch

__all__ = ["PagedBatch"]
