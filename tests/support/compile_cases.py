"""Every public call, as a function of a number that a caller may choose: a length, a count.

A case prepares, and returns the call that is to be counted.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.generate import GenerateOptions
from ferrum_jax.decoding.prefill import PrefillOptions
from ferrum_jax.decoding.prefill import plan_chunks as chunks_of
from ferrum_jax.decoding.sampling import Sampling
from ferrum_jax.integrations import generate as generate_tokens
from ferrum_jax.integrations import prefill as prefill_prompts
from ferrum_jax.integrations import queries as recording
from ferrum_jax.integrations.prompt_logprobs import PromptLogprobsOptions
from ferrum_jax.integrations.prompt_logprobs import prompt_logprobs as score_prompts
from ferrum_jax.integrations.serve import serve as serve_prompts
from ferrum_jax.integrations.serve_loop import ServeOptions
from ferrum_jax.ops import migration, transfer
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.types import TokenFormat
from tests.support.caches import tiny_spec
from tests.support.managers import PREFIXES, make_manager
from tests.support.pools import keys, values, with_arrays

MAX_TOKENS, MAX_ROWS, BLOCK_SIZE = 256, 16, 4
MAX_BLOCKS = MAX_TOKENS // BLOCK_SIZE
NUM_BLOCKS = 512
MODEL = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16}

Case: TypeAlias = Callable[["World", int], Callable[[], object]]
"""Takes a number above half of `MAX_TOKENS` and at most that; returns the call."""


def fill(state, _):
    """A step that writes every slot of the pool."""
    pool = with_arrays(state.pool, jnp.ones_like(keys(state.pool)), values(state.pool))
    return state.with_pools([pool]), None


class World:
    """A manager, another one to move requests to, and a state; seeded random numbers."""

    def __init__(self) -> None:
        self.manager, self.other = (self.new_manager() for _ in range(2))
        sizes = {"max_seqs": MAX_ROWS, "max_blocks_per_seq": MAX_BLOCKS}
        spec = tiny_spec(**MODEL, **sizes, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.empty = fj.init(spec)
        self.rng = np.random.default_rng(0)
        self.prompt = self.rng.integers(1, 10**6, MAX_TOKENS).tolist()
        self.taken: list[int] = []
        self._names = itertools.count()

    @staticmethod
    def new_manager() -> fj.PagedKvCacheManager:
        return make_manager(
            geometry={**MODEL, "max_seqs": MAX_ROWS, "max_sequence_length": MAX_TOKENS},
            block_size=BLOCK_SIZE,
            max_blocks=NUM_BLOCKS,
            enable_prefix_caching=True,
            prefix_cache_config=PREFIXES,
            token_formats=tuple(TokenFormat)[:2],
        )

    def start(self, num_tokens: int = 0, **more) -> Any:
        """Allocates a request in the manager, after what earlier cases left has ended."""
        return self.manager.allocate(self.request(num_tokens, **more))

    def request(self, num_tokens: int, **more) -> fj.AllocationRequest:
        return self.manager.new_request(next(self._names), num_tokens, **more)

    def several(self, n: int) -> list:
        """Allocates requests of a few tokens, more than half of `MAX_ROWS`."""
        return [self.start(1 + i % 9) for i in range(rows(n))]

    def tidy(self) -> None:
        """Ends all requests, so that each case finds room."""
        for manager in (self.manager, self.other):
            for name, _ in manager.list_handles():
                manager.deallocate(name)
        self.manager.free_blocks(self.taken)
        self.taken = []

    def filled(self, num_rows: int) -> fj.CacheState:
        """A state of which the first rows hold 6 tokens each."""
        counts = np.where(np.arange(MAX_ROWS) < num_rows, 6, 0)
        state, _ = fj.allocate(self.empty, np.arange(MAX_ROWS), counts)
        return state.with_pools([self.copied_pool()])

    def copied_pool(self) -> fj.state.BlockPool:
        """A pool that may be donated."""
        pool = self.empty.pool
        return jax.tree.map(jnp.copy, pool)


def rows(n: int) -> int:
    """Returns a number above half of `MAX_ROWS` and at most that."""
    return MAX_ROWS - n % (MAX_ROWS // 2)


# Managers.


def on_manager(name: str, *args: Any) -> Case:
    """A call, or a property, with arguments that no caller varies."""

    def case(world: World, _: int) -> Callable[[], object]:
        return lambda: _use(world.manager, name, args)

    return case


def _use(thing: Any, name: str, args: tuple) -> object:
    value = getattr(thing, name)
    return value(*args) if callable(value) else value


def allocate(world, n):
    """Some tokens are cached, the last of them in a block that is copied; others are not."""
    if not world.manager.list_handles():
        handle = world.start(MAX_TOKENS)
        world.manager.run(fill, [handle])
        world.manager.commit(handle, world.prompt)
    prompt = (world.prompt[:n] + [7] * (n % 5))[:MAX_TOKENS]
    request = world.request(len(prompt), prompt_token_ids=prompt)
    return lambda: world.manager.allocate(request)


def can_allocate(world, n):
    request = world.request(n)
    return lambda: world.manager.can_allocate(request)


def new_request(world, n):
    return lambda: world.manager.new_request("a", n)


def allocate_blocks(world, n):
    def call():
        world.taken = world.manager.allocate_blocks(n)

    return call


def free_blocks(world, n):
    ids = world.manager.allocate_blocks(n)
    return lambda: world.manager.free_blocks(ids)


def close(world, _):
    return world.new_manager().close


def commit(world, n):
    handle = world.start(n)
    world.manager.run(fill, [handle])
    return lambda: world.manager.commit(handle, world.rng.integers(1, 10**6, n).tolist())


def compress_cache(world, n):
    """Other numbers of the method each time, from 9 to 16 blocks to 5 to 8."""
    handle = world.start((n + 3) // 4)
    name, ratio = handle.request_id, (5 + n % 4) / handle.stats().blocks_allocated
    method = CompressionMethod(
        token_format=TokenFormat.Native,
        scorer="key_norm",
        num_sinks=int(world.rng.integers(2)),
        num_recent=int(world.rng.integers(2)),
        scale=0.1 + world.rng.random(),
    )
    return lambda: world.manager.compress_cache(name, ratio, method)


def deallocate(world, n):
    name = world.start(n).request_id
    return lambda: world.manager.deallocate(name)


def defragment(world, n):
    handles = world.several(n)
    for handle in handles[:: 1 + n % 3]:
        world.manager.deallocate(handle.request_id)
    return world.manager.defragment


def enable_prefix_caching(world, n):
    config = dataclasses.replace(PREFIXES, min_prefix_length=n)
    return lambda: world.manager.enable_prefix_caching(config)


def reset_prefixes(world, n):
    handle = world.start(n)
    world.manager.run(fill, [handle])
    world.manager.commit(handle, world.prompt[:n])
    return world.manager.reset_prefixes


def require(world, n):
    ok = jnp.asarray(True)
    return lambda: fj.require(ok, f"hold {n} tokens", world.empty)


def explain_lookup(world, n):
    return lambda: world.manager.explain_lookup(world.prompt[:n])


def extend(world, n):
    handle = world.start()
    return lambda: world.manager.extend(handle, n)


def extend_all(world, n):
    handles = world.several(n)
    return lambda: world.manager.extend_all(handles, 1 + n % 4)


def gc(world, n):
    world.several(n)  # Handles that are dropped at once.
    return world.manager.gc


def share_prefix(world, n):
    names = [world.start(MAX_TOKENS).request_id for _ in range(2)]
    return lambda: world.manager.share_prefix(*names, n)


def fork(world, n):
    source = world.start(n)
    world.manager.run(fill, [source])
    new_ids = [world.request(0).request_id for _ in range(rows(n) - 1)]
    return lambda: world.manager.fork(source.request_id, new_ids)


def swap_out(world, n):
    name = world.start(n // 8).request_id
    return lambda: world.manager.swap_out(name)


def swap_in(world, n):
    name = world.start(n // 8).request_id
    world.manager.swap_out(name)
    return lambda: world.manager.swap_in(name)


def move_to(world, n):
    name = world.start(n // 8).request_id
    return lambda: world.manager.move_to(name, world.other)


def run(world, n):
    """A caller pads the rows of its steps."""
    handles = world.several(n)
    handles += [None] * (MAX_ROWS - len(handles))
    return lambda: world.manager.run(
        lambda state, seq_ids: (state, seq_ids), handles, extends=True, reserve_tokens=n % 9
    )


# Handles.


def on_handle(name: str, *args: Any) -> Case:
    """A call, or a property, of the handle of a request with `n` tokens."""

    def case(world: World, n: int) -> Callable[[], object]:
        handle = world.start(n)
        return lambda: _use(handle, name, args)

    return case


def kv_cache_of_compressed(world, n):
    handle = world.start(128)
    method = CompressionMethod(token_format=TokenFormat.Int8, scorer=None)
    world.manager.compress_cache(handle.request_id, 0.5, method)
    world.manager.extend(handle, n % 100)
    return lambda: handle.kv_cache(0)


# Operations on a state. Ids and counts are the host's.


def state_allocate(world, n):
    ids = list(range(rows(n)))
    return lambda: fj.allocate(world.empty, ids, [n % 9] * len(ids))


def state_extend(world, n):
    """Either the rows are many, or the tokens may be."""
    num_rows, limit = (rows(n), 4) if n % 2 else (1, n)
    state, ids = world.filled(num_rows), np.arange(num_rows)
    return lambda: fj.extend(state, ids, n % 9, max_new_tokens=limit)


def state_free(world, n):
    state = world.filled(rows(n))
    return lambda: fj.free(state, list(range(rows(n))))


def state_fork(world, n):
    num_pairs = 5 + n % 4
    state = world.filled(num_pairs)
    children = num_pairs + np.arange(num_pairs)
    return lambda: fj.fork(state, np.arange(num_pairs), children)


def state_share(world, n):
    num_pairs = 5 + n % 4
    state = world.filled(2 * num_pairs)
    sources, targets = 2 * np.arange(num_pairs), 2 * np.arange(num_pairs) + 1
    return lambda: fj.share(state, sources, targets, n % 7)


def state_truncate(world, n):
    state = world.filled(rows(n))
    return lambda: fj.truncate(state, list(range(rows(n))), n % 7)


def gather(world, n):
    formats = TokenFormat.Native, TokenFormat.Int8
    state = enable_formats(world.empty, formats)
    return lambda: fj.gather(state, 0, n % MAX_ROWS, formats[n % 2])


def copy_blocks(world, n):
    pool, ids = world.copied_pool(), list(range(n))
    return lambda: fj.copy_blocks(pool, ids, [NUM_BLOCKS - 1 - i for i in ids])


def write(world, n):
    """A caller pads the tokens: their shape is one that it has compiled for."""
    pool, tokens = world.copied_pool(), np.ones((8, 1, 16), np.float32)
    slots = np.where(np.arange(8) < n % 9, n, -1)
    return lambda: fj.write(pool, 0, slots, tokens, tokens)


def paged_attention(world, n):
    tables = world.filled(rows(n)).tables
    q = jnp.ones((MAX_ROWS, 1, 16), jnp.float32)
    arrays = {"block_ids": tables.block_ids, "held_lens": jnp.minimum(tables.held_lens, n)}
    return lambda: fj.paged_attention(q, world.empty.pool, 0, **arrays)


def check_state(world, n):
    state = world.filled(rows(n))
    return lambda: fj.check_state(state)


def export_blocks(world, n):
    return lambda: transfer.export_blocks(world.empty.pool, list(range(n)))


def stream_blocks(world, n):
    ids = jnp.arange(MAX_TOKENS, dtype=jnp.int32)
    return lambda: list(transfer.stream_blocks(world.empty.pool, ids, n).chunks)


def import_blocks(world, n):
    ids = list(range(n // 16))
    payload, pool = transfer.export_blocks(world.empty.pool, ids), world.copied_pool()
    return lambda: transfer.import_blocks(pool, ids[::-1], payload)


def move_blocks(world, n):
    state = world.filled(MAX_ROWS)  # Two blocks each, the lowest ids.
    return lambda: migration.move_blocks(
        state, np.arange(rows(n)), NUM_BLOCKS - 1 - np.arange(rows(n))
    )


def plan_defragment(world, n):
    counts = (np.arange(NUM_BLOCKS) % n == 0).astype(np.int32)
    return lambda: migration.plan_defragment(counts)


# A model of one layer, in which keys and values are embeddings.


def model_fn(params, tokens, batch: PagedBatch):
    x = params[tokens][:, :, None]
    batch = batch.write(0, x, x)
    return batch.last(batch.attend(0, x))[:, 0], batch.pools


PARAMS = np.random.default_rng(1).normal(size=(99, 16)).astype(np.float32)


def prefill(world, n):
    num_prompts = rows(n)
    prompts = [world.rng.integers(0, 99, world.rng.integers(1, 6)).tolist() for _ in range(rows(n))]
    lens = np.asarray([len(prompt) for prompt in prompts])
    state, _ = fj.allocate(world.empty, np.arange(num_prompts), lens)
    state = state.with_pools([world.copied_pool()])
    options = PrefillOptions(chunk_tokens=4, rows_per_step=4)
    return lambda: prefill_prompts(
        model_fn, PARAMS, state, np.arange(num_prompts), prompts, options=options
    )


def manager_prefill(world, n):
    """Other prompts; a caller pads the requests."""
    handles, prompts = _prompted(world, n)
    return lambda: _prefill_requests(world, handles, prompts)


def manager_generate(world, n):
    """Other limits, and other stop tokens and numbers of them."""
    handles, prompts = _prompted(world, n)
    _prefill_requests(world, handles, prompts)
    options = GenerateOptions(
        max_new_tokens=4, stop_token_ids=tuple(world.rng.integers(0, 99, 5 + n % 4).tolist())
    )
    tokens = [-1 if handle is None else n % 99 for handle in handles]
    return lambda: world.manager.generate(model_fn, PARAMS, handles, tokens, options=options)


def _prompted(world, n):
    """Requests of a few tokens, padded, and their prompts."""
    prompts = [world.rng.integers(0, 99, 1 + (n + i) % 5).tolist() for i in range(rows(n))]
    handles = [world.start(len(prompt), prompt_token_ids=prompt) for prompt in prompts]
    num_missing = MAX_ROWS - len(prompts)
    return handles + [None] * num_missing, prompts + [[1]] * num_missing


def _prefill_requests(world, handles, prompts):
    options = PrefillOptions(chunk_tokens=4, rows_per_step=4)
    return world.manager.prefill(model_fn, PARAMS, handles, prompts, options=options)


def prompt_logprobs(world, n):
    """Prompts of which some tokens are cached, perhaps all."""
    state, options = world.filled(rows(n)), PromptLogprobsOptions(tokens_per_step=4)
    prompts = [world.rng.integers(0, 99, 6).tolist() for _ in range(rows(n))]
    return lambda: score_prompts(
        model_fn, PARAMS, state, np.arange(rows(n)), prompts, starts=n % 7, options=options
    )


def plan_chunks(world, n):
    prompts = [world.prompt[:n]] * rows(n)
    return lambda: chunks_of(prompts, PrefillOptions())


def generate(world, n):
    """Other limits, and other stop tokens and numbers of them; a caller pads the rows."""
    state = world.filled(4)
    options = GenerateOptions(
        max_new_tokens=4,
        stop_token_ids=tuple(world.rng.integers(0, 99, 5 + n % 4).tolist()),
        limits=world.rng.integers(0, 5, 4),
    )
    return lambda: generate_tokens(
        model_fn, PARAMS, state, np.arange(4), [n % 99] * 4, options=options
    )


def serve(world, n):
    """Other prompts, limits and stop tokens, and other numbers of these."""
    prompts = [world.rng.integers(0, 99, 5 + (n + i) % 4).tolist() for i in range(rows(n))]
    options = ServeOptions(
        max_new_tokens=4,
        stop_token_ids=tuple(world.rng.integers(0, 99, 5 + n % 4).tolist()),
        limits=world.rng.integers(1, 5, len(prompts)),
    )
    state = world.filled(8)
    return lambda: serve_prompts(model_fn, PARAMS, state, [8 + n % 4, 12], prompts, options=options)


def rollout(world, n):
    """Other prompts, some of them equal, limits and stop tokens, and other numbers of these."""
    prompts = [[int(world.rng.integers(0, 9))] * (5 + (n + i) % 4) for i in range(rows(n))]
    options = ServeOptions(
        max_new_tokens=4,
        stop_token_ids=tuple(world.rng.integers(0, 99, 5 + n % 4).tolist()),
        limits=world.rng.integers(1, 5, (len(prompts), 2)),
        sampling=Sampling(temperature=1.0),
    )
    state, key = world.filled(8), jax.random.key(n)
    return lambda: fj.rollout(model_fn, PARAMS, state, prompts, samples=2, options=options, key=key)


def record_queries(world, n):
    """A caller asks for the queries of equally many tokens each time."""
    state = world.filled(rows(n))
    return lambda: recording.record_queries(
        model_fn, PARAMS, state, [n % rows(n)], [[n % 99] * 4], num_q_heads=1
    )
