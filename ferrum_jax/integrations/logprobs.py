"""Log-probabilities (placeholder until merged)."""
import jax
import jax.numpy as jnp


def token_logprobs(logits, tokens):
    """f32[R]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), tokens[:, None], 1)[:, 0]
