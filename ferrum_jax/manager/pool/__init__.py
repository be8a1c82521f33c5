"""One device's pool of blocks: its state, the programs that change it, and the host's counts."""

from ferrum_jax.manager.pool.counts import PoolCounts, RowShape
from ferrum_jax.manager.pool.pool import DevicePool
from ferrum_jax.manager.pool.transfer import stored_for

__all__ = ["DevicePool", "PoolCounts", "RowShape", "stored_for"]
