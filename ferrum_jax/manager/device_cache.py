"""One device's cache behind a manager: every change of its state, counted as it is made."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import ferrum_jax.manager.programs as programs
from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.compression.methods import CompressionMethod, CompressionPlan
from ferrum_jax.compression.rewrite import Loss, Rewrite, compress_row, sample_queries
from ferrum_jax.config import CacheConfig, CacheGeometry
from ferrum_jax.errors import OutOfBlocksError
from ferrum_jax.manager.counts import RowShape
from ferrum_jax.manager.placement import init_at
from ferrum_jax.manager.settling import SettledCounts
from ferrum_jax.ops import gather
from ferrum_jax.ops.buckets import bucket_for, first_rows, pad_to_power_of_two
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.ops.migration import plan_defragment, resize
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ, Device, TokenFormat


class DeviceCache(SettledCounts):
    """A cache state that grows on demand, on one device or over a mesh. Not thread-safe.

    Callers ask `num_available` and `num_free_rows` first: no method here checks again. Each method
    changes the state by one program, and its counts after that: where the program fails, nothing
    has changed, or the state is lost and known to be.

    Attributes:
      geometry: What is cached, and the limits of a row.
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
        state = init_at(spec, device, mesh, axis_name)
        super().__init__(state, config.max_blocks, device, scrubs=scrubs)
        self.geometry = geometry
        self.block_bytes, self._initial_blocks = spec.block_bytes, config.initial_blocks
        self.growth_count = 0

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
        seq_id = self._free_rows[-1]
        if shape.num_tokens:
            numbers = seq_id, shape.token_format, shape.num_pruned, shape.num_tokens
            tables, ok = programs.allocate_rows(
                self.state.tables, *(np.asarray([x], np.int32) for x in numbers)
            )
            self.state = CacheState(self.state.pool, tables)
            self._oks.append(ok)
        self._free_rows.pop()
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
            max_new_tokens=self.block_size * next_power_of_two(blocks),
        )
        self.state = CacheState(self.state.pool, tables)
        self._oks.append(ok)
        for seq_id, count in zip(seq_ids, num_tokens, strict=True):
            self._count(seq_id, count)

    def free(self, seq_ids: Sequence[int]) -> None:
        """Ends sequences."""
        ids = pad_to_power_of_two(np.asarray(seq_ids), NULL_SEQ)
        self.state = programs.free_rows(self.state, ids, self._scrubs)
        rows = np.asarray(seq_ids)
        num_own = int((self.num_blocks_held[rows] - self.num_cached_blocks[rows]).sum())
        for counts in (*self._counts, self.num_cached_blocks):
            counts[rows] = 0
        self._free_rows.extend(seq_ids)
        self._count_freed(num_own)

    @contextlib.contextmanager
    def or_free(self, seq_id: int) -> Iterator[None]:
        """Frees a row that was just started if what follows fails; else the cache is lost."""
        try:
            yield
        except BaseException:
            if not self.is_lost:
                with self._reading():
                    self.free([seq_id])
            raise

    def share(
        self, rows: tuple[int, int], num_tokens: int, num_shared: int, kept: Sequence[int]
    ) -> None:
        """Lets a row hold the first tokens of another one; the cache is unsettled afterwards.

        Args:
          rows: The other row, and the one that changes.
          num_tokens: How many tokens.
          num_shared: Cached blocks of the other row, among those that hold them.
          kept: Cached blocks that the changed row keeps behind these `num_shared`.
        """
        source, target = rows
        self._make_free(self.num_blocks_to_share(target, num_tokens))
        numbers = num_tokens, num_shared
        were_held = programs.are_held(self.state.tables)
        self.state = programs.share_rows(
            self.state,
            (np.asarray(source, np.int32), np.asarray(target, np.int32)),
            *(np.asarray(x, np.int32) for x in numbers),
            self._padded(kept),
        )
        self._were_held = were_held
        self.num_cached_blocks[target] = num_shared + len(kept)

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
        seq_id = self._free_rows[-1]
        numbers = num_tokens, self.num_blocks if tail is None else tail, num_tail
        self.state, ok = programs.attach_row(
            self.state,
            np.asarray(seq_id, np.int32),
            self._padded(block_ids),
            *(np.asarray(x, np.int32) for x in numbers),
        )
        self._oks.append(ok)
        self._free_rows.pop()
        self.num_blocks_held[seq_id] = self.num_cached_blocks[seq_id] = num_shared
        self.num_tokens[seq_id] = num_shared * self.block_size
        self._count(seq_id, num_tokens - num_shared * self.block_size)
        return seq_id

    def keep(self, seq_id: int, adopted: Sequence[int], added: Sequence[int]) -> None:
        """Keeps a row's next blocks, behind those that are kept already, for later prompts.

        Args:
          seq_id: The row.
          adopted: Kept blocks of the same content, which it holds in place of its own first ones.
          added: Its own blocks behind these.
        """
        first = int(self.num_cached_blocks[seq_id])
        if not (adopted or added):
            return
        size = bucket_for(max(len(adopted), len(added)))
        ids = np.full((2, size), self.num_blocks, np.int32)
        ids[0, : len(adopted)], ids[1, : len(added)] = adopted, added
        row, place = np.asarray(seq_id, np.int32), np.asarray(first, np.int32)
        if adopted:
            self.state = programs.commit_row(self.state, row, place, *ids, self._scrubs)
        else:
            tables = programs.retain_blocks(self.state.tables, ids[1])
            self.state = CacheState(self.state.pool, tables)
        self.num_cached_blocks[seq_id] = first + len(adopted) + len(added)
        self.num_kept += len(added)
        self._count_freed(len(adopted))

    def num_written(self, seq_id: int, num_known: int, num_tokens: int) -> int:
        """Returns how many of a row's first tokens are written, as far as can be known; waits.

        What was never written is zero where freed blocks are erased. A pool of integers may round
        what is written to zero.

        Args:
          seq_id: The row, which is not compressed.
          num_known: Tokens, the first ones, that are surely written.
          num_tokens: Tokens to look at.
        """
        is_float = jnp.issubdtype(self.state.pool.dtype, jnp.floating)
        if not (self._scrubs and is_float) or num_tokens <= num_known:
            return num_tokens
        num_blocks = self.blocks_for(num_tokens) - num_known // self.block_size
        numbers = (np.asarray(x, np.int32) for x in (seq_id, num_known, num_tokens))
        return int(programs.num_written(self.state, *numbers, max_blocks=bucket_for(num_blocks)))

    def drop_kept(self, block_ids: Sequence[int]) -> None:
        """Keeps blocks no longer; no row holds them."""
        self._release(block_ids)
        self.num_kept -= len(block_ids)
        self._count_freed(len(block_ids))

    def uncache(self, rows: Mapping[int, int], block_ids: Sequence[int]) -> None:
        """Keeps blocks no longer that rows hold; waits for the device.

        Args:
          rows: Cached blocks that are left to each row that holds some of them.
          block_ids: The blocks.
        """
        were_held = programs.are_held(self.state.tables)
        self._release(block_ids)
        self._were_held = were_held
        self.num_kept -= len(block_ids)
        for seq_id, num_left in rows.items():
            self.num_cached_blocks[seq_id] = num_left
        self.settle()

    def take_blocks(self, num_blocks: int) -> list[int]:
        """Takes blocks for no row; waits for the device, which knows their ids."""
        self._make_free(num_blocks)
        tables, ids, _ = programs.take_blocks(
            self.state.tables, np.asarray(num_blocks, np.int32), max_blocks=bucket_for(num_blocks)
        )
        blocks = np.asarray(ids)[:num_blocks].tolist()
        self.state = CacheState(self.state.pool, tables)
        self.num_free -= num_blocks
        self.taken.update(blocks)
        return blocks

    def release_blocks(self, block_ids: Sequence[int]) -> None:
        """Gives taken blocks back."""
        self._release(block_ids)
        self.taken.difference_update(block_ids)
        self._count_freed(len(block_ids))

    def read(self, seq_id: int, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns a row's keys and values of one layer, each [tokens, H, D]; waits for the device.

        A program is compiled for each power of two of blocks, and none for a number of tokens.
        """
        self.require_state()
        shape = self.row_shape(seq_id)
        num_blocks = bucket_for(int(self.num_blocks_held[seq_id]))
        k, v = gather(self.state, layer, seq_id, shape.token_format, max_blocks=num_blocks)
        return first_rows(k, shape.num_tokens), first_rows(v, shape.num_tokens)

    def compress(
        self,
        seq_id: int,
        plan: CompressionPlan,
        method: CompressionMethod,
        queries: jax.Array | None,
    ) -> Loss:
        """Writes a row anew in fewer blocks; the cache is unsettled afterwards.

        Args:
          seq_id: The row.
          plan: What it is going to be. So many blocks are free as `num_blocks_to_compress` says.
          method: How tokens are chosen, if some are dropped.
          queries: f32[L, H, Q, D]. Reference queries; sampled if absent.

        Returns:
          What was lost, on the device.
        """
        shape = self.row_shape(seq_id)
        self.enable([plan.token_format])
        rewrite = Rewrite(
            source=shape.token_format,
            target=plan.token_format,
            max_source_blocks=bucket_for(int(self.num_blocks_held[seq_id])),
            max_target_blocks=bucket_for(plan.num_blocks),
            method=method if plan.num_kept < shape.num_tokens else None,
            scale=method.scale,
        )
        row = np.asarray(seq_id, np.int32)
        given = sample_queries(self.state, row, rewrite) if queries is None else queries
        were_held = programs.are_held(self.state.tables)
        self.state, _, loss = compress_row(self.state, row, plan.num_kept, given, rewrite)
        self._were_held = were_held
        self.num_cached_blocks[seq_id] = 0
        return loss

    def defragment(self) -> dict[int, int]:
        """Moves blocks to the low ids, and returns the new id of each that moved.

        Taken blocks stay, since callers know their ids.
        """
        ref_counts = jax.device_get(self.state.tables.ref_counts)
        sources, targets = plan_defragment(ref_counts, self.taken)
        if sources.size:
            self.state = programs.move_blocks(self.state, sources, targets, self._scrubs)
        moved = sources != NULL_BLOCK
        return dict(zip(sources[moved].tolist(), targets[moved].tolist(), strict=True))

    def num_blocks_to_shrink_to(self) -> int:
        """Returns the size to which `shrink` can bring the pool once it is defragmented."""
        return self._grown(max(self.num_used, max(self.taken, default=-1) + 1))

    def shrink(self) -> None:
        """Gives back what a defragmented pool has grown, as far as the live blocks allow."""
        smaller = self.num_blocks_to_shrink_to()
        if smaller < self.num_blocks:
            self._resize(smaller)

    def _release(self, block_ids: Sequence[int]) -> None:
        self.state = programs.release_blocks(self.state, self._padded(block_ids), self._scrubs)

    def _count_freed(self, num_freed: int) -> None:
        """Counts blocks as free; where rows may share some, the device is asked."""
        self.num_free += num_freed
        if self.may_share:
            with self._reading():
                self._read_counts()

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
        if num_blocks > self.max_blocks:
            raise OutOfBlocksError(
                f"{num_blocks} blocks are needed on {self.device}, and the pool can have "
                f"{self.max_blocks}. Deallocate a request, or raise max_blocks."
            )
        size = self._initial_blocks
        while size < num_blocks:
            size = min(2 * size, self.max_blocks)
        return size

    def _resize(self, num_blocks: int) -> None:
        num_new = num_blocks - self.num_blocks
        self.state = resize(self.state, num_blocks)  # Raises when memory is short.
        self.num_free += num_new
