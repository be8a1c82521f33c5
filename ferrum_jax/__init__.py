"""A paged key/value cache for JAX decoding loops."""
from ferrum_jax.config import CacheSpec
from ferrum_jax.invariants import check_state
from ferrum_jax.ops import allocate, copy_blocks, extend, fork, free, gather, share, truncate, write
from ferrum_jax.state import CacheState, init
