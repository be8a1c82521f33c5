"""Requests that leave the device to make room, and return bit for bit.

Run with `python -m examples.swapping`.
"""

import tempfile

import ferrum_jax as fj
from examples.models import toy

PROMPT = [token % 61 for token in range(120)]


def main() -> None:
    """Swaps a request out by hand, and lets an urgent request preempt it."""
    with tempfile.TemporaryDirectory() as directory:
        manager = fj.PagedKvCacheManager(
            fj.CacheConfig(block_size=16, max_blocks=32, initial_blocks=32),
            toy.GEOMETRY,
            fj.ManagerOptions(
                preemption_policy=fj.LruEvictionPolicy(),
                # Host memory first; then files, here since the host's budget is 0.
                tiers=fj.TierConfig(host_budget_bytes=0, disk_directory=directory),
            ),
        )
        chat = manager.allocate(
            manager.new_request("chat", prompt_token_ids=PROMPT, priority=fj.Priority.Low)
        )
        token = toy.prefill(manager, chat)
        before = toy.decode(manager, chat, token, num_tokens=4)

        def show(event: str) -> None:
            print(
                f"{event}: chat is {'resident' if chat.is_resident else 'swapped out'}, "
                f"{manager.free_block_count()} of 32 blocks free, "
                f"{manager.stats().host_bytes:,} bytes swapped out"
            )

        show("decoded 4 tokens")
        manager.swap_out("chat")
        show("swap_out")
        manager.swap_in("chat")
        show("swap_in")

        urgent = manager.new_request("urgent", initial_tokens=512, priority=fj.Priority.High)
        manager.allocate(urgent)  # 32 blocks: the whole pool.
        show("urgent request allocated")
        manager.deallocate("urgent")
        manager.swap_in("chat")
        after = toy.decode(manager, chat, before[-1], num_tokens=4)
        show("decoded 4 more")

        print(f"tokens before {before}, after {after}; {chat.num_tokens()} tokens in the cache")
        manager.close()


if __name__ == "__main__":
    main()
