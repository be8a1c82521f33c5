"""Sampling methods of the package `gemma` as the library's sampling."""

import dataclasses
import importlib
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.integrations.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSampling(Sampling):
    """The choice of tokens by a method such as `gm.text.TopPSampling`; make one with `of`.

    The method is called for each row by itself, with the row's own key. So a draw depends on the
    request's seed and the token's position only, and not on what else is in the batch.

    Attributes:
      method: The method; None for the best token.
      forbidden_token_ids: Tokens that are never chosen.
    """

    method: Any = None
    forbidden_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, method: Any, forbidden_token_ids: tuple[int, ...] = ()) -> Self:
        """Returns the sampling that a method does.

        Args:
          method: A `gm.text.SamplingMethod`; hashable, since another one recompiles.
          forbidden_token_ids: Tokens that are never chosen.

        Raises:
          TypeError: It is not a sampling method.
        """
        text: Any = importlib.import_module("gemma.gm.text")
        if not isinstance(method, text.SamplingMethod):
            raise TypeError(
                f"sampling must be a gm.text.SamplingMethod, got {type(method).__name__}. Pass one "
                "such as gm.text.TopPSampling(p=0.9)."
            )
        if isinstance(method, text.Greedy):
            return cls(forbidden_token_ids=forbidden_token_ids)
        temperature = getattr(method, "temperature", 1.0)
        return cls(temperature=temperature, method=method, forbidden_token_ids=forbidden_token_ids)

    def sample(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Chooses a token for each row.

        Args:
          logits: f32[R, V]. Logits of each row.
          key: Keys [R], or one for all rows; not needed for the best token.

        Returns:
          i32[R]. Token ids.

        Raises:
          ValueError: `key` is not a typed key, or not R keys.
        """
        if self.forbidden_token_ids:
            forbidden = np.asarray(self.forbidden_token_ids)
            logits = logits.at[:, forbidden].set(-jnp.inf, mode="drop")
        if self.is_greedy or key is None:
            return super().sample(logits, key)
        self.check_key(key)
        keys = jax.random.split(key, logits.shape[0]) if key.ndim == 0 else key
        tokens = jax.vmap(lambda row, key: self.method.get_next_tokens(row[None], rng=key)[0])
        return tokens(logits, keys).astype(jnp.int32)
