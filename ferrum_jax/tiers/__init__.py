"""Where blocks go that leave the device: host memory, and files behind it."""

from ferrum_jax.tiers.store import TieredStore, TierStats

__all__ = ["TierStats", "TieredStore"]
