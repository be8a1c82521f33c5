"""One device's pools: the holder of a cache state, and every change of it."""

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

import ferrum_jax.manager.pool.programs as programs
from ferrum_jax.arithmetic import PerPool, ceil_div, next_power_of_two
from ferrum_jax.compression.methods import CompressionMethod, CompressionPlan
from ferrum_jax.compression.rewrite import Loss, Rewrite, compress_rows, sample_queries
from ferrum_jax.config import CacheConfig
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.manager.pool.device_state import DeviceState
from ferrum_jax.manager.pool.placement import init_at
from ferrum_jax.manager.pool.queries import PoolQueries
from ferrum_jax.manager.pool.shapes import RowShape
from ferrum_jax.manager.pool.sizes import PoolSizes
from ferrum_jax.manager.pool.steps import StepRunner
from ferrum_jax.manager.pool.transfer import import_chunks
from ferrum_jax.ops.buckets import pad_to_power_of_two, stack_to_power_of_two
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.ops.migration import plan_defragment
from ferrum_jax.ops.transfer import BlockPayload
from ferrum_jax.prefix.commit import CommitPlan
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ, Device, TokenFormat


class DevicePool:
    """Holds a cache state that grows on demand, on one device or over a mesh. Not thread-safe.

    It has several pools where layer groups need them; ids of blocks are those of `PoolCounts`.
    Callers check `counts.num_available` and `counts.num_free_rows` first: no method here checks
    again. Each method changes the state by one program, and the counts after that: where the
    program fails, nothing has changed, or the state is lost and known to be.

    Args:
      config: Sizes of the pools.
      geometry: What is cached, and the limits of a row.
      device: Where the pools are; with a mesh, one device of it.
      scrub_freed_blocks: Whether freed blocks are erased.
      mesh: Devices over which the heads are divided; None for one device.
      axis_name: The axis of the mesh over which the heads are divided.

    Raises:
      ValueError: If a pool of `config.max_blocks` blocks is not possible, or as `init_at` says.

    Attributes:
      counts: What the host knows of blocks and rows without asking the device.
      device_state: The state, what its programs did that the host has not read yet, and how the
        counts are brought in line with it.
      queries: Questions that only the device can answer.
      steps: Runs steps of a caller that change the state.
      geometry: As given.
      device: As given.
      group_names: Names of the layer groups, pool by pool.
      sizes: Grows the pools, and shrinks them.
    """

    def __init__(
        self,
        config: CacheConfig,
        geometry: CacheGeometry,
        device: Device,
        *,
        scrub_freed_blocks: bool,
        mesh: Mesh | None = None,
        axis_name: str = "tp",
    ):
        largest = geometry.spec(config.max_blocks, config.block_size)  # Refuses what cannot grow.
        spec = geometry.spec(config.initial_blocks, config.block_size)
        state = init_at(spec, device, mesh, axis_name)
        self.geometry, self.device = geometry, device
        self.group_names = [place.group.name for place in spec.layer_map.by_pool()]
        self._block_bytes = [pool.block_bytes for pool in spec.pools]
        self.counts = PoolCounts(state, PerPool([pool.num_blocks for pool in largest.pools]))
        scrub, self._scrub = {"scrub_freed_blocks": scrub_freed_blocks}, scrub_freed_blocks
        self.device_state = DeviceState(state, self.counts, device, **scrub)
        self.queries = PoolQueries(self.device_state, self.counts, **scrub)
        self.steps = StepRunner(self.device_state, self.counts)
        self.sizes = PoolSizes(self.device_state, self.counts)

    @property
    def state(self) -> CacheState:
        """The cache state at this moment."""
        return self.device_state.current

    @property
    def is_lost(self) -> bool:
        """Whether the state was consumed and not returned, or cannot be read any more."""
        return self.device_state.is_lost

    def bytes_of(self, num_blocks: PerPool) -> int:
        """Returns the bytes of blocks: keys and values of all layers of their group."""
        return sum(map(operator.mul, num_blocks, self._block_bytes))

    def enable(self, token_formats: Iterable[TokenFormat]) -> None:
        """Allows rows in further formats; programs that read or write tokens compile again.

        Rows of groups with a sliding window are native, and pools of these alone stay as they are.

        Raises:
          ValueError: If a pool's geometry does not allow a format.
        """
        for pool in self.counts.full_pools or range(len(self.state.pools)):
            if not set(token_formats) <= set(self.state.pools[pool].formats):
                max_blocks = self.counts.max_blocks[pool]
                part = enable_formats(self.state.part(pool), token_formats, max_blocks)
                self.device_state.replace(self.state.with_part(pool, part))

    # Rows.

    def allocate(self, shape: RowShape) -> int:
        """Starts a sequence of a length and format, and returns its row."""
        self.enable([shape.token_format])
        self.sizes.reserve(self.counts.blocks_of(shape))
        seq_id = self.counts.next_row
        if shape.held_len:
            rows = zip(*self.counts.rows_for(shape), strict=True)
            *of_rows, num_released = (np.asarray(x, np.int32) for x in rows)
            page_tables, ok = programs.allocate_rows(
                self.state.page_tables,
                np.asarray([seq_id], np.int32),
                *of_rows,
                num_released if self.counts.has_windows else None,
            )
            self.device_state.replace_tables(page_tables, ok)
        self.counts.start_row(shape)
        return seq_id

    def attach(
        self, shape: RowShape, cached: Sequence[Sequence[int]], tails: Sequence[int], num_tail: int
    ) -> int:
        """Starts a sequence that begins with cached blocks.

        Args:
          shape: Length of the sequence, more than the cached blocks hold, and what it has released.
          cached: The cached blocks of each group, full ones, in order; `NULL_BLOCK` where one is
            released.
          tails: A block of each group with the tokens that come next, to be copied; `NULL_BLOCK`
            for none.
          num_tail: How many tokens of these are copied.

        Returns:
          The row.
        """
        num_shared, size = len(cached[0]), self.counts.block_size
        self.sizes.reserve(self.counts.blocks_for(shape.held_len - num_shared * size))
        seq_id = self.counts.next_row
        state, ok = programs.attach_seq(
            self.state,
            np.asarray(seq_id, np.int32),
            self._padded_groups(cached),
            self.counts.ids.in_pools(np.asarray(tails, np.int32)[:, None])[:, 0],
            np.asarray([shape.held_len, num_shared, num_tail], np.int32),
            np.asarray(shape.num_released, np.int32) if shape.num_released else None,
        )
        self.device_state.replace(state, ok=ok)
        self.counts.start_row(shape, num_shared)
        return seq_id

    def restore_row(
        self, shape: RowShape, payloads: Sequence[BlockPayload], *, wait: bool = False
    ) -> int:
        """Starts a sequence with the blocks of payloads, or changes nothing.

        Args:
          shape: Length and format of the sequence.
          payloads: Its blocks in each pool, of the pool's format.
          wait: Whether to return only when the blocks have arrived.

        Returns:
          The row.
        """
        seq_id = self.allocate(shape)
        with self.freed_on_error(seq_id):
            for i, payload in enumerate(payloads):
                part = self.state.part(i)
                for pool in import_chunks(part.pool, part.tables, seq_id, payload):
                    part = part.with_pools([pool])
                    self.device_state.replace(self.state.with_part(i, part))
            if wait:
                jax.block_until_ready(self.state.pools)
        return seq_id

    def extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int], num_new: PerPool) -> None:
        """Allocates room for more tokens in each sequence, in one operation.

        Blocks that sliding windows have passed are released first.

        Args:
          seq_ids: The sequences.
          num_tokens: Tokens to add to each of them.
          num_new: Free blocks that this needs: `queries.num_blocks_to_extend`.
        """
        self.sizes.reserve(num_new)
        blocks = ceil_div(max(num_tokens), self.counts.block_size)
        most = self.counts.block_size * next_power_of_two(blocks)
        ids = pad_to_power_of_two(np.asarray(seq_ids), NULL_SEQ)
        counts = pad_to_power_of_two(np.asarray(num_tokens), 0)
        if self.counts.has_windows:
            state, ok = programs.extend_past_windows(self.state, ids, counts, most, self._scrub)
            self.device_state.replace(state, ok=ok)
        else:
            page_tables, ok = programs.extend_rows(self.state.page_tables, ids, counts, most)
            self.device_state.replace_tables(page_tables, ok)
        num_passed = list(map(self.counts.add_tokens, seq_ids, num_tokens))
        if self.counts.has_windows:
            self.device_state.count_freed(sum(num_passed, self.counts.none))

    def free(self, seq_ids: Sequence[int]) -> None:
        """Ends sequences, and frees the blocks that no other row and no prefix uses."""
        ids = pad_to_power_of_two(np.asarray(seq_ids), NULL_SEQ)
        self.device_state.replace(programs.free_rows(self.state, ids, self._scrub))
        self.device_state.count_freed(self.counts.end_rows(seq_ids))

    @contextlib.contextmanager
    def freed_on_error(self, seq_id: int) -> Iterator[None]:
        """Frees a row that was just started if the body fails; if that fails, the cache is lost."""
        try:
            yield
        except BaseException:
            if not self.is_lost:
                with self.device_state.reading():
                    self.free([seq_id])
            raise

    def share(
        self,
        seq_ids: tuple[int, int],
        num_tokens: int,
        num_shared: int,
        cached: Sequence[Sequence[int]],
    ) -> None:
        """Makes a sequence hold the first tokens of another one; the state is unsettled afterwards.

        Args:
          seq_ids: The other sequence, and the one that changes.
          num_tokens: How many tokens.
          num_shared: Cached blocks of the other sequence, among those that hold the tokens.
          cached: Cached blocks of each group that the changed sequence keeps behind these;
            `NULL_BLOCK` where it holds none.
        """
        source, target = seq_ids
        self.sizes.reserve(self.queries.num_blocks_to_share(target, num_tokens))
        held_before = self.device_state.held_blocks()
        state = programs.share_seq(
            self.state,
            (np.asarray(source, np.int32), np.asarray(target, np.int32)),
            *(np.asarray(x, np.int32) for x in (num_tokens, num_shared)),
            self._padded_groups(cached),
        )
        self.device_state.replace(state, held_before=held_before)
        self.counts.set_cached(target, num_shared + len(cached[0]))

    def compress(
        self,
        seq_id: int,
        plan: CompressionPlan,
        method: CompressionMethod,
        queries: tuple[jax.Array, ...] | None,
    ) -> Loss:
        """Rewrites a sequence in fewer blocks; the state is unsettled afterwards.

        Groups with a sliding window stay as they are.

        Args:
          seq_id: The sequence.
          plan: Format and size of its row in each of the other groups afterwards. As many blocks
            are free as `queries.num_blocks_to_compress` says.
          method: How tokens are chosen, if some are dropped.
          queries: f32[L, H, Q, D] for each of these groups. Reference queries; sampled if absent.

        Returns:
          What was lost, on the device.
        """
        shape, rows = self.counts.row_shape(seq_id), self.counts.full_rows(seq_id)
        self.enable([plan.token_format])
        rewrite = Rewrite(
            source=shape.token_format,
            target=plan.token_format,
            max_source_blocks=next_power_of_two(int(self.counts.num_blocks_held[rows].max())),
            max_target_blocks=next_power_of_two(plan.num_blocks),
            method=method if plan.num_kept < shape.held_len else None,
            scale=method.scale,
        )
        places = list(map(self.counts.place_of_row, rows))
        if queries is None:
            queries = tuple(sample_queries(self.state.part(p), row, rewrite) for p, row in places)
        held_before = self.device_state.held_blocks()
        state, _, loss = compress_rows(self.state, places, plan.num_kept, queries, rewrite)
        self.device_state.replace(state, held_before=held_before)
        self.counts.set_cached(seq_id, 0)
        return loss

    # Cached blocks.

    def cache_blocks(self, seq_id: int, plan: CommitPlan) -> None:
        """Puts a sequence's next blocks, behind those cached already, into the prefix cache."""
        num_adopted = [len(ids) - ids.count(NULL_BLOCK) for ids in plan.adopted]
        if any(num_adopted) or plan.added:
            added, num_groups = self.counts.ids.split(plan.added), self.counts.num_groups
            per_group = map(ceil_div, map(len, added), num_groups)
            most = max(*map(len, plan.adopted), *per_group)
            adopted = self._padded_groups(plan.adopted, most)
            sizes = num_groups.times(adopted.shape[1])
            padded = tuple(map(_padded, added, sizes))
            if any(num_adopted):
                row, first = np.asarray(seq_id, np.int32), np.asarray(plan.first, np.int32)
                state = programs.commit_seq(self.state, row, first, adopted, padded, self._scrub)
                self.device_state.replace(state)
            else:
                page_tables = programs.retain_blocks(self.state.page_tables, padded)
                self.device_state.replace_tables(page_tables)
        self.counts.set_cached(seq_id, plan.num_blocks)
        self.counts.num_prefix_blocks += self.counts.ids.count(plan.added)
        self.device_state.count_freed(self.counts.by_pool(num_adopted))

    def release_cached(self, block_ids: Sequence[int]) -> None:
        """Frees blocks of the prefix cache that no row holds."""
        num_blocks = self._release(block_ids)
        self.counts.num_prefix_blocks -= num_blocks
        self.device_state.count_freed(num_blocks)

    def uncache(self, rows: Mapping[int, int], block_ids: Sequence[int]) -> None:
        """Takes blocks that rows hold out of the prefix cache; waits for the device.

        Args:
          rows: Cached blocks that are left to each sequence that has some of `block_ids`.
          block_ids: The blocks.
        """
        held_before = self.device_state.held_blocks()
        num_blocks = self._release(block_ids)
        self.device_state.replace(self.state, held_before=held_before)
        self.counts.num_prefix_blocks -= num_blocks
        for seq_id, num_left in rows.items():
            self.counts.set_cached(seq_id, num_left)
        self.device_state.settle()

    # Blocks.

    def take_blocks(self, num_blocks: int) -> list[int]:
        """Allocates blocks of the first pool without a row; waits for the device for their ids."""
        taken = self.counts.in_first_pool(num_blocks)
        self.sizes.reserve(taken)
        first, *others = self.state.page_tables
        tables, ids, _ = programs.take_blocks(
            first, np.asarray(num_blocks, np.int32), max_blocks=next_power_of_two(num_blocks)
        )
        blocks = np.asarray(ids)[:num_blocks].tolist()
        self.device_state.replace_tables([tables, *others])
        self.counts.num_free -= taken
        self.counts.taken.update(blocks)
        return blocks

    def release_taken(self, block_ids: Sequence[int]) -> None:
        """Releases the caller's reference to blocks of `take_blocks`."""
        num_blocks = self._release(block_ids)
        self.counts.taken.difference_update(block_ids)
        self.device_state.count_freed(num_blocks)

    def defragment(self) -> dict[int, int]:
        """Moves blocks to the low ids of their pool; returns the new id of each that moved.

        Blocks of `take_blocks` stay, since callers know their ids.
        """
        counts = self.counts
        ref_counts = jax.device_get([tables.ref_counts for tables in self.state.page_tables])
        plans = list(map(plan_defragment, ref_counts, counts.ids.split(counts.taken)))
        sources, targets = zip(*plans, strict=True)
        if any(ids.size for ids in sources):
            state = programs.move_blocks(self.state, sources, targets, self._scrub)
            self.device_state.replace(state)
        new_ids = dict[int, int]()
        for first, (old, new) in zip(counts.ids.firsts, plans, strict=True):
            moved = old != NULL_BLOCK
            pairs = zip((first + old[moved]).tolist(), (first + new[moved]).tolist(), strict=True)
            new_ids.update(pairs)
        return new_ids

    def _release(self, block_ids: Sequence[int]) -> PerPool:
        """Releases one reference to each block; returns how many each pool has of them."""
        of_pools = self.counts.ids.split(block_ids)
        if block_ids:
            ids = tuple(map(_padded, of_pools))
            self.device_state.replace(programs.release_blocks(self.state, ids, self._scrub))
        return PerPool(map(len, of_pools))

    def _padded_groups(self, of_groups: Sequence[Sequence[int]], most: int = 0) -> np.ndarray:
        return self.counts.ids.in_pools(stack_to_power_of_two(of_groups, NULL_BLOCK, most))


def _padded(block_ids: Sequence[int], at_least: int = 0) -> np.ndarray:
    """Returns ids with `NULL_BLOCK` behind them: i32[P], P a power of two."""
    return stack_to_power_of_two([block_ids], NULL_BLOCK, at_least)[0]
