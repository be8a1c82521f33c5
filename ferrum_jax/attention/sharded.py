"""Attention over a mesh: each device attends with the heads that it stores."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.meshes import divided_like, on_each_device


def attend_over_mesh(
    attend: Callable[[AttentionCall], jax.Array], call: AttentionCall
) -> jax.Array:
    """Computes attention on every device of a pool's mesh, for the heads of the device.

    Kernels view the pool as rows of `block, layer, head`, and the compiler cannot separate the
    heads again: without `shard_map`, each device would first gather the whole pool.

    Args:
      attend: Computes attention on one device.
      call: Checked arguments; the pool has a sharding.

    Returns:
      [R, T, H, G, D], sharded over H like the pool; over axes of type Explicit, like the queries.

    Raises:
      ValueError: The queries are divided along an axis of type Explicit, and not over the heads.
    """
    sharding = call.pool.sharding
    assert sharding is not None
    heads, sinks = sharding.spec, PartitionSpec(call.pool.mesh_axis)
    local = dataclasses.replace(call, pool=dataclasses.replace(call.pool, sharding=None))
    specs = jax.tree.map(lambda _: PartitionSpec(), local)
    specs = dataclasses.replace(
        specs,
        q=heads,
        pool=jax.tree.map(lambda _: heads, local.pool),
        options=jax.tree.map(lambda _: sinks, call.options),
    )
    out = on_each_device(attend, sharding.mesh, {"paged_attention's ": (local, specs)}, heads)
    return divided_like(out, call.q, sharding.mesh)
