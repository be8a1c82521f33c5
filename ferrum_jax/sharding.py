"""A cache on a mesh: each device has some heads of every block, and all tables."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ferrum_jax.spec import CacheSpec
from ferrum_jax.state import CacheState, init


def init_sharded(spec: CacheSpec, mesh: Mesh, axis_name: str) -> CacheState:
    """Returns an empty cache with its heads divided along a mesh axis, for tensor parallelism.

    It is used like any other cache. Writing and attention need no communication between devices;
    neither do the operations on tables, since each device has its own copy of these. To have all
    heads on each device instead, use `init(spec, mesh)`.

    If the mesh spans processes, all processes must make the same calls in the same order, with the
    same ids and lengths; `check_replicated` checks that they did.

    Args:
      spec: Sizes and dtype of the whole pool.
      mesh: The devices.
      axis_name: Mesh axis, of type Auto or Explicit, that divides the KV heads. The pool is
        replicated along any other axis; for rows and blocks of its own at each position of one,
        see `replicas.Replicas`.

    Returns:
      The cache: all blocks and rows free.

    Raises:
      ValueError: The mesh has no such axis, or its size does not divide the heads.

    Example:
      >>> mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32",
      ...                  num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
      >>> tuple(init_sharded(spec, mesh, "tp").pool.sharding.spec)
      (None, None, 'tp')
    """
    return init(spec, heads_sharding(spec, mesh, axis_name))


def heads_sharding(spec: CacheSpec, mesh: Mesh, axis_name: str) -> NamedSharding:
    """Returns how `init_sharded` divides pools; raises ValueError as it does."""
    check_axis("axis_name", axis_name, mesh)
    num_devices = mesh.shape[axis_name]
    for pool in spec.pools:
        if pool.payload.num_kv_heads % num_devices:
            raise ValueError(
                f"num_kv_heads ({pool.payload.num_kv_heads}) must be a multiple of the "
                f"{num_devices} devices on mesh axis {axis_name!r}. Use fewer devices; or "
                "replicate the heads: let the model write each head several times, and count the "
                "copies in num_kv_heads."
            )
    return NamedSharding(mesh, PartitionSpec(None, None, axis_name))


def check_axis(name: str, axis_name: str, mesh: Mesh) -> None:
    """Raises ValueError unless a mesh has an axis, of type Auto or Explicit.

    Args:
      name: The argument, for the message.
      axis_name: The axis.
      mesh: The devices.
    """
    axis_types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if axis_types.get(axis_name) not in (AxisType.Auto, AxisType.Explicit):
        raise ValueError(
            f"{name} {axis_name!r} must be an axis of type Auto or Explicit; the mesh has "
            f"{axis_types}. Name one of these, and give axis_types to jax.make_mesh."
        )


def check_replicated(tree: Any) -> None:
    """Raises unless all processes have equal values; every process must call it, and waits.

    Processes with different tables do not fail by themselves: each uses its own, and the model's
    output is wrong. A check costs a pass over the tables and two short messages.

    Args:
      tree: Pytree that should be equal in all processes: a `CacheState` (only its tables),
        or the ids and lengths for the next operation.

    Raises:
      AssertionError: A value differs between processes, or between two devices of one process. The
        text says which value, and where. Every process raises it.
      ValueError: An array is divided among devices, so that no device has the whole.

    Example:
      >>> check_replicated({"seq_ids": np.asarray([0, 1])})
    """
    tree = jax.tree.map(_replicated_part, tree, is_leaf=lambda node: isinstance(node, CacheState))
    leaves = {
        jax.tree_util.keystr(path): leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    forms = [f"{name} {leaf.dtype}{leaf.shape}" for name, leaf in leaves.items()]
    # Forms first: the second message has an entry per array, so their number must agree.
    _require_equal(["the structure"], [[repr(forms).encode()]])
    if leaves:
        _require_equal(list(leaves), [_copies(name, leaf) for name, leaf in leaves.items()])


def _replicated_part(node: Any) -> Any:
    return node.page_tables if isinstance(node, CacheState) else node


def _copies(name: str, leaf: jax.Array | np.ndarray) -> list[bytes]:
    """Returns the bytes of an array on each device of this process; one entry for NumPy."""
    if isinstance(leaf, np.ndarray):
        return [leaf.tobytes()]
    if not leaf.is_fully_replicated:
        raise ValueError(
            f"{name or 'The array'} is divided among devices ({leaf.sharding}). Check arrays that "
            "every device has as a whole."
        )
    return [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]


def _require_equal(names: Sequence[str], copies: Sequence[Sequence[bytes]]) -> None:
    """Raises AssertionError unless all copies of all processes agree.

    Args:
      names: Name of each value, for the error.
      copies: Bytes of each value, on each device of this process.
    """
    rows = []
    for same in copies:
        is_even = all(copy == same[0] for copy in same)
        rows.append([*hashlib.sha256(same[0]).digest(), is_even])
    everywhere = np.asarray(multihost_utils.process_allgather(np.asarray(rows, np.uint8)))
    differs = (everywhere != everywhere[:1]).any(-1) | (everywhere[..., -1] == 0)
    if differs.any():
        wrong = [f"{names[i] or 'the value'} of process {p}" for p, i in np.argwhere(differs)]
        raise AssertionError(
            f"The processes have diverged: {', '.join(wrong)} differs from process 0. Make the "
            "same calls in the same order everywhere, or let one process decide and broadcast."
        )
