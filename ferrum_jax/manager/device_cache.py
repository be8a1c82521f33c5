"""One device's cache behind a manager: every change of its state, counted as it is made."""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import ferrum_jax.manager.programs as programs
from ferrum_jax.compression.methods import CompressionMethod, CompressionPlan
from ferrum_jax.compression.rewrite import Loss, Rewrite, compress_row, sample_queries
from ferrum_jax.config import CacheConfig, CacheGeometry
from ferrum_jax.errors import CacheLostError, UncountedTokensError
from ferrum_jax.manager.counts import CacheCounts, RowShape
from ferrum_jax.manager.placement import init_at
from ferrum_jax.manager.steps import StepCaller, is_lost, output_of, state_in
from ferrum_jax.ops import gather, share
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.ops.migration import move_blocks, pad_to_power_of_two, plan_defragment, resize
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ, Device, TokenFormat


class DeviceCache(CacheCounts):
    """A cache state that grows on demand, on one device or over a mesh. Not thread-safe.

    Callers ask `num_available` and `num_free_rows` first: no method here checks again.

    Attributes:
      geometry: What is cached, and the limits of a row.
      device: Where; of a mesh, the one that stands for all.
      block_bytes: Bytes a block, keys and values of all layers.
      growth_count: How often the pool was copied into a larger one.
    """

    def __init__(
        self,
        config: CacheConfig,
        geometry: CacheGeometry,
        device: Device,
        *,
        scrubs: bool,
        mesh: Mesh | None = None,
        axis_name: str = "tp",
    ):
        geometry.spec(config.max_blocks, config.block_size)  # Refuses what could not grow.
        spec = geometry.spec(config.initial_blocks, config.block_size)
        self.geometry, self.device = geometry, device
        super().__init__(init_at(spec, device, mesh, axis_name), config.max_blocks)
        self.block_bytes, self._initial_blocks = spec.block_bytes, config.initial_blocks
        self.growth_count = 0
        self._scrubs = scrubs
        self._steps = StepCaller()
        self._oks: collections.deque[Any] = collections.deque()  # Each bool[].

    def enable(self, formats: Iterable[TokenFormat]) -> None:
        """Lets rows be in some formats too; what reads or writes tokens is compiled again.

        Raises:
          ValueError: If the pool's geometry does not allow one.
        """
        if not set(formats) <= set(self.state.pool.formats):
            self.state = enable_formats(self.state, formats, self.max_blocks)

    def allocate(self, num_tokens: int) -> int:
        """Starts a sequence and returns its row."""
        return self.allocate_like(RowShape(num_tokens))

    def allocate_like(self, shape: RowShape) -> int:
        """Starts a sequence of a row's shape and returns its row."""
        self.enable([shape.token_format])
        self._make_free(self.blocks_for(shape.num_tokens, shape.token_format))
        seq_id = self._free_rows.pop()
        if shape.num_tokens:
            ids, *numbers = (
                np.asarray([x], np.int32)
                for x in (seq_id, shape.token_format, shape.num_pruned, shape.num_tokens)
            )
            tables = self.state.tables
            if shape.is_compressed:
                tables = programs.set_formats(tables, ids, *numbers[:2])
            tables, ok = programs.allocate_rows(tables, ids, numbers[2])
            self._oks.append(ok)
            self.state = CacheState(self.state.pool, tables)
        self.token_formats[seq_id] = shape.token_format
        self.num_pruned[seq_id] = shape.num_pruned
        self._count(seq_id, shape.num_tokens)
        return seq_id

    def reserve(self, num_blocks: int) -> None:
        """Grows the pool until so many blocks are free."""
        self._make_free(num_blocks)

    def extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Makes room for more tokens in each row, in one operation."""
        self._make_free(sum(map(self.num_new_blocks, seq_ids, num_tokens)))
        blocks = max(map(self.blocks_for, num_tokens))
        tables, ok = programs.extend_rows(
            self.state.tables,
            pad_to_power_of_two(np.asarray(seq_ids), NULL_SEQ),
            pad_to_power_of_two(np.asarray(num_tokens), 0),
            max_new_tokens=self.block_size << max(0, blocks - 1).bit_length(),
        )
        self._oks.append(ok)
        self.state = CacheState(self.state.pool, tables)
        for seq_id, count in zip(seq_ids, num_tokens, strict=True):
            self._count(seq_id, count)

    def free(self, seq_ids: Sequence[int]) -> None:
        """Ends sequences."""
        ids = pad_to_power_of_two(np.asarray(seq_ids), NULL_SEQ)
        rows = np.asarray(seq_ids)
        num_own = int((self.num_blocks_held[rows] - self.num_cached_blocks[rows]).sum())
        for counts in (*self._counts, self.num_cached_blocks):
            counts[rows] = 0
        self._free_rows.extend(seq_ids)
        tables, freed = programs.free_rows(self.state.tables, ids)
        self._let_go(tables, freed, num_own)

    def share(self, source: int, target: int, num_tokens: int, num_cached_blocks: int) -> None:
        """Lets a row hold the first tokens of another one; waits for the device.

        Args:
          source: Whose tokens.
          target: The other row.
          num_tokens: How many.
          num_cached_blocks: How many of the blocks that the target then holds are kept.
        """
        self._make_free(self.num_blocks_to_share(target, num_tokens))
        rows = np.asarray([source], np.int32), np.asarray([target], np.int32)
        was_held = programs.are_held(self.state.tables)
        self.state, _ = share(self.state, *rows, num_tokens)
        self.num_cached_blocks[target] = num_cached_blocks
        self._settle(was_held)

    def attach(
        self, num_tokens: int, block_ids: Sequence[int], tail: int | None, num_tail: int
    ) -> int:
        """Starts a sequence that begins with kept blocks.

        Args:
          num_tokens: Tokens of the sequence; more than the kept blocks hold.
          block_ids: The kept blocks, full ones, in order.
          tail: A block whose first tokens come next, to be copied; None for none.
          num_tail: How many these are.

        Returns:
          Its row.
        """
        num_shared = len(block_ids)
        self._make_free(self.blocks_for(num_tokens) - num_shared)
        seq_id = self._free_rows.pop()
        tables, block_id, ok = programs.attach_row(
            self.state.tables,
            np.asarray(seq_id, np.int32),
            self._padded(block_ids),
            np.asarray(num_tokens, np.int32),
        )
        self._oks.append(ok)
        pool = self.state.pool
        if tail is not None:
            source, count = np.asarray(tail, np.int32), np.asarray(num_tail, np.int32)
            pool = programs.copy_tokens(pool, source, block_id, count)
        self.state = CacheState(pool, tables)
        self.num_blocks_held[seq_id] = self.num_cached_blocks[seq_id] = num_shared
        self.num_tokens[seq_id] = num_shared * self.block_size
        self._count(seq_id, num_tokens - num_shared * self.block_size)
        return seq_id

    def adopt(self, seq_id: int, first: int, block_ids: Sequence[int]) -> None:
        """Lets a row hold kept blocks of the same content in place of its own."""
        tables, freed = programs.adopt_blocks(
            self.state.tables,
            np.asarray(seq_id, np.int32),
            np.asarray(first, np.int32),
            self._padded(block_ids),
        )
        self.num_cached_blocks[seq_id] = first + len(block_ids)
        self._let_go(tables, freed, len(block_ids))

    def keep(self, seq_id: int, block_ids: Sequence[int]) -> None:
        """Keeps a row's next blocks, behind those that are kept already, for later prompts."""
        tables = programs.retain_blocks(self.state.tables, self._padded(block_ids))
        self.state = CacheState(self.state.pool, tables)
        self.num_cached_blocks[seq_id] += len(block_ids)
        self.num_kept += len(block_ids)

    def drop_kept(self, block_ids: Sequence[int]) -> None:
        """Keeps blocks no longer; no row holds them."""
        self.num_kept -= len(block_ids)
        self._release(block_ids)

    def drop_last_kept(self, seq_id: int, block_ids: Sequence[int]) -> None:
        """Keeps the last blocks of a row that are kept no longer; the row alone holds them."""
        self.num_cached_blocks[seq_id] -= len(block_ids)
        self.num_kept -= len(block_ids)
        tables, freed = programs.release_blocks(self.state.tables, self._padded(block_ids))
        self._let_go(tables, freed, 0)

    def take_blocks(self, num_blocks: int) -> list[int]:
        """Takes blocks for no row; waits for the device, which knows their ids."""
        self._make_free(num_blocks)
        bucket = _bucket(num_blocks)
        tables, ids, _ = programs.take_blocks(
            self.state.tables, np.asarray(num_blocks, np.int32), max_blocks=bucket
        )
        self.state = CacheState(self.state.pool, tables)
        self.num_free -= num_blocks
        blocks = np.asarray(ids)[:num_blocks].tolist()
        self.taken.update(blocks)
        return blocks

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """Gives taken blocks back."""
        self.taken.difference_update(block_ids)
        self._release(block_ids)

    def read(self, seq_id: int, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns a row's keys and values of one layer, each [tokens, H, D]."""
        k, v = gather(self.state, layer, seq_id, TokenFormat(int(self.token_formats[seq_id])))
        return k[: self.num_tokens[seq_id]], v[: self.num_tokens[seq_id]]

    def compress(
        self,
        seq_id: int,
        plan: CompressionPlan,
        method: CompressionMethod,
        queries: jax.Array | None,
    ) -> Loss:
        """Writes a row anew in fewer blocks; waits for the device.

        Args:
          seq_id: The row.
          plan: What it is going to be. So many blocks are free as `num_blocks_to_compress` says.
          method: How tokens are chosen, if some are dropped.
          queries: f32[L, H, Q, D]. Reference queries; sampled if absent.
        """
        shape = self.row_shape(seq_id)
        self.enable([plan.token_format])
        rewrite = Rewrite(
            source=shape.token_format,
            target=plan.token_format,
            max_source_blocks=_bucket(int(self.num_blocks_held[seq_id])),
            max_target_blocks=_bucket(plan.num_blocks),
            method=method if plan.num_kept < shape.num_tokens else None,
            scale=method.scale,
        )
        row = np.asarray(seq_id, np.int32)
        given = sample_queries(self.state, row, rewrite) if queries is None else queries
        was_held = programs.are_held(self.state.tables)
        self.state, _, loss = compress_row(self.state, row, plan.num_kept, given, rewrite)
        self.num_cached_blocks[seq_id] = 0
        self._settle(was_held)
        return jax.device_get(loss)

    def run(
        self, step: Callable[..., Any], seq_ids: np.ndarray, *args: Any, extends: bool = False
    ) -> Any:
        """Lets `step` change the state, and returns what it returns besides.

        Args:
          step: Returns the state first.
          seq_ids: Its rows.
          *args: Handed on.
          extends: Whether it changes lengths; then it is waited for.
        """
        was_held = programs.are_held(self.state.tables) if extends else None
        given = self.state
        result = self._steps.call(step, given, seq_ids, *args)
        try:
            output, self.state = output_of(result, given), result[0]
        except TypeError:
            self.state = state_in(result, given)
            raise
        self.require_sound()
        if was_held is not None:
            self._settle(was_held)
        return output

    def require_sound(self) -> None:
        """Raises if a step has lost the state, or changed lengths behind the host's back.

        It does not wait for the device: what is not known yet is seen later.

        Raises:
          CacheLostError: If the state was consumed, and not returned.
          UncountedTokensError: If the device refused what fitted by the host's counts. These are
            the device's again afterwards.
        """
        if is_lost(self.state):
            raise CacheLostError(
                f"The cache on {self.device} is lost: a step took it, donated, and did not return "
                "it. Make a new manager, and let steps return (state, output)."
            )
        while self._oks and self._oks[0].is_ready():
            if not self._oks.popleft():
                self._oks.clear()
                self._read_counts()
                raise UncountedTokensError(
                    f"The tables on {self.device} had no room for what the manager had counted as "
                    "fitting: a step changed lengths without a word. Pass extends=True to run for "
                    "such steps. All lengths are what the device has: ask again for what is short."
                )

    def _settle(self, was_held: jax.Array) -> None:
        """Takes the counts from the device, and erases what is free that was held before."""
        self._read_counts()
        self._erase(np.flatnonzero(np.asarray(programs.freed_since(self.state.tables, was_held))))

    def _erase(self, block_ids: np.ndarray) -> None:
        """Erases blocks that are free now, if blocks are erased."""
        if self._scrubs and block_ids.size:
            pool = programs.zero_blocks(self.state.pool, self._padded(block_ids))
            self.state = CacheState(pool, self.state.tables)

    def _read_counts(self) -> None:
        """Takes the counts from the device; waits for it."""
        self.num_free, *counts = self._counts_of_device()
        self.num_tokens, self.num_blocks_held, self.token_formats, self.num_pruned = counts
        # A step may have cut rows, and replaced a block cut through by a copy.
        num_full = self.num_tokens // self.block_size
        self.num_cached_blocks = np.minimum(self.num_cached_blocks, num_full)
        own = int((self.num_blocks_held - self.num_cached_blocks).sum())
        self._may_share = own + self.num_kept + len(self.taken) != self.num_used

    def defragment(self) -> dict[int, int]:
        """Moves blocks to the low ids, and returns the new id of each that moved.

        Taken blocks stay, since callers know their ids.
        """
        ref_counts = jax.device_get(self.state.tables.ref_counts)
        sources, targets = plan_defragment(ref_counts, self.taken)
        if sources.size:
            self.state, _ = move_blocks(self.state, sources, targets)
        moved = sources != NULL_BLOCK
        self._erase(sources[moved])
        return dict(zip(sources[moved].tolist(), targets[moved].tolist(), strict=True))

    def shrink(self) -> dict[int, int]:
        """Gives back what the pool has grown, as far as the live blocks allow.

        Returns:
          The new id of each block that moved.
        """
        lowest = max(self.num_used, max(self.taken, default=-1) + 1)
        smaller = self._grown(lowest)
        if smaller == self.num_blocks:
            return {}
        new_ids = self.defragment()
        self._resize(smaller)
        return new_ids

    def _release(self, block_ids: Sequence[int]) -> None:
        tables, freed = programs.release_blocks(self.state.tables, self._padded(block_ids))
        self._let_go(tables, freed, len(block_ids))

    def _let_go(self, tables: PageTables, freed: jax.Array, num_freed: int) -> None:
        """Takes tables without some blocks, and erases what these held."""
        pool = self.state.pool
        self.state = CacheState(programs.zero_blocks(pool, freed) if self._scrubs else pool, tables)
        self.num_free += num_freed
        if self._may_share:
            self._read_counts()

    def _padded(self, block_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return pad_to_power_of_two(np.asarray(block_ids, np.int32), self.num_blocks)

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


def _bucket(num_blocks: int) -> int:
    """Returns the next power of two, so that few shapes are compiled."""
    return 1 << max(0, num_blocks - 1).bit_length()
