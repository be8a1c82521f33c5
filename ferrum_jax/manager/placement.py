"""Where a manager's pool lies: on one device, or over the devices of a mesh."""

import jax
from jax.sharding import Mesh

from ferrum_jax.config import CacheSpec
from ferrum_jax.sharding import init_sharded
from ferrum_jax.state import CacheState, init
from ferrum_jax.types import Device


def init_at(spec: CacheSpec, device: Device, mesh: Mesh | None, axis_name: str) -> CacheState:
    """Returns an empty cache.

    Args:
      spec: Sizes and dtype.
      device: Where; of a mesh, the one that stands for all.
      mesh: The devices over which the heads lie, if it is not one alone.
      axis_name: The axis of the mesh for that.

    Raises:
      ValueError: If the device is none of the mesh's, or the mesh not this process's alone, or
        what `init_sharded` raises.
    """
    if mesh is None:
        return init(spec, device.jax_device())
    devices = list(mesh.devices.flat)
    if any(it.process_index != jax.process_index() for it in devices):
        raise ValueError(
            "The mesh spans several processes, whose managers would decide each by its own clock. "
            "Make a mesh of this process's devices, or use sharding.init_sharded without a manager."
        )
    if device.jax_device() not in devices:
        names = ", ".join(str(Device.of(it)) for it in devices)
        raise ValueError(
            f"target_devices begins with {device}, and the mesh has {names}. Begin with one of "
            "these: it stands for the whole pool."
        )
    return init_sharded(spec, mesh, axis_name)
