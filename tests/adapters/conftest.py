"""Settings for packages that are not written for strict dtypes and ranks, as ours is."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def lenient_jax():
    """Types and shapes are promoted as JAX does by default."""
    names = ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, ("standard", "allow"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def kept_listeners():
    """Tunix removes all listeners of JAX when a learner ends, also the one that counts programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.monitoring, "clear_event_listeners", lambda: None)
        yield
