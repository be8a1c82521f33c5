"""Samples of one prompt with their log-probabilities, then new weights: a step of RL training.

Run with `python -m examples.samples`.
"""

import jax

import ferrum_jax as fj
from examples.models import toy

PROMPT = list(range(40))


def main() -> None:
    """Draws four answers to a prompt, scores them, and draws again with other weights."""
    manager, params = toy.prefix_manager(), toy.init_params()
    options = fj.EngineOptions(max_rows=4, sampling=fj.Sampling(temperature=3.0), top_logprobs=2)
    request = fj.RequestOptions(max_new_tokens=6, seed=1)
    with fj.Engine(toy.model, params, manager, options) as engine:
        free = manager.free_block_count()
        samples = engine.submit(PROMPT, request, n=4)
        while not samples[0].tokens:  # The prompt is computed once, and forked.
            engine.step()
        taken = free - manager.free_block_count()
        print(f"4 samples of a prompt of 3 blocks take {taken} blocks, not 12")
        engine.run()
        for sample in samples:
            total = sum(token.logprob for token in sample.taken)
            print(f"{sample.tokens}: log-probability {total:.1f}")
        (best, logprob), _ = samples[0].taken[0].top
        print(f"the best first token is {best}, with log-probability {logprob:.2f}")

        again = engine.submit(PROMPT, request)
        print(f"the same seed draws the same: {again.result() == samples[0].tokens}")
        print(f"{again.num_cached_tokens} prompt tokens were cached")
        engine.set_params(jax.tree.map(lambda weight: weight * 0.9, params), version=1)
        trained = engine.submit(PROMPT, request)
        trained.result()
        print(f"{trained.num_cached_tokens} of them for the new weights")


if __name__ == "__main__":
    main()
