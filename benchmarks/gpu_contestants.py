"""What runs on a GPU beside our attention kernel, and the batches on which it does."""

import dataclasses
import functools
import gc
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention import gpu, xla
from ferrum_jax.attention.call import AttentionCall, attention_call
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.codecs import PackedCodec, codec_for
from ferrum_jax.payload import KeyValue
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK, TokenFormat

HEADS = {"32/8/128": (32, 8, 128), "9/3/64": (9, 3, 64), "64/8/128": (64, 8, 128)}
_DTYPE = jnp.bfloat16
_BLOCK_SIZE = 16
_PACKED_BLOCKS = 64
_MAX_CALLS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of ragged rows; R rows, Hq and H query and KV heads, D head dimension.

    Attributes:
      heads: Name in `HEADS`.
      rows: R.
      context: Tokens of the longest row; the others have between half of it and all.
      token_format: How our kernels find the tokens written; all others take native ones.
      cold_bytes: Bytes that the calls read before any is read again, so that none finds its keys
        in the GPU's cache: three times the second-level cache of an H100.
    """

    heads: str
    rows: int
    context: int
    token_format: str = TokenFormat.Native.name
    cold_bytes: int = 150 << 20

    @property
    def shape(self) -> tuple[int, int, int]:
        """Hq, H and D."""
        return HEADS[self.heads]

    @functools.cached_property
    def seq_lens(self) -> np.ndarray:
        """i32[R]."""
        rng = np.random.default_rng(0)
        seq_lens = rng.integers(self.context // 2, self.context + 1, self.rows)
        seq_lens[0] = self.context
        return seq_lens.astype(np.int32)

    @property
    def live_bytes(self) -> int:
        """Bytes of the keys and values that one call must read."""
        _, num_kv_heads, head_dim = self.shape
        words = 2 * head_dim
        if self.layout is not None:
            words = self.layout.k.num_words + self.layout.v.num_words + 2
        return int(self.seq_lens.sum()) * num_kv_heads * words * jnp.dtype(_DTYPE).itemsize

    @property
    def layout(self) -> PackedCodec | None:
        """Layout of the blocks, None if they are native."""
        payload = KeyValue(*self.shape[1:], _DTYPE)
        codec = codec_for(TokenFormat[self.token_format], payload, _BLOCK_SIZE)
        return codec if isinstance(codec, PackedCodec) else None

    @property
    def held(self) -> np.ndarray:
        """i64[R]. Blocks of each row."""
        return ceil_div(self.seq_lens, self.layout.num_tokens if self.layout else _BLOCK_SIZE)

    @property
    def copies(self) -> int:
        """Caches that the calls take in turn."""
        return ceil_div(self.cold_bytes, self.live_bytes)

    @property
    def loops(self) -> int:
        """Rounds over all copies in one program: enough that launching it hides behind another."""
        calls = min(_MAX_CALLS, 8 * self.cold_bytes // self.live_bytes)
        return max(1, calls // self.copies)

    @functools.cached_property
    def block_ids(self) -> np.ndarray:
        """i32[R, M]. Shuffled blocks."""
        held = self.held
        block_ids = np.full((self.rows, held.max()), NULL_BLOCK, np.int32)
        free = np.random.default_rng(1).permutation(held.sum()).astype(np.int32)
        for row, ids in enumerate(np.split(free, np.cumsum(held)[:-1])):
            block_ids[row, : ids.size] = ids
        return block_ids

    @property
    def num_blocks(self) -> int:
        """Blocks that all rows hold."""
        return int(self.held.sum())

    @property
    def pool_bytes(self) -> int:
        """Bytes of all blocks of all copies."""
        _, num_kv_heads, head_dim = self.shape
        block_numbers = 2 * num_kv_heads * _BLOCK_SIZE * head_dim
        return self.copies * self.num_blocks * block_numbers * jnp.dtype(_DTYPE).itemsize

    def q(self) -> jax.Array:
        """[R, Hq, D]."""
        num_q_heads, _, head_dim = self.shape
        return numbers((self.rows, num_q_heads, head_dim), 0)

    def dense(self) -> list[tuple[jax.Array, jax.Array]]:
        """Keys and values of each copy in a padded cache, [R, context, H, D]."""
        _, num_kv_heads, head_dim = self.shape
        return keys_and_values(self.copies, (self.rows, self.context, num_kv_heads, head_dim))


class Contestant(NamedTuple):
    """Attention on one case, compiled and ready to be timed.

    Attributes:
      run: Runs its program a given number of times in sequence, and waits for the last. A program
        is `case.copies * case.loops` calls of attention, each on the result of the one before.
      launched: How the GPU is given a program's kernels.
    """

    run: Callable[[int], None]
    launched: str = "in one program"


Builder = Callable[[Case], Contestant]


@functools.partial(jax.jit, static_argnames="shape")
def numbers(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Returns numbers in [-1, 1) that look random and take no memory but their own."""
    mixed = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        factor = jnp.uint32(0x9E3779B1 * (2 * axis + 1) % (1 << 32))
        mixed += lax.broadcasted_iota(jnp.uint32, shape, axis) * factor
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
    mixed = mixed ^ (mixed >> 13)
    return (mixed.astype(jnp.float32) * 2.0**-31 - 1.0).astype(_DTYPE)


