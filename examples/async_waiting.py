"""A server's coroutines that wait for room, the most urgent first.

Run with `python -m examples.async_waiting`.
"""

import asyncio

import ferrum_jax as fj
from examples.models import toy

PRIORITIES = [fj.Priority.Normal] * 4 + [fj.Priority.High]


async def chat(manager: fj.AsyncKvCacheManager, name: str, priority: fj.Priority) -> None:
    """Holds room for a prompt of 200 tokens and generates 20 more."""
    request = manager.new_request(name, initial_tokens=200, priority=priority)
    async with manager.hold(request, timeout_seconds=60) as handle:
        print(f"{name} begins with {manager.free_block_count()} blocks free")
        for _ in range(20):  # A real server runs its model here, with `manager.run`.
            await manager.extend(handle, 1)
            await asyncio.sleep(0)
    print(f"{name} has ended")


async def serve() -> None:
    """Runs five requests in a pool that holds two."""
    manager = fj.AsyncKvCacheManager(
        fj.PagedKvCacheManager(
            fj.CacheConfig(block_size=16, max_blocks=32, initial_blocks=32), toy.GEOMETRY
        )
    )
    async with manager, asyncio.TaskGroup() as tasks:
        for number, priority in enumerate(PRIORITIES):
            tasks.create_task(chat(manager, f"{priority.name} request {number}", priority))
        while manager.num_waiting < 3:
            await asyncio.sleep(0.001)
        print(f"{manager.num_waiting} requests wait for room")
        try:
            late = manager.new_request("late", initial_tokens=200)
            await manager.allocate(late, timeout_seconds=0)
        except fj.WaitTimeoutError as error:
            print(f"a request that may not wait: {error}")


def main() -> None:
    """Runs the server."""
    asyncio.run(serve())


if __name__ == "__main__":
    main()
