"""A pool on each of several devices: placement, moves and rebalancing.

Run with `python -m examples.multi_device`; it makes four devices of the CPU.
"""

import jax

import ferrum_jax as fj
from examples.models import toy

NUM_DEVICES = 4
PROMPT = [token % 61 for token in range(100)]


def main() -> None:
    """Fills one device, moves a request to another, and evens the rest out."""
    devices = tuple(fj.Device.of(device) for device in jax.devices("cpu")[:NUM_DEVICES])
    manager = fj.MultiDevicePagedKvCacheManager(
        fj.CacheConfig(
            block_size=16,
            max_blocks=32,
            initial_blocks=32,
            target_devices=devices,
            enable_multi_device=True,
        ),
        toy.GEOMETRY,
    )

    def show(event: str) -> None:
        stats = manager.device_stats()
        used = {str(device): s.total_blocks - s.free_blocks for device, s in stats.items()}
        print(f"{event}: blocks in use {used}")

    handles = {}
    for number in range(6):  # New requests go to the first device that has room.
        request = manager.new_request(f"chat {number}", prompt_token_ids=PROMPT)
        handles[number] = manager.allocate(request)
    show("allocated 6 requests of 7 blocks")

    token = toy.prefill(manager, handles[0])
    stayed = toy.decode(manager, handles[0], token, num_tokens=4)
    toy.prefill(manager, handles[1])
    manager.move_cache("chat 1", devices[-1])
    moved = toy.decode(manager, handles[1], token, num_tokens=4)
    show(f"moved chat 1 to {handles[1].device()}")
    print(f"tokens on {handles[0].device()} {stayed}, on {handles[1].device()} {moved}")

    manager.rebalance_devices(tolerance=0.1)
    show("rebalanced")
    for move in manager.last_rebalance:
        print(f"  {move.request_id}: {move.source} -> {move.target}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)  # Before the first use of a device.
    main()
