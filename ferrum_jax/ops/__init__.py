"""Pure operations on the cache, jitted: allocation, sharing, storage, migration."""

from ferrum_jax.ops.sequences import allocate, extend, fork, free, share, truncate
from ferrum_jax.ops.storage import copy_blocks, gather, write

__all__ = [
    "allocate",
    "copy_blocks",
    "extend",
    "fork",
    "free",
    "gather",
    "share",
    "truncate",
    "write",
]
