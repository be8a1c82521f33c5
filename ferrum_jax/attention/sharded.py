"""Attention over a mesh: each device attends with the heads whose blocks it has."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from ferrum_jax.attention.inputs import AttentionInputs


def attend_over_mesh(
    kernel: Callable[[AttentionInputs], jax.Array], inputs: AttentionInputs
) -> jax.Array:
    """Runs a kernel on every device of a pool's mesh, on its own heads.

    Kernels view the pool as rows of `block, layer, head`, which the compiler cannot tell apart
    again: left to it, each device would first gather the whole pool.

    Args:
      kernel: Takes checked arguments, on one device.
      inputs: The whole arguments; their pool has a sharding.

    Returns:
      [R, T, H, G, D], sharded over H like the pool.
    """
    sharding = inputs.pool.sharding
    assert sharding is not None
    heads, sinks = sharding.spec, PartitionSpec(inputs.pool.mesh_axis)
    local = dataclasses.replace(inputs, pool=dataclasses.replace(inputs.pool, sharding=None))
    specs = jax.tree.map(lambda _: PartitionSpec(), local)
    specs = dataclasses.replace(
        specs,
        q=heads,
        pool=dataclasses.replace(specs.pool, k=heads, v=heads),
        options=jax.tree.map(lambda _: sinks, inputs.options),
    )
    # Kernels in foreign code have no rule for what varies over a mesh.
    run = jax.shard_map(
        kernel, mesh=sharding.mesh, in_specs=(specs,), out_specs=heads, check_vma=False
    )
    return run(local)
