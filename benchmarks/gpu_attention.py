"""One decoding step of attention on a GPU: our kernel against others, as parts of a plain copy.

Run `python -m benchmarks.gpu_attention --json FILE`: all shapes in one run of less than ten
minutes. `--tune` tries tile sizes instead and prints the best for each shape. Every figure is of
many calls inside one program, each of which depends on the last one's result and reads other keys.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.harness import (
    make_parser,
    print_table,
    progress,
    run,
    say,
    summarize,
    time_interleaved,
)
from ferrum_jax.attention.gpu import gpu_attention
from ferrum_jax.attention.gpu_tuning import Tiling, tiling_for
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK

_HEADS = {"32/8/128": (32, 8, 128), "9/3/64": (9, 3, 64), "64/8/128": (64, 8, 128)}
_DTYPE = jnp.bfloat16
_BLOCK_SIZE = 16
_COLD_BYTES = 150 << 20  # Three times the second-level cache of an H100.
_MAX_COPIES = 8
_TIMED_BYTES = 8 << 30  # About 4 ms on an H100.
_MAX_CALLS = 128
_REPEATS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of ragged rows; R rows, Hq and H query and KV heads, D head dimension.

    Attributes:
      heads: Name in `_HEADS`.
      rows: R.
      context: Tokens of the longest row; the others have between half of it and all.
    """

    heads: str
    rows: int
    context: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Hq, H and D."""
        return _HEADS[self.heads]

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
        vectors = int(self.seq_lens.sum()) * num_kv_heads
        return 2 * vectors * head_dim * jnp.dtype(_DTYPE).itemsize

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
        held = -(-self.seq_lens // _BLOCK_SIZE)
        block_ids = np.full((self.rows, held.max()), NULL_BLOCK, np.int32)
        free = np.random.default_rng(1).permutation(held.sum()).astype(np.int32)
        for row, ids in enumerate(np.split(free, np.cumsum(held)[:-1])):
            block_ids[row, : ids.size] = ids
        return block_ids

    @property
    def num_blocks(self) -> int:
        """Blocks that all rows hold."""
        return int((-(-self.seq_lens // _BLOCK_SIZE)).sum())

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


def paged(case: Case, kernel: Callable[[AttentionInputs], jax.Array]) -> Callable[[], jax.Array]:
    """Returns one of our kernels, scanned over the layers of a pool as a model does."""

    def attend(q, layers, inputs):
        def one_layer(q, layer):
            return kernel(dataclasses.replace(inputs, q=q, layer=layer)), None

        return lax.scan(one_layer, q.reshape(inputs.q.shape), layers)[0]

    return chained(case, attend, [jnp.arange(case.copies, dtype=jnp.int32)], inputs_of(case))


def inputs_of(case: Case) -> AttentionInputs:
    """Returns what our kernels take, from a pool with a layer for each copy."""
    _, num_kv_heads, head_dim = case.shape
    shape = (case.num_blocks, case.copies, num_kv_heads, _BLOCK_SIZE, head_dim)
    pool = BlockPool(k=numbers(shape), v=numbers(shape), dtype=jnp.dtype(_DTYPE))
    block_ids, seq_lens = jnp.asarray(case.block_ids), jnp.asarray(case.seq_lens)
    return attention_inputs(case.q(), pool, 0, block_ids, seq_lens, None, AttentionOptions())


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
    held = -(-case.seq_lens // _BLOCK_SIZE)
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


def copy_bandwidth(small: bool) -> float:
    """Returns bytes a second, read and written together, of copying 2 GiB (or 2 MiB)."""
    x = jnp.zeros((1 << (19 if small else 29),), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    seconds = time_interleaved({"copy": lambda: copy(x)}, _REPEATS)["copy"]
    return 2 * x.size * x.dtype.itemsize / float(np.median(seconds))


def measure(case: Case, build: Callable[[Case], Callable[[], Any]]) -> dict[str, Any]:
    """Times one contestant, or says why it could not run."""
    try:
        function = build(case)
        seconds = time_interleaved({"it": function}, _REPEATS, warmups=1)["it"]
    except Exception as error:  # Others' kernels fail in ways of their own; the run goes on.
        lines = str(error).strip().splitlines() or [""]
        return {"microseconds": None, "failed": f"{type(error).__name__}: {lines[0][:90]}"}
    calls = case.copies * case.loops
    figure = summarize(seconds)
    return {
        "microseconds": figure["median_ms"] * 1e3 / calls,
        "min_microseconds": figure["min_ms"] * 1e3 / calls,
        "gigabytes_per_second": case.live_bytes * calls / figure["median_ms"] / 1e6,
    }


def difference(case: Case, interpret: bool) -> float:
    """Returns the largest difference between our kernel and the XLA one, on one call."""
    inputs = inputs_of(case)
    ours = gpu_attention(inputs, interpret=interpret).astype(jnp.float32)
    return float(jnp.max(jnp.abs(ours - xla_attention(inputs).astype(jnp.float32))))


def compare(case: Case, interpret: bool, copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """Times all contestants on one case and returns a figure for each."""
    figures = []
    for name, build in contestants(interpret).items():
        figure = {**dataclasses.asdict(case), "contestant": name, **measure(case, build)}
        if "gigabytes_per_second" in figure:
            figure["of_copy"] = figure["gigabytes_per_second"] * 1e9 / copy_bytes_per_second
        figures.append(figure)
    figures[0]["difference_from_xla"] = difference(case, interpret)
    return figures


def tilings(case: Case) -> Iterator[Tiling]:
    """Yields the tiling in use, and then others."""
    used = tiling_for(jax.eval_shape(lambda: inputs_of(case)))
    yield used
    for tokens, warps, stages in itertools.product((32, 64, 128), (4, 8), (3, 5, 7)):
        yield dataclasses.replace(used, tile_tokens=tokens, num_warps=warps, num_stages=stages)
    for num_splits in (used.num_splits // 4, used.num_splits // 2, used.num_splits * 2):
        if num_splits > 0:
            yield dataclasses.replace(used, num_splits=num_splits)


def tune(case: Case, interpret: bool, copy_bytes_per_second: float) -> list[dict[str, Any]]:
    """Times our kernel with every tiling; the one in use comes first, then the best first."""
    figures = []
    for tiling in dict.fromkeys(tilings(case)):
        kernel = functools.partial(gpu_attention, tiling=tiling, interpret=interpret)
        figure = measure(case, functools.partial(paged, kernel=kernel))
        if "gigabytes_per_second" in figure:
            figure["of_copy"] = figure["gigabytes_per_second"] * 1e9 / copy_bytes_per_second
        figures.append({**dataclasses.asdict(case), **dataclasses.asdict(tiling), **figure})
    figures[1:] = sorted(figures[1:], key=lambda figure: figure["microseconds"] or float("inf"))
    return figures


def show(figures: Sequence[dict[str, Any]], hidden: Sequence[str] = ()) -> None:
    """Prints figures as a table; what some of them lack is left empty."""
    columns = [c for c in dict.fromkeys(itertools.chain(*figures)) if c not in hidden]
    print_table(columns, [[figure.get(column, "") for column in columns] for figure in figures])
    say()


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yields the shapes asked for, the most telling first."""
    if args.interpret:
        yield Case(heads="9/3/64", rows=2, context=40)
        return
    rows, contexts = (
        ((16, 64), (8192,))
        if args.quick or args.tune
        else (
            (16, 64, 1, 256),
            (8192, 1024, 32768),
        )
    )
    for context, num_rows, heads in itertools.product(contexts, rows, _HEADS):
        yield Case(heads=heads, rows=num_rows, context=context)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Times every shape, prints a table of each, and returns all figures."""
    if jax.default_backend() != "gpu" and not args.interpret:
        raise SystemExit(
            f"There is no GPU here, only {jax.devices()}. --interpret tries the script."
        )
    start = time.monotonic()
    copied = [copy_bandwidth(args.interpret)]
    say(f"copying moves {copied[0] / 1e9:.0f} GB/s, read and written\n")
    figures = []
    for case in progress(cases(args), "shape"):
        if time.monotonic() - start > args.limit_seconds:
            say(f"Out of time before {case}: see --limit-seconds.")
            break
        part = (tune if args.tune else compare)(case, args.interpret, copied[0])
        show(part[:5] if args.tune else part, hidden=("min_microseconds",))
        figures += part
    copied.append(copy_bandwidth(args.interpret))
    say(f"copying still moves {copied[1] / 1e9:.0f} GB/s; {time.monotonic() - start:.0f} s in all")
    return {"copy_bytes_per_second": copied, "figures": figures}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("gpu_attention", __doc__, quick="two batches of one context")
    parser.add_argument("--tune", action="store_true", help="try tile sizes instead")
    parser.add_argument("--interpret", action="store_true", help="test this script without a GPU")
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="start no shape after")
    run(parser, measure_all, argv)


if __name__ == "__main__":
    main()
