"""What a smaller cache should hold: which tokens stay, and what they become."""

from ferrum_jax.compression.methods import CompressionMethod

__all__ = ["CompressionMethod"]
