"""Two sequences of different lengths in one cache: allocate, prefill, decode, free.

Run with `python -m examples.quickstart`.
"""

import functools

import jax
import jax.numpy as jnp

import ferrum_jax as fj
from examples.models import toy

ROWS = [0, 1]
PROMPTS = [[5, 6, 7], list(range(50))]


@functools.partial(jax.jit, donate_argnames="state")
def decode(
    params: dict[str, jax.Array], state: fj.CacheState, tokens: jax.Array
) -> tuple[fj.CacheState, jax.Array, jax.Array]:
    """Appends one token to each row, and returns the tokens that follow.

    Args:
      params: The model's weights.
      state: The cache. It is donated, so that the pool changes in place.
      tokens: i32[2]. The newest token of each row.

    Returns:
      `(state, tokens, ok)`; `ok` is false if there was no free block, and then nothing changed.
    """
    state, ok = fj.extend(state, ROWS, 1, max_new_tokens=1)
    batch = fj.PagedBatch.of(state, ROWS, q_lens=1, num_tokens=1)
    logits, pools = toy.model(params, tokens[:, None], batch)
    return state.with_pools(pools), jnp.argmax(logits, axis=-1).astype(jnp.int32), ok


def _report(what: str, state: fj.CacheState) -> None:
    print(f"{what}: {state.tables.seq_lens[:2]} tokens, {int(state.tables.num_free)} blocks free")


def main() -> None:
    """Decodes 20 tokens for each prompt, and prints how many blocks they take."""
    params, spec = toy.init_params(), toy.GEOMETRY.spec(num_blocks=32, block_size=16)
    print(f"{spec.num_blocks} blocks, each {spec.block_size} tokens or {spec.block_bytes:,} bytes")
    state, ok = fj.allocate(fj.init(spec), ROWS, [len(prompt) for prompt in PROMPTS])
    fj.require(ok, "allocate rows for two prompts", state)
    _report("allocated", state)
    logits, state = fj.prefill(toy.model, params, state, ROWS, PROMPTS)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    for _ in range(20):
        state, tokens, ok = decode(params, state, tokens)
        fj.require(ok, "extend each row by a token", state)
    _report("decoded", state)
    state = fj.free(state, ROWS[1:])
    _report("row 1 freed", state)


if __name__ == "__main__":
    main()
