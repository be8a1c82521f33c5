"""Serving inside a program: an engine runs a decoder in Flax Linen, in steps with exact bits.

Run with `python -m examples.engine_linen`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import ferrum_jax as fj
from examples.models import toy
from ferrum_jax.decoding.models import Pools
from ferrum_jax.integrations import StepOptions
from ferrum_jax.integrations.linen import PagedAttention

PROMPTS = [list(range(5)), list(range(30, 50)), [7]]


class Decoder(nn.Module):
    """Two layers of attention; `apply` is a model function as it is."""

    @nn.compact
    def __call__(self, tokens: jax.Array, batch: fj.PagedBatch) -> tuple[jax.Array, Pools]:
        """Maps new tokens i32[R, T] to logits of the rows' next tokens, and the pools."""
        x = nn.Embed(toy.VOCAB_SIZE, toy.WIDTH)(tokens)
        for layer in range(toy.NUM_LAYERS):
            y, batch = PagedAttention(num_heads=toy.NUM_HEADS, layer=layer)(x, batch)
            x = x + y
        return nn.Dense(toy.VOCAB_SIZE)(batch.last(x)), batch.pools


def main() -> None:
    """Answers prompts together and alone: the log-probabilities have equal bits."""
    model: Any = Decoder()
    state = fj.init(toy.GEOMETRY.spec(num_blocks=8, block_size=16))
    batch = fj.PagedBatch.of(state, [0], q_lens=0, num_tokens=1)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), batch)
    step = StepOptions(chunk_tokens=4, chunks_per_step=2, exact=True)
    options = fj.EngineOptions(max_rows=4, step=step)
    with fj.Engine(model.apply, params, toy.prefix_manager(), options) as engine:
        engine.warm_up()
        together = [engine.submit(prompt) for prompt in PROMPTS]
        engine.run()
        for prompt, answer in zip(PROMPTS, together, strict=True):
            alone = engine.submit(prompt)
            alone.result()
            print(
                f"{len(prompt)} prompt tokens, {len(answer.tokens)} new ones; "
                f"alone {'the same bits' if alone.taken == answer.taken else 'other bits'}"
            )
        shapes = {tuple(shape): count for shape, count in engine.step_counts.items()}
        print(f"steps by (rows, prompt tokens): {shapes}")


if __name__ == "__main__":
    main()
