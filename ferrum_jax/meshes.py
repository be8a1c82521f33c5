"""Runs a function on each device of a mesh, or for each position along one of its axes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh: TypeAlias = Mesh | AbstractMesh
"""A mesh, or what is known of it while a program is traced."""


def on_each_device(
    function: Callable[..., Any],
    mesh: AnyMesh | None,
    args: Mapping[str, tuple[Any, Any]],
    out_specs: Any,
) -> Any:
    """Runs a function on every device of a mesh, without an exchange between devices.

    An argument that is replicated along an axis is cut there if its specs divide it, whether the
    axis is of type Auto or Explicit.

    Args:
      function: Takes and returns the parts of one device.
      mesh: The mesh; None for one device. Axes that a `jax.shard_map` around the call has made
        Manual stay as they are.
      args: Arguments in order, by the name for errors: a pytree, and its partition specs (one, or
        a tree that is a prefix of the argument's).
      out_specs: Partition specs of the result.

    Returns:
      The result, divided as `out_specs` says.

    Raises:
      ValueError: The devices would have to exchange parts of an argument, which is divided
        otherwise along an axis of type Explicit.
    """
    if mesh is None:
        return function(*(arg for arg, _ in args.values()))
    mesh = _mesh_here(mesh)
    names = {name for name, kind in _axis_types(mesh).items() if kind != AxisType.Manual}
    parts = [_cut(name, *arg, mesh) for name, arg in args.items()]
    if not names:
        return function(*parts)
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(specs for _, specs in args.values()),
        out_specs=out_specs,
        axis_names=names,
        check_vma=False,  # Kernels in foreign code have no rule for what varies over a mesh.
    )
    return run(*parts)


def with_auto_axes(
    function: Callable[..., tuple[Any, Any]], mesh: AnyMesh | None
) -> Callable[..., tuple[Any, Any]]:
    """Returns a function that runs with axes of type Auto, also where those of a mesh are Explicit.

    Args:
      function: `(state, *args) -> (state, result)`. The state's arrays stay divided as they are,
        and the result is replicated.
      mesh: The mesh; None for one device.
    """
    explicit = () if mesh is None else _explicit_axes(_mesh_here(mesh))
    if mesh is None or not explicit:
        return function
    replicated = NamedSharding(_mesh_here(mesh), PartitionSpec())

    def run(state: Any, *args: Any) -> tuple[Any, Any]:
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, state), replicated
        auto_axes = jax.sharding.auto_axes(axes=explicit, out_sharding=shardings)
        return auto_axes(function)(state, *args)

    return run


def divided_like(x: jax.Array, model: jax.Array, mesh: AnyMesh) -> jax.Array:
    """Returns an array divided as another one along axes of type Explicit.

    Args:
      x: The array.
      model: Array of the same rank. One without a sharding on the mesh counts as replicated.
      mesh: The mesh of `x`.
    """
    mesh = _mesh_here(mesh)
    if not _explicit_axes(mesh):
        return x
    sharding = jax.typeof(model).sharding
    spec = PartitionSpec() if sharding.mesh.empty else sharding.spec
    return jax.reshard(x, NamedSharding(mesh, spec))


def map_along(
    function: Callable[..., tuple[Any, Any]],
    mesh: Mesh,
    axis: str,
    shared: Any,
    parts: tuple[Any, ...],
) -> tuple[Any, Any]:
    """Runs a function for each position along an axis of a mesh, without an exchange between these.

    Other axes of the mesh keep their types in the function.

    Args:
      function: `(shared, parts) -> (changed, result)`, where `changed` is like the first of the
        parts.
      mesh: The mesh.
      axis: The axis, which is Manual in the function.
      shared: Pytree that each position has.
      parts: Pytrees of arrays that are cut along the axis in their first dimension.

    Returns:
      `(changed, result)`, each array divided along the axis in its first dimension.
    """
    explicit = _explicit_axes(mesh)
    if axis in explicit:
        parts = jax.tree.map(lambda x: _divided(x, axis, mesh), parts)
    others = tuple(name for name in explicit if name != axis)
    args, each = (shared, parts), PartitionSpec(axis)
    run_manual = functools.partial(
        jax.shard_map,
        in_specs=(PartitionSpec(), each),
        out_specs=each,
        axis_names={axis},
        check_vma=False,
    )
    if not others:
        return run_manual(function, mesh=mesh)(*args)
    # A `shard_map` that leaves axes of type Explicit would gather its arguments along them. So it
    # leaves axes of type Auto, which are of type Explicit again within.
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
    within = jax.tree.map(lambda spec: _without(spec, axis), specs)
    explicit_axes = jax.sharding.explicit_axes(axes=others, in_sharding=within)
    changed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs[1][0])
    result = NamedSharding(mesh, each if axis in explicit else PartitionSpec())
    auto_axes = jax.sharding.auto_axes(axes=others, out_sharding=(changed, result))
    return auto_axes(run_manual(explicit_axes(function)))(*args)


def _mesh_here(mesh: AnyMesh) -> AnyMesh:
    """Returns the mesh, or what it has become within a `jax.shard_map`."""
    around = jax.sharding.get_abstract_mesh()
    return around if around.manual_axes else mesh


def _axis_types(mesh: AnyMesh) -> dict[Any, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _explicit_axes(mesh: AnyMesh) -> tuple[Any, ...]:
    return tuple(axis for axis, kind in _axis_types(mesh).items() if kind == AxisType.Explicit)


def _divided(x: jax.Array, axis: str, mesh: Mesh) -> jax.Array:
    """Returns an array divided along an axis of type Explicit, in its first dimension."""
    _, *others = _without(jax.typeof(x).sharding.spec, axis)
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec(axis, *others)))


def _without(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """Returns partition specs without an axis."""
    return PartitionSpec(
        *(
            tuple(name for name in names if name != axis)
            if isinstance(names, tuple)
            else (None if names == axis else names)
            for names in spec
        )
    )


def _cut(name: str, arg: Any, specs: Any, mesh: AnyMesh) -> Any:
    """Returns an argument divided as `specs` say along the axes of type Explicit."""
    if not _explicit_axes(mesh):
        return arg

    def cut(path: Any, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        given = jax.typeof(x).sharding.spec
        wanted = PartitionSpec(*(spec[i] if i < len(spec) else None for i in range(x.ndim)))
        if given == wanted:
            return x
        for have, want in zip(given, wanted, strict=True):
            if have is not None and have != want:
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} is divided as {given} over a mesh with "
                    f"axes of type Explicit; the cache needs {wanted}, for which devices would "
                    "have to exchange it. Pass it so (`jax.reshard`), or replicated. To divide the "
                    "rows of a batch, use `ferrum_jax.replicas.Replicas`."
                )
        return jax.reshard(x, NamedSharding(mesh, wanted))

    def cut_all(path: Any, spec: PartitionSpec, x: Any) -> Any:
        within = jax.tree_util.tree_map_with_path
        return within(lambda rest, leaf: cut((*path, *rest), leaf, spec), x)

    return jax.tree_util.tree_map_with_path(cut_all, specs, arg)
