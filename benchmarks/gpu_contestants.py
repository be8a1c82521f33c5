"""What runs on a GPU beside our attention kernel, and the batches on which it does."""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.attention.gpu import gpu_attention
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.formats import BlockLayout, block_layout
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK, TokenFormat

HEADS = {"32/8/128": (32, 8, 128), "9/3/64": (9, 3, 64), "64/8/128": (64, 8, 128)}
_DTYPE = jnp.bfloat16
_BLOCK_SIZE = 16
_COLD_BYTES = 150 << 20  # Three times the second-level cache of an H100.
_MAX_COPIES = 8
_PACKED_BLOCKS = 64
_TIMED_BYTES = 8 << 30  # About 4 ms on an H100.
_MAX_CALLS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of ragged rows; R rows, Hq and H query and KV heads, D head dimension.

    Attributes:
      heads: Name in `HEADS`.
      rows: R.
      context: Tokens of the longest row; the others have between half of it and all.
      token_format: How our kernels find the tokens written; all others take native ones.
    """

    heads: str
    rows: int
    context: int
    token_format: str = TokenFormat.Native.name

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
    def layout(self) -> BlockLayout | None:
        """Layout of the blocks, None if they are native."""
        token_format, head_dim = TokenFormat[self.token_format], self.shape[-1]
        if token_format == TokenFormat.Native:
            return None
        return block_layout(token_format, block_size=_BLOCK_SIZE, head_dim=head_dim, dtype=_DTYPE)

    @property
    def held(self) -> np.ndarray:
        """i64[R]. Blocks of each row."""
        return -(-self.seq_lens // (self.layout.num_tokens if self.layout else _BLOCK_SIZE))

    @property
    def copies(self) -> int:
        """Caches that the calls take in turn, so that none finds its keys in the GPU's cache."""
        return min(_MAX_COPIES, -(-_COLD_BYTES // self.live_bytes))

    @property
    def loops(self) -> int:
        """Rounds over all copies in one program."""
        calls = min(_MAX_CALLS, _TIMED_BYTES // self.live_bytes)
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

    def q(self) -> jax.Array:
        """[R, Hq, D]."""
        num_q_heads, _, head_dim = self.shape
        return numbers((self.rows, num_q_heads, head_dim))

    def dense(self) -> list[tuple[jax.Array, jax.Array]]:
        """Keys and values of each copy in a padded cache, [R, context, H, D]."""
        _, num_kv_heads, head_dim = self.shape
        shape = (self.rows, self.context, num_kv_heads, head_dim)
        return [(numbers(shape), numbers(shape)) for _ in range(self.copies)]


@functools.partial(jax.jit, static_argnames="shape")
def numbers(shape: tuple[int, ...]) -> jax.Array:
    """Returns numbers in [-1, 1) that look random and take no memory but their own."""
    mixed = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        factor = jnp.uint32(0x9E3779B1 * (2 * axis + 1) % (1 << 32))
        mixed += lax.broadcasted_iota(jnp.uint32, shape, axis) * factor
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
    mixed = mixed ^ (mixed >> 13)
    return (mixed.astype(jnp.float32) * 2.0**-31 - 1.0).astype(_DTYPE)


def chained(
    case: Case, attend: Callable[..., jax.Array], copies: Sequence[Any], *rest: Any
) -> Callable[[], jax.Array]:
    """Returns a function of one program: `attend(q, copy, *rest)`, again and again on its result.

    The arrays are arguments: constants would be copied into the program.
    """

    @jax.jit
    def program(q, copies, *rest):
        def one_round(_, q):
            for copy in copies:
                q = attend(q, copy, *rest).reshape(q.shape)
            return q

        return lax.fori_loop(0, case.loops, one_round, q)

    q = case.q()
    return lambda: program(q, list(copies), *rest)


def paged(case: Case, kernel: Callable[..., jax.Array]) -> Callable[[], jax.Array]:
    """Returns one of our kernels, scanned over the layers of a pool as a model does."""
    token_format = TokenFormat[case.token_format]

    def attend(q, layers, inputs):
        def one_layer(q, layer):
            layer_inputs = dataclasses.replace(inputs, q=q, layer=layer)
            return kernel(layer_inputs, token_format=token_format), None

        return lax.scan(one_layer, q.reshape(inputs.q.shape), layers)[0]

    return chained(case, attend, [jnp.arange(case.copies, dtype=jnp.int32)], inputs_of(case))


def inputs_of(case: Case) -> AttentionInputs:
    """Returns what our kernels take, from a pool with a layer for each copy."""
    k, v = native_pages(case) if case.layout is None else packed_pages(case, case.layout)
    pool = BlockPool(k=k, v=v, dtype=jnp.dtype(_DTYPE))
    block_ids, seq_lens = jnp.asarray(case.block_ids), jnp.asarray(case.seq_lens)
    return attention_inputs(case.q(), pool, 0, block_ids, seq_lens, None, AttentionOptions())


def native_pages(case: Case) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values of all blocks, each [N, copies, H, B, D]."""
    _, num_kv_heads, head_dim = case.shape
    shape = (case.num_blocks, case.copies, num_kv_heads, _BLOCK_SIZE, head_dim)
    return numbers(shape), numbers(shape)


def packed_pages(case: Case, layout: BlockLayout) -> tuple[jax.Array, jax.Array]:
    """Returns the same in a compressed format; few blocks differ, which saves memory."""
    _, num_kv_heads, head_dim = case.shape
    shape = (_PACKED_BLOCKS, case.copies, num_kv_heads, layout.num_tokens, head_dim)
    kv = numbers(shape).astype(jnp.float32)
    which = jnp.arange(case.num_blocks, dtype=jnp.int32) % _PACKED_BLOCKS
    shape = (case.num_blocks, *shape[1:3], _BLOCK_SIZE, head_dim)
    k, v = (page[which].reshape(shape) for page in layout.encode(kv, kv, _DTYPE))
    return k, v


def dense_cudnn(case: Case) -> Callable[[], jax.Array]:
    """Returns JAX's attention on a padded cache, computed by cuDNN."""

    def attend(q, copy, seq_lens):
        return jax.nn.dot_product_attention(
            q[:, None], *copy, key_value_seq_lengths=seq_lens, implementation="cudnn"
        )

    return chained(case, attend, case.dense(), jnp.asarray(case.seq_lens))


def jax_paged(case: Case) -> Callable[[], jax.Array]:
    """Returns the paged kernel that JAX ships; its pool has the heads in front."""
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    _, num_kv_heads, head_dim = case.shape
    shape = (num_kv_heads, case.num_blocks, _BLOCK_SIZE, head_dim)
    copies = [(numbers(shape), numbers(shape)) for _ in range(case.copies)]
    # It splits the table into 16 parts of whole runs of 8 blocks.
    spare = -case.block_ids.shape[1] % 128
    block_ids = np.pad(np.maximum(case.block_ids, 0), ((0, 0), (0, spare)))

    def attend(q, copy, block_ids, seq_lens):
        return kernel.paged_attention(q * head_dim**-0.5, *copy, block_ids, seq_lens)

    return chained(case, attend, copies, jnp.asarray(block_ids), jnp.asarray(case.seq_lens))


def torch_sdpa(case: Case) -> Callable[[], Any]:
    """Returns PyTorch's attention under a mask; heads of a group stand as queries."""
    torch: Any = importlib.import_module("torch")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    num_q_heads, num_kv_heads, head_dim = case.shape
    copies = [tuple(torch.from_dlpack(x).transpose(1, 2) for x in copy) for copy in case.dense()]
    first = torch.from_dlpack(case.q())
    first = first.reshape(case.rows, num_kv_heads, num_q_heads // num_kv_heads, head_dim)
    seq_lens = torch.as_tensor(case.seq_lens, device=first.device)
    mask = torch.arange(case.context, device=first.device)[None, :] < seq_lens[:, None]
    mask = mask[:, None, None, :].expand(-1, -1, first.shape[2], -1)

    def program():
        q = first
        with torch.inference_mode():
            for k, v in itertools.chain.from_iterable(itertools.repeat(copies, case.loops)):
                q = sdpa(q, k, v, attn_mask=mask)
            torch.cuda.synchronize()

    return program


def flashinfer(case: Case) -> Callable[[], Any]:
    """Returns FlashInfer's batched decode on a pool of our order of axes."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("flashinfer")
    num_q_heads, num_kv_heads, head_dim = case.shape
    shape = (case.num_blocks, num_kv_heads, _BLOCK_SIZE, head_dim)
    copies = [
        tuple(torch.from_dlpack(numbers(shape)) for _ in range(2)) for _ in range(case.copies)
    ]
    first = torch.from_dlpack(case.q())
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

    def program():
        q = first
        for copy in itertools.chain.from_iterable(itertools.repeat(copies, case.loops)):
            q = wrapper.run(q, copy)
        torch.cuda.synchronize()

    return program


def contestants(interpret: bool) -> dict[str, Callable[[Case], Callable[[], Any]]]:
    """Returns all contestants' builders by name."""
    ours = functools.partial(gpu_attention, interpret=interpret)
    return {
        "ferrum_jax": functools.partial(paged, kernel=ours),
        "ferrum_jax, XLA": functools.partial(paged, kernel=xla_attention),
        "jax.nn (cuDNN), dense": dense_cudnn,
        "jax paged_attention": jax_paged,
        "torch SDPA, dense": torch_sdpa,
        "FlashInfer": flashinfer,
    }
