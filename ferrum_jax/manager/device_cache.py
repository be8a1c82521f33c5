"""One device's cache behind a manager: its state, and counts that the host can trust.

The counts follow from what was asked, so that the host knows whether a call fits without
reading the device. They are not a second truth: `check` holds them against the tables.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.config import CacheConfig, CacheGeometry
from ferrum_jax.invariants import check_state
from ferrum_jax.ops import gather
from ferrum_jax.ops import tables as rows_of
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.ops.migration import move_blocks, pad_to_power_of_two, plan_defragment, resize
from ferrum_jax.ops.storage import zero_blocks
from ferrum_jax.state import CacheState, PageTables, init
from ferrum_jax.types import NULL_SEQ, Device

# The one holder of the tables is the cache below, so they are changed in place.
_allocate_rows = jax.jit(rows_of.allocate_rows, donate_argnames="tables")
_extend_rows = jax.jit(
    rows_of.extend_rows, static_argnames="max_new_tokens", donate_argnames="tables"
)
_take_blocks = jax.jit(rows_of.take_blocks, static_argnames="max_blocks", donate_argnames="tables")
_zero_blocks = jax.jit(zero_blocks, donate_argnames="pool")


class DeviceCache:
    """A cache state on one device that grows on demand. Not thread-safe.

    Callers ask `num_available` and `has_free_row` first: no method here checks again.

    Attributes:
      geometry: What is cached, and the limits of a row.
      device: Where.
      block_size: Tokens a block.
      block_bytes: Bytes a block, keys and values of all layers.
      max_blocks: Blocks that the pool may grow to.
      state: The cache itself.
      num_free: Blocks that are free now.
      num_tokens: Tokens of each row.
      num_blocks_held: Blocks of each row.
      taken: Blocks that were taken for no row.
      growth_count: How often the pool was copied into a larger one.
    """

    def __init__(
        self, config: CacheConfig, geometry: CacheGeometry, device: Device, *, scrubs: bool
    ):
        geometry.spec(config.max_blocks, config.block_size)  # Refuses what could not grow.
        spec = geometry.spec(config.initial_blocks, config.block_size)
        self.geometry, self.device = geometry, device
        self.block_size, self.block_bytes = spec.block_size, spec.block_bytes
        self.max_blocks, self._initial_blocks = config.max_blocks, config.initial_blocks
        self.state = init(spec, device.jax_device())
        self.num_free = spec.num_blocks
        self.num_tokens = np.zeros(spec.max_seqs, int)
        self.num_blocks_held = np.zeros(spec.max_seqs, int)
        self.taken: set[int] = set()
        self.growth_count = 0
        self._free_rows = list(range(spec.max_seqs - 1, -1, -1))
        self._may_share, self._scrubs = False, scrubs
        self._checked_steps: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool now."""
        return self.state.tables.num_blocks

    @property
    def num_used(self) -> int:
        """Blocks in use."""
        return self.num_blocks - self.num_free

    @property
    def num_available(self) -> int:
        """Blocks that could be taken, growth counted."""
        return self.max_blocks - self.num_used

    @property
    def has_free_row(self) -> bool:
        """Whether another sequence can be held."""
        return bool(self._free_rows)

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int) -> int:
        """Starts a sequence and returns its row."""
        num_new = self.blocks_for(num_tokens)
        self._make_free(num_new)
        seq_id = self._free_rows.pop()
        if num_tokens:
            ids, counts = np.asarray([seq_id], np.int32), np.asarray([num_tokens], np.int32)
            tables, _ = _allocate_rows(self.state.tables, ids, counts)
            self.state = CacheState(self.state.pool, tables)
        self._count(seq_id, num_tokens)
        return seq_id

    def num_new_blocks(self, seq_id: int, num_tokens: int) -> int:
        """Returns how many blocks a row lacks for `num_tokens` more tokens."""
        needed = self.blocks_for(int(self.num_tokens[seq_id]) + num_tokens)
        return max(0, needed - int(self.num_blocks_held[seq_id]))

    def extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Makes room for more tokens in each row, in one operation."""
        self._make_free(sum(map(self.num_new_blocks, seq_ids, num_tokens)))
        blocks = max(map(self.blocks_for, num_tokens))
        tables, _ = _extend_rows(
            self.state.tables,
            pad_to_power_of_two(np.asarray(seq_ids), NULL_SEQ),
            pad_to_power_of_two(np.asarray(num_tokens), 0),
            max_new_tokens=self.block_size << max(0, blocks - 1).bit_length(),
        )
        self.state = CacheState(self.state.pool, tables)
        for seq_id, count in zip(seq_ids, num_tokens, strict=True):
            self._count(seq_id, count)

    def free(self, seq_ids: Sequence[int]) -> None:
        """Ends sequences."""
        ids = pad_to_power_of_two(np.asarray(seq_ids), NULL_SEQ)
        self._let_go(*_free_rows(self.state.tables, ids))
        for seq_id in seq_ids:
            self.num_free += int(self.num_blocks_held[seq_id])
            self.num_tokens[seq_id] = self.num_blocks_held[seq_id] = 0
            self._free_rows.append(seq_id)
        if self._may_share:
            self.read_counts()

    def take_blocks(self, num_blocks: int) -> list[int]:
        """Takes blocks for no row; waits for the device, which knows their ids."""
        self._make_free(num_blocks)
        bucket = 1 << max(0, num_blocks - 1).bit_length()
        tables, ids, _ = _take_blocks(
            self.state.tables, np.asarray(num_blocks, np.int32), max_blocks=bucket
        )
        self.state = CacheState(self.state.pool, tables)
        self.num_free -= num_blocks
        blocks = np.asarray(ids)[:num_blocks].tolist()
        self.taken.update(blocks)
        return blocks

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """Gives taken blocks back."""
        ids = pad_to_power_of_two(np.asarray(block_ids), self.num_blocks)
        self._let_go(*_release_blocks(self.state.tables, ids))
        self.num_free += len(block_ids)
        self.taken.difference_update(block_ids)

    def row_blocks(self, seq_id: int) -> list[int]:
        """Returns a row's blocks in order; waits for the device."""
        row = np.asarray(_one_row(self.state.tables.block_ids, np.asarray(seq_id, np.int32)))
        return row[: self.num_blocks_held[seq_id]].tolist()

    def is_free(self, block_id: int) -> bool:
        """Says whether nobody holds a block of the pool; waits for the device."""
        return int(self.state.tables.ref_counts[block_id]) == 0

    def read(self, seq_id: int, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns a row's keys and values of one layer, each [tokens, H, D]."""
        k, v = gather(self.state, layer, seq_id)
        return k[: self.num_tokens[seq_id]], v[: self.num_tokens[seq_id]]

    def run(self, step: Callable[..., Any], seq_ids: np.ndarray, *args: Any) -> Any:
        """Lets `step` change the state, and returns what it returns besides."""
        eval_shape = getattr(step, "eval_shape", None)
        if eval_shape is not None and step not in self._checked_steps:
            # It is jitted and may donate the state: too late to find out afterwards.
            self._require_state_first(eval_shape(self.state, seq_ids, *args))
            self._checked_steps.add(step)
        result = step(self.state, seq_ids, *args)
        self._require_state_first(result)
        self.state, output = result
        return output

    def read_counts(self) -> None:
        """Takes the counts from the device, after a step that allocates inside; waits for it."""
        self.num_free, self.num_tokens, self.num_blocks_held = self._counts_of_device()
        held = int(self.num_blocks_held.sum())
        self._may_share = held + len(self.taken) != self.num_used

    def defragment(self) -> None:
        """Moves rows' blocks to the low ids; taken blocks stay, since callers know their ids."""
        ref_counts = jax.device_get(self.state.tables.ref_counts)
        sources, targets = plan_defragment(ref_counts, self.taken)
        if sources.size:
            self.state, _ = move_blocks(self.state, sources, targets)

    def shrink(self) -> None:
        """Gives back what the pool has grown, as far as the live blocks allow."""
        lowest = max(self.num_used, max(self.taken, default=-1) + 1)
        smaller = self._grown(lowest)
        if smaller < self.num_blocks:
            self.defragment()
            self._resize(smaller)

    def check(self) -> None:
        """Raises AssertionError unless state and counts hold together; waits for the device."""
        pins = np.zeros(self.num_blocks, int)
        pins[list(self.taken)] = 1
        check_state(self.state, pins)
        counted = self.num_free, self.num_tokens, self.num_blocks_held
        found = self._counts_of_device()
        if not all(map(np.array_equal, counted, found)):
            raise AssertionError(f"The host counted {counted}, the device {found}.")

    def _counts_of_device(self) -> tuple[int, np.ndarray, np.ndarray]:
        tables = self.state.tables
        num_free, lens, held = jax.device_get(
            (tables.num_free, tables.seq_lens, tables.num_blocks_held)
        )
        return int(num_free), lens.astype(int), held.astype(int)

    def _require_state_first(self, result: Any) -> None:
        """Raises TypeError unless a step's result is `(state, output)`, shapes included."""
        is_pair = isinstance(result, (tuple, list)) and len(result) == 2
        if not is_pair or _form_of(result[0]) != _form_of(self.state):
            got = [type(part).__name__ for part in result] if is_pair else type(result).__name__
            raise TypeError(
                "A step must return (state, output), the state being the one that it was given, "
                f"changed, of the same shapes; it returned {got}. Return the CacheState first."
            )

    def _let_go(self, tables: PageTables, freed: jax.Array) -> None:
        """Takes tables without some blocks, and erases what these held."""
        pool = self.state.pool
        self.state = CacheState(_zero_blocks(pool, freed) if self._scrubs else pool, tables)

    def _count(self, seq_id: int, num_tokens: int) -> None:
        num_new = self.num_new_blocks(seq_id, num_tokens)
        self.num_free -= num_new
        self.num_blocks_held[seq_id] += num_new
        self.num_tokens[seq_id] += num_tokens

    def _make_free(self, num_blocks: int) -> None:
        if num_blocks > self.num_free:
            self._resize(self._grown(self.num_used + num_blocks))
            self.growth_count += 1

    def _grown(self, num_blocks: int) -> int:
        """Returns the size, of those that doubling goes through, with room for `num_blocks`."""
        size = self._initial_blocks
        while size < num_blocks:
            size = min(2 * size, self.max_blocks)
        return size

    def _resize(self, num_blocks: int) -> None:
        num_new = num_blocks - self.num_blocks
        self.state = resize(self.state, num_blocks)  # Raises when memory is short.
        self.num_free += num_new


def _form_of(tree: object) -> tuple[Any, list[Any]]:
    """Returns what a program compiles for: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves]


@functools.partial(jax.jit, donate_argnames="tables")
def _free_rows(tables: PageTables, seq_ids: jax.Array) -> tuple[PageTables, jax.Array]:
    """Empties rows; also returns the blocks that are free thereby, others N."""
    held = rows_of.held_blocks(tables, index_or_end(seq_ids, tables.max_seqs)).ravel()
    tables = rows_of.free_rows(tables, seq_ids)
    return tables, _free_among(tables, held)


@functools.partial(jax.jit, donate_argnames="tables")
def _release_blocks(tables: PageTables, block_ids: jax.Array) -> tuple[PageTables, jax.Array]:
    """Lets blocks go; also returns those that are free thereby, others N."""
    tables = rows_of.release_blocks(tables, block_ids)
    return tables, _free_among(tables, block_ids)


def _free_among(tables: PageTables, block_ids: jax.Array) -> jax.Array:
    is_free = read(tables.ref_counts, block_ids, 1) == 0
    return jnp.where(is_free, block_ids, tables.num_blocks)


@jax.jit
def _one_row(block_ids: jax.Array, seq_id: jax.Array) -> jax.Array:
    return block_ids[seq_id]
