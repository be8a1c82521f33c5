"""Equal caches along an axis of a mesh, each with rows and blocks of its own: data parallelism."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.checks import check_live
from ferrum_jax.errors import RefusedError
from ferrum_jax.meshes import map_along
from ferrum_jax.outcomes import require
from ferrum_jax.sharding import check_axis, heads_sharding
from ferrum_jax.spec import CacheSpec
from ferrum_jax.state import CacheState, init, init_tables
from ferrum_jax.types import NULL_SEQ, IdsLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replicas:
    """One cache per device, or per group of devices, along a mesh axis.

    P replicas of S rows each. Row numbers of all replicas are from 0 to P * S - 1: row s of
    replica p is `p * S + s`. A row's blocks are in the pool of its replica, so rows are forked and
    share prefixes within a replica only.

    Attributes:
      caches: The caches; each array has one more axis in front, of length P.
      mesh: The devices (static).
      batch_axis: The mesh axis of which each position has a cache (static).

    Example:
      >>> import ferrum_jax as fj
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32",
      ...                  num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
      >>> replicas = Replicas.init(spec, mesh, "data")
      >>> rows = replicas.split([0, 1])
      >>> def step(state, params, seq_ids, num_tokens):
      ...     return fj.allocate(state, seq_ids, num_tokens)
      >>> replicas, ok = replicas.run(step, (), rows.seq_ids, rows.spread([5, 3]))
      >>> replicas.require(ok, "allocate rows 0 and 1 for 5 and 3 tokens")
    """

    caches: CacheState
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    batch_axis: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls, spec: CacheSpec, mesh: Mesh, batch_axis: str, axis_name: str | None = None
    ) -> "Replicas":
        """Returns empty caches.

        Args:
          spec: Sizes and dtype of each replica's cache.
          mesh: The devices.
          batch_axis: Mesh axis, of type Auto or Explicit, of which each position has a cache.
          axis_name: Another axis, which divides the heads of each cache, as `init_sharded` does;
            None if each device of a replica has all heads.

        Raises:
          ValueError: The mesh has no such axis, or its size does not divide the heads.
        """
        check_axis("batch_axis", batch_axis, mesh)
        if axis_name == batch_axis:
            raise ValueError(
                f"batch_axis and axis_name are both {axis_name!r}. Divide the heads over another "
                "axis, or leave axis_name out."
            )
        heads = NamedSharding(mesh, PartitionSpec())
        if axis_name is not None:
            heads = heads_sharding(spec, mesh, axis_name)
        one = jax.eval_shape(lambda: init(spec, heads))
        num_replicas = mesh.shape[batch_axis]

        def empty(x: jax.ShapeDtypeStruct) -> jax.Array:
            sharding = NamedSharding(mesh, PartitionSpec(batch_axis, *heads.spec))
            return jnp.zeros((num_replicas, *x.shape), x.dtype, device=sharding)

        def repeated(x: jax.Array) -> jax.Array:
            sharding = NamedSharding(mesh, PartitionSpec(batch_axis))
            return jax.device_put(np.broadcast_to(x, (num_replicas, *x.shape)), sharding)

        tables = jax.device_get([init_tables(spec, pool) for pool in spec.pools])
        caches = one.with_pools(jax.tree.map(empty, one.pools))
        return cls(caches.with_tables(jax.tree.map(repeated, tables)), mesh, batch_axis)

    @property
    def num_replicas(self) -> int:
        """P, the number of caches."""
        return self.mesh.shape[self.batch_axis]

    @property
    def rows_per_replica(self) -> int:
        """S, the rows of each cache."""
        return self.caches.max_seqs

    def run(self, step: Callable[..., Any], shared: Any, *parts: Any) -> tuple["Replicas", Any]:
        """Runs a step on each replica, in one program; donates the caches.

        The replicas exchange nothing, and a loop in the step ends for each of them by itself.

        Args:
          step: `(state, shared, *parts) -> (state, result)`. It is given the cache of one replica,
            in which rows are numbered from 0 to S - 1, and may call any operation, `generate` too.
            Static: pass the same function at each call.
          shared: What all replicas use, such as parameters: a pytree.
          *parts: Pytrees of arrays [P, ...]; the step is given one position of the first axis.

        Returns:
          `(replicas, result)`: the changed caches, and the results, each [P, ...]. If another axis
          of the mesh is of type Explicit, each device of a replica has the whole result.

        Raises:
          ValueError: The caches were consumed before.
        """
        check_live("replicas", self.caches)
        caches, result = self.run_on(self.caches, step, shared, *parts)
        return dataclasses.replace(self, caches=caches), result

    def run_on(
        self, carried: Any, step: Callable[..., Any], shared: Any, *parts: Any
    ) -> tuple[Any, Any]:
        """Runs a step on each replica, as `run` does, on other arrays than the caches.

        Args:
          carried: What the step changes, a pytree of arrays [P, ...]; donated.
          step: `(carried, shared, *parts) -> (carried, result)`, the arrays without their first
            axis.
          shared: As in `run`.
          *parts: As in `run`.

        Returns:
          `(carried, result)`, each array [P, ...].
        """
        return _run(step, self.mesh, self.batch_axis, carried, shared, parts)

    def split(self, seq_ids: IdsLike) -> "ReplicaRows":
        """Groups rows, numbered over all replicas, by replica.

        Args:
          seq_ids: i32[n]. Rows, from 0 to P * S - 1, on the host.

        Raises:
          ValueError: There is no such row.
        """
        ids = np.asarray(seq_ids)
        num_rows = self.num_replicas * self.rows_per_replica
        if ids.ndim != 1 or ((ids < 0) | (ids >= num_rows)).any():
            raise ValueError(
                f"seq_ids must be rows from 0 to {num_rows - 1} ({self.num_replicas} replicas of "
                f"{self.rows_per_replica} rows), got {ids.tolist()}."
            )
        replicas, rows = np.divmod(ids.astype(np.int32), self.rows_per_replica)
        return ReplicaRows.of(replicas, rows, self.num_replicas)

    def on_host(self) -> list[CacheState]:
        """Returns the cache of each replica on the host, without its pools; waits for them."""
        tables = jax.device_get(self.caches.page_tables)
        without_pools = self.caches.with_pools(())
        return [
            without_pools.with_tables(jax.tree.map(lambda x, i=i: x[i], tables))
            for i in range(self.num_replicas)
        ]

    def require(self, ok: jax.Array | np.ndarray, what: str) -> None:
        """Raises unless an operation succeeded in each replica. Reads `ok`.

        Args:
          ok: bool[P, ...]. What `run` returned.
          what: The call, for the error.

        Raises:
          RefusedError: A replica refused; the text names the replicas, and what the first has free.
        """
        refused = [i for i, each in enumerate(np.asarray(ok)) if not np.all(each)]
        if refused:
            first = refused[0]
            with naming(first):
                require(False, what, self.on_host()[first])


@functools.partial(
    jax.jit, static_argnames=("step", "mesh", "batch_axis"), donate_argnames="carried"
)
def _run(
    step: Callable[..., Any],
    mesh: Mesh,
    batch_axis: str,
    carried: Any,
    shared: Any,
    parts: tuple[Any, ...],
) -> tuple[Any, Any]:
    """Runs a step on each replica; see `Replicas.run_on`."""

    def run_one(shared: Any, stacked: tuple[Any, ...]) -> Any:
        carried, *parts = jax.tree.map(lambda x: lax.squeeze(x, (0,)), stacked)
        changed = step(carried, shared, *parts)
        return jax.tree.map(lambda x: lax.expand_dims(jnp.asarray(x), (0,)), changed)

    return map_along(run_one, mesh, batch_axis, shared, (carried, *parts))


@dataclasses.dataclass(frozen=True)
class ReplicaRows:
    """Some rows of all replicas, grouped by replica, on the host.

    Attributes:
      seq_ids: i32[P, R]. Rows of each replica, numbered within it, then `NULL_SEQ`; R is a power
        of two.
      replicas: i32[n]. Replica of each row, in the order in which the rows were given.
      places: i32[n]. Place of each row among those of its replica.
    """

    seq_ids: np.ndarray
    replicas: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, replicas: np.ndarray, rows: np.ndarray, num_replicas: int) -> "ReplicaRows":
        """Groups rows (i32[n], numbered within their replica) by replica (i32[n])."""
        counts = np.zeros(num_replicas, np.int32)
        places = np.zeros(rows.size, np.int32)
        for i, replica in enumerate(replicas):
            places[i] = counts[replica]
            counts[replica] += 1
        seq_ids = np.full((num_replicas, next_power_of_two(int(counts.max()))), NULL_SEQ, np.int32)
        seq_ids[replicas, places] = rows
        return cls(seq_ids, replicas, places)

    def members(self, replica: int) -> np.ndarray:
        """Returns the indices of a replica's rows, in the order in which the rows were given."""
        return np.flatnonzero(self.replicas == replica)

    def spread(self, values: ArrayLike, fill_value: int = 0) -> np.ndarray:
        """Returns one value per row ([n, ...], on the host) as [P, R, ...], with padding."""
        values = np.asarray(values)
        spread = np.full((*self.seq_ids.shape, *values.shape[1:]), fill_value, values.dtype)
        spread[self.replicas, self.places] = values
        return spread

    def collect(self, x: jax.Array) -> jax.Array:
        """Returns a result of `Replicas.run` ([P, R, ...]) as [n, ...], on all devices."""
        if isinstance(x.sharding, NamedSharding):
            x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
        return _at(x, self.replicas, self.places)


@functools.partial(jax.jit, keep_unused=True)  # Even an empty result lies on the mesh.
def _at(x: jax.Array, *indices: jax.Array) -> jax.Array:
    return x[indices]


@contextlib.contextmanager
def naming(replica: int) -> Iterator[None]:
    """Names the replica in an error of the body."""
    try:
        yield
    except (RefusedError, ValueError) as error:
        raise type(error)(f"Replica {replica}: {error}") from error