def keys_and_values(copies: int, shape: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    """Returns a number of caches, if there is room for them.

    Args:
      copies: How many.
      shape: Of the keys of one, and of its values.

    Raises:
      MemoryError: There is none.
    """
    need_room(copies * 2 * int(np.prod(shape)) * jnp.dtype(_DTYPE).itemsize)
    return [(numbers(shape, 2 * i), numbers(shape, 2 * i + 1)) for i in range(copies)]


def need_room(num_bytes: int) -> None:
    """Raises a `MemoryError` if JAX has fewer than `num_bytes` left on the device."""
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit", num_bytes) - stats.get("bytes_in_use", 0)
    if num_bytes > free:
        asked, there = num_bytes / 2**30, free / 2**30
        raise MemoryError(f"out of memory: it takes {asked:.1f} GiB, and {there:.1f} are free.")


def free_memory() -> None:
    """Gives back what contestants before have left."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def chained(
    case: Case, attend: Callable[..., jax.Array], copies: Sequence[Any], *rest: Any
) -> Contestant:
    """Compiles one program: `attend(q, copy, *rest)`, again and again on its result.

    The arrays are arguments: constants would be copied into the program.
    """

    def program(q, copies, *rest):
        def one_round(_, q):
            for copy in copies:
                q = attend(q, copy, *rest).reshape(q.shape)
            return q

        return lax.fori_loop(0, case.loops, one_round, q)

    first, copies = case.q(), list(copies)
    compiled = jax.jit(program).lower(first, copies, *rest).compile()

    def run(times):
        q = first
        for _ in range(times):
            q = compiled(q, copies, *rest)
        jax.block_until_ready(q)

    return Contestant(run)


def paged(case: Case, kernel: Callable[..., jax.Array]) -> Contestant:
    """Makes one of our kernels ready, scanned over the layers of a pool as a model does."""

    def attend(q, layers, call):
        def one_layer(q, layer):
            return kernel(dataclasses.replace(call, q=q, layer=layer)), None

        return lax.scan(one_layer, q.reshape(call.q.shape), layers)[0]

    need_room(case.pool_bytes)
    return chained(case, attend, [jnp.arange(case.copies, dtype=jnp.int32)], call_of(case))


@functools.partial(jax.jit, static_argnames="case")
def call_of(case: Case) -> AttentionCall:
    """Returns what our kernels take, from a pool with a layer for each copy."""
    k, v = native_blocks(case) if case.layout is None else packed_blocks(case, case.layout)
    payload = KeyValue(k.shape[2], k.shape[4], _DTYPE)
    pool = BlockPool(payload.join(k, v), payload)
    rows = {"block_ids": jnp.asarray(case.block_ids), "held_lens": jnp.asarray(case.seq_lens)}
    call = attention_call(case.q(), pool, 0, options=AttentionOptions(), **rows)
    return dataclasses.replace(call, token_format=TokenFormat[case.token_format])


def native_blocks(case: Case) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values of all blocks, each [N, copies, H, B, D]."""
    _, num_kv_heads, head_dim = case.shape
    shape = (case.num_blocks, case.copies, num_kv_heads, _BLOCK_SIZE, head_dim)
    return numbers(shape, 0), numbers(shape, 1)


def packed_blocks(case: Case, layout: PackedCodec) -> tuple[jax.Array, jax.Array]:
    """Returns the same in a compressed format; few blocks differ, which saves memory."""
    _, num_kv_heads, head_dim = case.shape
    shape = (_PACKED_BLOCKS, case.copies, num_kv_heads, layout.num_tokens, head_dim)
    k, v = (numbers(shape, seed).astype(jnp.float32) for seed in range(2))
    which = jnp.arange(case.num_blocks, dtype=jnp.int32) % _PACKED_BLOCKS
    k, v = (half[which] for half in layout.encode(k, v, _DTYPE))
    return k, v


def dense_cudnn(case: Case) -> Contestant:
    """Makes JAX's attention on a padded cache ready, computed by cuDNN."""

    def attend(q, copy, seq_lens):
        return jax.nn.dot_product_attention(
            q[:, None], *copy, key_value_seq_lengths=seq_lens, implementation="cudnn"
        )

    return chained(case, attend, case.dense(), jnp.asarray(case.seq_lens))


def jax_paged(case: Case) -> Contestant:
    """Makes the paged kernel that JAX ships ready; its pool has the heads in front."""
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    _, num_kv_heads, head_dim = case.shape
    # It has no layers: each copy is blocks of its own. So its programs do not grow with them.
    shape = (num_kv_heads, case.copies * case.num_blocks, _BLOCK_SIZE, head_dim)
    ((k, v),) = keys_and_values(1, shape)
    # It splits the table into 16 parts of whole runs of 8 blocks.
    spare = -case.block_ids.shape[1] % 128
    block_ids = np.pad(np.maximum(case.block_ids, 0), ((0, 0), (0, spare)))
    tables = block_ids + case.num_blocks * np.arange(case.copies, dtype=np.int32)[:, None, None]

    def attend(q, tables, k, v, seq_lens):
        def one_copy(q, block_ids):
            return kernel.paged_attention(q * head_dim**-0.5, k, v, block_ids, seq_lens), None

        return lax.scan(one_copy, q, tables)[0]

    return chained(case, attend, [jnp.asarray(tables)], k, v, jnp.asarray(case.seq_lens))


def torch_sdpa(case: Case) -> Contestant:
    """Makes PyTorch's attention on a padded cache ready; heads of a group stand as queries.

    The mask is made once, as what is added to the logits. Without one, as for a single row, PyTorch
    has faster kernels.
    """
    torch: Any = importlib.import_module("torch")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    num_q_heads, num_kv_heads, head_dim = case.shape
    group = num_q_heads // num_kv_heads
    copies = [tuple(_to_torch(x).transpose(1, 2) for x in copy) for copy in case.dense()]
    first = _to_torch(case.q()).reshape(case.rows, num_kv_heads, group, head_dim)
    seq_lens = torch.as_tensor(case.seq_lens, device=first.device)
    unseen = torch.arange(case.context, device=first.device)[None, :] >= seq_lens[:, None]
    mask = None
    if (case.seq_lens < case.context).any():
        mask = torch.zeros(unseen.shape, dtype=first.dtype, device=first.device)
        mask = mask.masked_fill_(unseen, float("-inf"))[:, None, None, :].expand(-1, -1, group, -1)

    def call(q, copy):
        return sdpa(q, *copy, attn_mask=mask)

    return captured(case, call, first, copies)


def flashinfer(case: Case) -> Contestant:
    """Makes FlashInfer's batched decode ready, on a pool of our order of axes."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("flashinfer")
    num_q_heads, num_kv_heads, head_dim = case.shape
    shape = (case.num_blocks, num_kv_heads, _BLOCK_SIZE, head_dim)
    copies = [tuple(map(_to_torch, copy)) for copy in keys_and_values(case.copies, shape)]
    first = _to_torch(case.q())
    held = case.held
    indptr = np.concatenate([[0], np.cumsum(held)])
    last_block_tokens = case.seq_lens - (held - 1) * _BLOCK_SIZE
    tables = (indptr, case.block_ids[case.block_ids != NULL_BLOCK], last_block_tokens)
    tables = [torch.as_tensor(x, dtype=torch.int32, device=first.device) for x in tables]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=first.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        *tables,
        *(num_q_heads, num_kv_heads, head_dim, _BLOCK_SIZE),
        q_data_type=first.dtype,
        kv_data_type=first.dtype,
    )
    return captured(case, wrapper.run, first, copies)


def _to_torch(x: jax.Array) -> Any:
    return importlib.import_module("torch").from_dlpack(x.block_until_ready())


def captured(
    case: Case, call: Callable[[Any, Any], Any], first: Any, copies: Sequence[Any]
) -> Contestant:
    """Captures calls of a PyTorch function in a CUDA graph; or leaves them as they are."""
    torch: Any = importlib.import_module("torch")

    def program():
        q = first
        with torch.inference_mode():
            for copy in itertools.chain.from_iterable(itertools.repeat(copies, case.loops)):
                q = call(q, copy)

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        program()  # Before a capture libraries must have set themselves up.
    torch.cuda.synchronize()
    launch, launched = program, "call by call"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            program()
        launch, launched = graph.replay, "in one graph"
    except RuntimeError as error:
        launched += f": {str(error).strip().splitlines()[0][:60]}"

    def run(times, kept=program):  # A graph knows addresses alone: what lies there must stay.
        for _ in range(times):
            launch()
        torch.cuda.synchronize()

    return Contestant(run, launched)


def contestants(interpret: bool) -> Mapping[str, Builder]:
    """Returns all contestants' builders by name: ours first, then from the fastest to the slowest.

    Args:
      interpret: Whether our kernel runs without a GPU.
    """
    ours = functools.partial(gpu.attend, interpret=interpret)
    return {
        "ferrum_jax": functools.partial(paged, kernel=ours),
        "FlashInfer": flashinfer,
        "torch SDPA, dense": torch_sdpa,
        "jax.nn (cuDNN), dense": dense_cudnn,
        "jax paged_attention": jax_paged,
        "ferrum_jax, XLA": functools.partial(paged, kernel=xla.attend),
    }
