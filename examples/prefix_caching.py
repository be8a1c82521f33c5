"""Prompts that begin with the same tokens: the second request computes only what is new.

Run with `python -m examples.prefix_caching`.
"""

import ferrum_jax as fj
from examples.models import toy

SYSTEM_PROMPT = [token % 50 for token in range(100)]
QUESTIONS = [[51, 52, 53], [54, 55], [56, 57, 58, 59]]


def main() -> None:
    """Answers three questions after one system prompt, and one of another tenant."""
    # The policy says which cached blocks are evicted first.
    manager = toy.prefix_manager(fj.ManagerOptions(block_policy="return_rate"))

    def ask(request_id: str, question: list[int], tenant: str) -> None:
        prompt = SYSTEM_PROMPT + question
        request = manager.new_request(request_id, prompt_token_ids=prompt, cache_salt=tenant)
        free = manager.free_block_count()
        handle = manager.allocate(request)
        num_cached = handle.num_cached_tokens
        taken = free - manager.free_block_count()
        toy.decode(manager, handle, toy.prefill(manager, handle), num_tokens=8)
        manager.commit(handle)  # Caches its full blocks; they outlive the request.
        manager.deallocate(request_id)
        print(
            f"{request_id}: {len(prompt)} prompt tokens, {num_cached} of them cached; "
            f"blocks taken: {taken}"
        )

    for number, question in enumerate(QUESTIONS):
        ask(f"question {number}", question, tenant="a")
    ask("of another tenant", QUESTIONS[0], tenant="b")
    stats = manager.stats()
    print(
        f"hit rate {stats.cache_hit_rate:.0%}; {stats.cached_blocks} blocks are cached, of which "
        f"{stats.evictable_blocks} can be evicted to make room"
    )


if __name__ == "__main__":
    main()
