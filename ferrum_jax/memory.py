"""Large arrays on a CPU in huge pages of memory.

A processor has to find out where each memory page lies, and remembers only the last ones. With
small pages of 4 KiB it does so for nearly every block of a pool.
"""

import ctypes
import functools
import sys
from typing import TypeVar

import jax
from jax.core import Tracer

_HUGE_PAGE_BYTES = 2 << 20  # Of x86-64, and of ARM with small pages of 4 KiB.
_MIN_BYTES = 2 * _HUGE_PAGE_BYTES  # Smaller arrays hold perhaps no whole huge page.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # Of linux/mman.h.

Tree = TypeVar("Tree")


def use_huge_pages(tree: Tree) -> Tree:
    """Asks Linux to hold the large arrays of a tree in huge pages; does nothing elsewhere.

    `init` and a manager that grows do so for their pools. Do it once for a model's parameters: they
    are read as a whole in every step. Attention of 32 rows took 1.75 times less processor time in a
    pool with huge pages, and the matrix products of SmolLM2-135M 1.18 times less. To have them in
    all of a process, the memory inside compiled programs included, start it with
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` instead.

    Where the system has none to give, or may not give them, arrays stay as they are.

    Args:
      tree: A pytree. Arrays on a CPU of this process are waited for; other leaves are passed over.

    Returns:
      The same tree. Neither the addresses nor the contents of its arrays have changed.

    Example:
      >>> import jax.numpy as jnp
      >>> params = use_huge_pages({"embedding": jnp.zeros((1024, 1024))})
    """
    madvise = _madvise()
    if madvise is None:
        return tree
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            for shard in leaf.addressable_shards:
                if shard.device.platform == "cpu" and shard.data.nbytes >= _MIN_BYTES:
                    _ask_for(madvise, shard.data)
    return tree


def _ask_for(madvise: "ctypes._NamedFuncPointer", array: jax.Array) -> None:
    """Asks for huge pages wherever a whole one lies in an array of one device."""
    start = jax.block_until_ready(array).unsafe_buffer_pointer()
    first = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    num_bytes = (start + array.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - first
    madvise(first, num_bytes, _MADV_HUGEPAGE)  # For later: parts may be moved to other memory.
    madvise(first, num_bytes, _MADV_COLLAPSE)  # For now; since Linux 6.1.


@functools.cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    """Returns the function of the C library, or None where the system is not Linux."""
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
