"""Answers as they come: read by threads, by coroutines, and one that is cancelled.

Run with `python -m examples.streaming`.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import ferrum_jax as fj
from examples.models import toy

PROMPTS = [[5, 6, 7], list(range(40)), [1, 2]]
OPTIONS = fj.RequestOptions(max_new_tokens=12)


async def show(engine: fj.Engine, number: int) -> list[int]:
    """Prints the tokens of an answer as they come."""
    tokens = []
    async for token in engine.submit(PROMPTS[number], OPTIONS):
        tokens.append(token)
        print(f"answer {number}: token {len(tokens)} is {token}")
    return tokens


async def stop_early(engine: fj.Engine) -> None:
    """Reads five tokens of an answer, and cancels it."""
    answer = engine.submit(PROMPTS[0], fj.RequestOptions(max_new_tokens=400))
    num_read = 0
    async for _ in answer:
        num_read += 1
        if num_read == 5:
            answer.cancel()  # Its blocks are free at once, or stay cached.
            break
    print(f"{answer.finish_reason} after {num_read} of 400 tokens")


async def serve_all(engine: fj.Engine) -> list[list[int]]:
    """Serves all prompts at once in one event loop; the steps run in threads of their own."""
    async with asyncio.TaskGroup() as tasks:
        shown = [tasks.create_task(show(engine, number)) for number in range(len(PROMPTS))]
        tasks.create_task(stop_early(engine))
    return [task.result() for task in shown]


def main() -> None:
    """Serves the same prompts to threads, then to coroutines."""
    manager = toy.prefix_manager()
    with fj.Engine(toy.model, toy.init_params(), manager, fj.EngineOptions(max_rows=4)) as engine:
        with ThreadPoolExecutor() as threads:  # Whoever reads drives the engine for all.
            by_threads = list(threads.map(lambda p: list(engine.submit(p, OPTIONS)), PROMPTS))
        by_coroutines = asyncio.run(serve_all(engine))
        print(f"threads and coroutines read the same: {by_threads == by_coroutines}")
    print(f"{len(manager.list_handles())} requests left")


if __name__ == "__main__":
    main()
