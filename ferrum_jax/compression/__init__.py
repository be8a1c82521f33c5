"""Compression of caches: token formats of fewer bits, dropped tokens, and fitted tokens."""

from ferrum_jax.compression.methods import CompressionMethod

__all__ = ["CompressionMethod"]
