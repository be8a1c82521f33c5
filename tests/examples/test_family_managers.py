"""Each family's decoder in a manager: prefix hits and swapping change no logits.

Layers of two head sizes ("gemma4") have two pools.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from tests.support.tiny_families import CONFIGS, tiny_model
from tests.support.whole_batch import whole_logits

IDS = np.random.default_rng(1).integers(0, 61, 14).tolist()
KEPT = fj.PrefixCacheConfig(
    max_prefixes=8,
    min_prefix_length=1,
    prefix_ttl_seconds=math.inf,
    enable_cross_request_sharing=True,
)


class Served:
    """A manager, and the steps of one model on it."""

    def __init__(self, family):
        self._model_fn, self._params = tiny_model(CONFIGS[family])
        geometry = fj.CacheGeometry.of(
            CONFIGS[family], max_seqs=2, max_sequence_length=24, dtype="float32"
        )
        config = fj.CacheConfig(
            block_size=4,
            max_blocks=48,
            initial_blocks=48,
            enable_prefix_caching=True,
            prefix_cache_config=KEPT,
        )
        self.manager = fj.PagedKvCacheManager(config, geometry)
        self._decode = jax.jit(self._decode_step, donate_argnums=0)

    def start(self, name, prompt):
        """Computes what is not cached of a prompt, and commits it; returns handle and logits."""
        handle = self.manager.allocate(self.manager.new_request(name, prompt_token_ids=prompt))
        logits = self.manager.prefill(self._model_fn, self._params, [handle])
        self.manager.commit(handle)
        self.manager.check()
        return handle, np.asarray(logits)

    def decode(self, handle, token):
        """Extends a request by a token; returns the logits after it."""
        self.manager.extend(handle, 1)
        return np.asarray(self.manager.run(self._decode, [handle], jnp.asarray([[token]])))

    def _decode_step(self, state, seq_ids, tokens):
        batch = fj.PagedBatch.of(state, seq_ids, q_lens=1, num_tokens=1)
        logits, pools = self._model_fn(self._params, tokens, batch)
        return state.with_pools(pools), logits


def recomputed(family, tokens):
    return whole_logits(tiny_model(CONFIGS[family]), CONFIGS[family], [tokens])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_prefix_hit_and_a_request_swapped_back_give_the_logits_of_whole_sequences(family):
    served = Served(family)
    first, logits = served.start("first", IDS[:11])
    np.testing.assert_allclose(logits, recomputed(family, IDS[:11]), rtol=0, atol=2e-4)
    other = [*IDS[:9], 3, 5]
    second, logits = served.start("second", other)
    assert second.num_cached_tokens >= 8
    np.testing.assert_allclose(logits, recomputed(family, other), rtol=0, atol=2e-4)
    served.manager.swap_out("first")
    for i, token in enumerate(IDS[11:]):  # The other one goes on meanwhile.
        logits, text = served.decode(second, token), [*other, *IDS[11 : 12 + i]]
        np.testing.assert_allclose(logits, recomputed(family, text), rtol=0, atol=2e-4)
    served.manager.swap_in("first")
    logits = served.decode(first, IDS[11])
    np.testing.assert_allclose(logits, recomputed(family, IDS[:12]), rtol=0, atol=2e-4)
    served.manager.check()
