"""Grows the pools of a device on demand, and shrinks them again."""

from collections.abc import Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.errors import OutOfBlocksError
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.manager.pool.device_state import DeviceState
from ferrum_jax.memory import use_huge_pages
from ferrum_jax.ops.migration import resize


class PoolSizes:
    """The sizes of a device's pools. Not thread-safe.

    Args:
      device_state: The state with the pools.
      counts: What the host counts of it.

    Attributes:
      growth_count: How often a pool was copied into a larger one.
    """

    def __init__(self, device_state: DeviceState, counts: PoolCounts):
        self._device_state, self._counts = device_state, counts
        self._initial_blocks: Sequence[int] = counts.num_blocks
        self.growth_count = 0

    def reserve(self, num_blocks: PerPool) -> None:
        """Grows pools until `num_blocks` blocks are free."""
        if not num_blocks.fits_in(self._counts.num_free):
            self._resize(self._grown_sizes(self._counts.num_used + num_blocks))

    @property
    def can_shrink(self) -> bool:
        """Whether `shrink` makes a pool smaller after `defragment`."""
        return self._shrunk_sizes() != self._counts.num_blocks

    def shrink(self) -> None:
        """Shrinks defragmented pools as far as the blocks in use allow."""
        self._resize(self._shrunk_sizes())

    def _shrunk_sizes(self) -> PerPool:
        counts = self._counts
        last = [max(ids, default=-1) for ids in counts.ids.split(counts.taken)]
        needed = PerPool(max(used, i + 1) for used, i in zip(counts.num_used, last, strict=True))
        return self._grown_sizes(needed).at_most(counts.num_blocks)

    def _grown_sizes(self, num_blocks: PerPool) -> PerPool:
        """Returns the first size of each pool, reached by doubling, with room for `num_blocks`."""
        if not num_blocks.fits_in(self._counts.max_blocks):
            raise OutOfBlocksError(
                f"{num_blocks} blocks are needed on {self._device_state.device}, and there can be "
                f"{self._counts.max_blocks}. Deallocate a request, or raise max_blocks."
            )
        sizes = list(self._initial_blocks)
        for pool, needed in enumerate(num_blocks):
            while sizes[pool] < needed:
                sizes[pool] = min(2 * sizes[pool], self._counts.max_blocks[pool])
        return PerPool(sizes)

    def _resize(self, sizes: PerPool) -> None:
        """Brings each pool to a size, one after the other."""
        counts = self._counts
        for pool, (before, size) in enumerate(zip(counts.num_blocks, sizes, strict=True)):
            if size != before:
                resized = resize(self._device_state.current.part(pool), size)
                part = use_huge_pages(resized)  # Raises when memory is short.
                self._device_state.replace(self._device_state.current.with_part(pool, part))
                counts.set_size(pool, size)
                self.growth_count += size > before
