"""One device's pool of blocks: its state, the programs that change it, and the host's counts."""

from ferrum_jax.manager.pool.counts import PoolCounts as PoolCounts
from ferrum_jax.manager.pool.forks import fork_row as fork_row
from ferrum_jax.manager.pool.forks import num_blocks_to_fork as num_blocks_to_fork
from ferrum_jax.manager.pool.pool import DevicePool as DevicePool
from ferrum_jax.manager.pool.shapes import RowShape as RowShape
from ferrum_jax.manager.pool.steps import WholeStep as WholeStep
from ferrum_jax.manager.pool.transfer import stored_for as stored_for
