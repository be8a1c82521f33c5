"""Starts sequences of a pool with the tokens of another one."""

import numpy as np

import ferrum_jax.manager.pool.programs as programs
from ferrum_jax.arithmetic import PerPool
from ferrum_jax.manager.pool.pool import DevicePool
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.types import NULL_SEQ


def num_blocks_to_fork(pool: DevicePool, seq_id: int, num_forks: int) -> PerPool:
    """Returns how many blocks `fork_row` allocates: those for copies of partly filled blocks."""
    has_tail = [tail > 0 for tail in pool.counts.tails(seq_id)]
    return pool.counts.by_pool(has_tail).times(num_forks)


def fork_row(pool: DevicePool, seq_id: int, num_forks: int) -> list[int]:
    """Starts sequences that share a sequence's full blocks, in one program.

    Args:
      pool: The pool, with enough free rows, and blocks for what `num_blocks_to_fork` says.
      seq_id: The sequence.
      num_forks: Number of sequences to start, at least 1.

    Returns:
      Their rows.
    """
    pool.sizes.reserve(num_blocks_to_fork(pool, seq_id, num_forks))
    if any(pool.counts.num_held(seq_id)):
        ids = pad_to_power_of_two(np.asarray(pool.counts.next_rows(num_forks)), NULL_SEQ)
        state, ok = programs.fork_seq(pool.state, np.asarray(seq_id, np.int32), ids)
        pool.device_state.replace(state, ok=ok)
    return [pool.counts.fork_row(seq_id) for _ in range(num_forks)]
