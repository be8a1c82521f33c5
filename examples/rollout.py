"""Samples of several prompts in one program, with log-probabilities: the rollouts of RL training.

Run with `python -m examples.rollout`.
"""

import jax
import jax.numpy as jnp

import ferrum_jax as fj
from examples.models import toy

PROMPTS = [list(range(40)), [7, 8, 9], list(range(20, 52))]
SAMPLES = 4
OPTIONS = fj.ServeOptions(
    max_new_tokens=12,
    stop_token_ids=(0,),
    sampling=fj.Sampling(temperature=3.0, forbidden_token_ids=(63,)),
)


def main() -> None:
    """Rolls out with some weights, then with other ones, on the same cache."""
    state = fj.init(toy.GEOMETRY.spec(num_blocks=24, block_size=16))
    params = toy.init_params()
    for step in range(2):
        out = fj.rollout(
            toy.model,
            params,
            state,
            PROMPTS,
            samples=SAMPLES,
            options=OPTIONS,
            key=jax.random.key(step),
        )
        state = out.state  # Its rows are free again.
        num_tokens = int(out.num_tokens.sum())
        print(f"step {step}: {out.tokens.shape[0] * SAMPLES} samples of {num_tokens} tokens")
        num_prompt_tokens = int(out.num_computed) - num_tokens + len(PROMPTS) * SAMPLES
        print(f"{num_prompt_tokens} prompt tokens were computed, not {SAMPLES * 75}")
        print(f"{int(out.max_blocks[0])} blocks were in use at most")

        # A reward per sample, and its advantage among the samples of its prompt.
        reward = jnp.mean(out.tokens % 2 == 1, axis=-1, where=out.tokens >= 0)
        advantage = reward - reward.mean(axis=1, keepdims=True)
        loss = -jnp.sum(advantage * jnp.nansum(out.logprobs, axis=-1))
        print(f"mean reward {float(reward.mean()):.2f}, loss {float(loss):.2f}")
        params = jax.tree.map(lambda weight: weight * 0.95, params)  # What training would do.


if __name__ == "__main__":
    main()
