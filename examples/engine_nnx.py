"""Serving inside a program: an engine runs a decoder in Flax NNX, and shares what prompts share.

Run with `python -m examples.engine_nnx`.
"""

import jax
from flax import nnx

import ferrum_jax as fj
from examples.models import toy
from ferrum_jax.decoding.models import Pools
from ferrum_jax.integrations.nnx import PagedAttention, nnx_model

SYSTEM_PROMPT = [token % 50 for token in range(100)]
QUESTIONS = [[51, 52, 53], [54, 55], [56, 57, 58, 59]]


class Decoder(nnx.Module):
    """Two layers of attention; `nnx.MultiHeadAttention` is wrapped, and the batch passed on."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(toy.VOCAB_SIZE, toy.WIDTH, rngs=rngs)
        self.layers = nnx.List()
        for layer in range(toy.NUM_LAYERS):
            attention = nnx.MultiHeadAttention(toy.NUM_HEADS, toy.WIDTH, rngs=rngs)
            self.layers.append(PagedAttention(attention, layer))
        self.head = nnx.Linear(toy.WIDTH, toy.VOCAB_SIZE, rngs=rngs)

    def __call__(self, tokens: jax.Array, batch: fj.PagedBatch) -> tuple[jax.Array, Pools]:
        """Maps new tokens i32[R, T] to logits of the rows' next tokens, and the pools."""
        x = self.embed(tokens)
        for attention in self.layers:
            y, batch = attention(x, batch)
            x = x + y
        return self.head(batch.last(x)), batch.pools


def main() -> None:
    """Answers three questions after one system prompt, and an urgent one before them."""
    model_fn, params = nnx_model(Decoder(nnx.Rngs(0)))
    options = fj.EngineOptions(max_rows=2)
    urgent = fj.RequestOptions(max_new_tokens=4, priority=fj.Priority.High)
    with fj.Engine(model_fn, params, toy.prefix_manager(), options) as engine:
        patient = fj.RequestOptions(max_new_tokens=8)
        answers = [engine.submit(SYSTEM_PROMPT + question, patient) for question in QUESTIONS]
        # Whoever reads an answer runs the steps, for all requests.
        first = engine.submit([60, 61, 62], urgent).result()
        print(f"urgent: {len(first)} tokens after {engine.num_steps} steps")
        for number, answer in enumerate(answers):
            print(
                f"question {number}: {len(answer.result())} tokens, {answer.num_cached_tokens} of "
                f"{len(answer.prompt)} prompt tokens were cached, ended by {answer.finish_reason}"
            )


if __name__ == "__main__":
    main()
