"""Storage of swapped-out blocks: host memory, and files on disk."""

from ferrum_jax.tiers.store import TieredStore

__all__ = ["TieredStore"]
