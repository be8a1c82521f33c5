"""Every implementation of attention, run on CPU, and programs for devices that are not present."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from ferrum_jax.attention import AttentionCall, AttentionOptions, cpu, gpu, tpu, xla
from ferrum_jax.attention.call import attention_call
from ferrum_jax.attention.gpu.tuning import Tiling as GpuTiling
from ferrum_jax.attention.reference import reference_attention
from ferrum_jax.attention.tpu.tiling import Tiling as TpuTiling
from tests.support.attention_problems import Problem
from tests.support.pools import kv_pool

# Where there is a GPU, the tests run the compiled kernels.
INTERPRET = jax.default_backend() != "gpu"
SMALL_GPU = GpuTiling(tile_queries=16, tile_tokens=16, num_splits=4, num_warps=4, num_stages=5)
# Interpreted kernels are compiled once and run a few times.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


def interpreted():
    """Interprets TPU kernels: memory starts as NaN, and a copy is made when it is waited for."""
    return pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait")
    )


def run_cpu(call: AttentionCall) -> jax.Array:
    assert (cpu.accepts(call) or cpu.prepare(call)) is None
    return cpu.attend(call)


def run_gpu(call: AttentionCall, tiling: GpuTiling | None = None) -> jax.Array:
    assert gpu.refuse_shapes(call) is None
    return gpu.attend(call, tiling=tiling, interpret=INTERPRET)


def run_tpu(call: AttentionCall, tiling: TpuTiling | None = None) -> jax.Array:
    assert tpu.refuse_shapes(call) is None
    return tpu.attend(call, tiling)


def run_small_tpu(call: AttentionCall) -> jax.Array:
    """Takes one head, two blocks and about 16 queries at a time."""
    num_queries, group = call.q.shape[1], call.q.shape[3]
    multiple = math.lcm(16, group) // group
    tile_queries = num_queries if num_queries <= multiple else multiple
    return run_tpu(call, TpuTiling(tile_queries=tile_queries, tile_heads=1, tile_blocks=2))


KERNELS = {
    "reference": reference_attention,
    "xla": xla.attend,
    "cpu": run_cpu,
    "gpu": functools.partial(run_gpu, tiling=SMALL_GPU),
    "gpu of default tiling": run_gpu,
    "tpu": run_small_tpu,
    "tpu of default tiling": run_tpu,
}
ALL_KERNELS = ["reference", "xla", "cpu", "gpu", "tpu"]


@functools.cache
def compiled(kernel: str):
    """`(arguments, token_format) -> out` by a kernel, jitted once for all tests."""

    def run(arguments, token_format):
        call = attention_call(**arguments)
        return KERNELS[kernel](dataclasses.replace(call, token_format=token_format))

    is_interpreted = kernel.startswith("tpu") or (kernel.startswith("gpu") and INTERPRET)
    options = UNOPTIMIZED if is_interpreted else None
    return jax.jit(run, static_argnums=1, compiler_options=options)


def attend(kernel: str, p: Problem) -> jax.Array:
    """The result of a kernel, shape of `p.q`."""
    platform = kernel.split()[0]
    arguments = p.arguments(platform if platform in ("gpu", "tpu") else "cpu")
    with interpreted() if platform == "tpu" else contextlib.nullcontext():
        return compiled(kernel)(arguments, p.token_format).reshape(p.q.shape)


def abstract_call(
    *,
    heads=(32, 8, 128),
    rows=16,
    num_queries=1,
    dtype="bfloat16",
    q_dtype=None,
    num_blocks=1000,
    block_size=16,
    max_blocks=512,
    options=None,
    **changes,
) -> AttentionCall:
    """A call of shapes without data, for a platform other than "cpu"."""
    num_q_heads, num_kv_heads, head_dim = heads
    kv = jax.ShapeDtypeStruct((num_blocks, 4, num_kv_heads, block_size, head_dim), dtype)
    arguments = {
        "q": jax.ShapeDtypeStruct((rows, num_queries, num_q_heads, head_dim), q_dtype or dtype),
        "pool": kv_pool(kv, kv, dtype),
        "layer": jax.ShapeDtypeStruct((), jnp.int32),
        "block_ids": jax.ShapeDtypeStruct((rows, max_blocks), jnp.int32),
        "held_lens": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "q_lens": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "options": options or AttentionOptions(),
    }
    return dataclasses.replace(jax.eval_shape(attention_call, **arguments), **changes)


DEVICES = {
    "gpu": AbstractDevice(device_kind="NVIDIA H100", platform="gpu", num_cores=132),
    "tpu": AbstractDevice(device_kind="TPU v5 lite", platform="tpu", num_cores=1),
    "tpu v6": AbstractDevice(device_kind="TPU v6 lite", platform="tpu", num_cores=1),
}


def described(device: str):
    """Describes a device of `DEVICES` to JAX, as if there were one."""
    mesh = AbstractMesh((1,), ("x",), abstract_device=DEVICES[device])
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(device: str | None, platform: str, function, *args, **kwargs) -> str:
    """A program as it is exported for a platform, with a device described or not."""
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with described(device) if device else contextlib.nullcontext():
        lower = export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
        return lower(*args, **kwargs).mlir_module()


_ALL_OPTIONS = AttentionOptions(sliding_window=512, soft_cap=30.0, sinks=jnp.zeros(32))
TPU_CASES = {
    "32/8/128": {},
    "9/3/64": {"heads": (9, 3, 64), "block_size": 128, "max_blocks": 64},
    "64/8/128": {"heads": (64, 8, 128), "rows": 256, "max_blocks": 8192},
    "32/32/128 float32": {"heads": (32, 32, 128), "dtype": "float32"},
    "blocks of 8": {"block_size": 8},
    "blocks of 24": {"block_size": 24},
    "blocks of 4096": {"block_size": 4096, "num_blocks": 100, "num_queries": 600, "rows": 2},
    "float32 256": {"heads": (8, 2, 256), "dtype": "float32", "num_queries": 100},
    "float32 512": {"heads": (8, 2, 512), "dtype": "float32", "num_queries": 300, "rows": 2},
    "512": {"heads": (8, 1, 512), "options": AttentionOptions(sliding_window=512)},
    "72": {"heads": (20, 5, 72), "block_size": 128},
    "71 heads": {"heads": (71, 1, 64), "block_size": 128, "num_queries": 20},
    "wide queries": {"q_dtype": "float32"},
    "many rows": {"rows": 8192, "max_blocks": 32},
    "wide table": {"rows": 2, "max_blocks": 40_000},
    "chunk": {"num_queries": 512, "rows": 4},
    "chunk of 64": {"heads": (9, 3, 64), "block_size": 128, "num_queries": 512, "rows": 4},
    "all options": {"options": _ALL_OPTIONS, "num_queries": 200},
}
