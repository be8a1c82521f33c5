"""One device's pool of blocks: its state, the programs that change it, and the host's counts."""

from ferrum_jax.manager.pool.counts import PoolCounts as PoolCounts
from ferrum_jax.manager.pool.pool import DevicePool as DevicePool
from ferrum_jax.manager.pool.shapes import RowShape as RowShape
from ferrum_jax.manager.pool.transfer import stored_for as stored_for
