"""Where a manager's pool lies: on one device, or over the devices of a mesh."""

import jax
from jax.sharding import Mesh

from ferrum_jax.sharding import init_sharded
from ferrum_jax.spec import CacheSpec
from ferrum_jax.state import CacheState, init
from ferrum_jax.types import Device


def init_at(spec: CacheSpec, device: Device, mesh: Mesh | None, axis_name: str) -> CacheState:
    """Returns an empty cache on a device or a mesh.

    Args:
      spec: Sizes and dtype.
      device: The device; with a mesh, the device of the mesh that names the pool.
      mesh: The devices over which the heads are divided; None for one device.
      axis_name: The axis of the mesh over which the heads are divided.

    Raises:
      ValueError: If the device is not in the mesh, or the mesh has devices of other processes, or
        as `init_sharded` says.
    """
    if mesh is None:
        return init(spec, device.jax_device())
    devices = list(mesh.devices.flat)
    if any(it.process_index != jax.process_index() for it in devices):
        raise ValueError(
            "The mesh spans several processes, and the manager of each would decide by its own "
            "clock. Make a mesh of this process's devices, or use sharding.init_sharded without a "
            "manager."
        )
    if device.jax_device() not in devices:
        names = ", ".join(str(Device.of(it)) for it in devices)
        raise ValueError(
            f"target_devices begins with {device}, and the mesh has {names}. Begin with one of "
            "these: it stands for the whole pool."
        )
    return init_sharded(spec, mesh, axis_name)
