"""Memory bandwidth of the processor: the upper bound for attention."""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np


def memory_roofs(
    arrays: Sequence[jax.Array | np.ndarray], num_bytes: int
) -> Mapping[str, Callable[[], None]]:
    """Returns a plain read and a plain copy of `num_bytes`, on all cores.

    Each goes on to other bytes at every call, so that none finds them in the processor's caches.

    Args:
      arrays: What is read, on the CPU: much more than `num_bytes`, or the caches hold it.
      num_bytes: Bytes per call.

    Raises:
      ValueError: If the arrays hold fewer than `num_bytes`.
    """
    num_cores = os.cpu_count() or 1
    words = [np.asarray(array).reshape(-1).view(np.int32) for array in arrays]
    size = num_bytes // words[0].itemsize // num_cores
    parts = [x[i : i + size] for x in words for i in range(0, x.size - size + 1, size)]
    if size == 0 or len(parts) < num_cores:
        total = sum(x.nbytes for x in words)
        raise ValueError(f"num_bytes is {num_bytes}, and the arrays hold {total} bytes.")
    targets = [np.zeros_like(part) for part in parts[:num_cores]]
    cores = concurrent.futures.ThreadPoolExecutor(num_cores)
    reads, copies = itertools.cycle(parts), itertools.cycle(parts)

    def read() -> None:
        # Of NumPy's reductions, the maximum of integers waits for memory the most.
        list(cores.map(np.max, itertools.islice(reads, num_cores)))

    def copy() -> None:
        list(cores.map(np.copyto, targets, itertools.islice(copies, num_cores)))

    return {"plain read": read, "plain copy": copy}
