"""One device: its requests, prefix cache, swapping, reclaim and compression, behind one lock."""

from ferrum_jax.manager.device.device_manager import DeviceManager as DeviceManager
