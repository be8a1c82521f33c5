"""What all tests share: strict JAX, bounded Hypothesis, jit as a parameter, a tiny cache."""

import functools

import hypothesis
import jax
import pytest

from ferrum_jax import CacheSpec
from tests.helpers import tiny_spec

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# `ci` runs by default, the same programs each time. `pytest --hypothesis-profile=thorough`
# searches further, with other programs each time.
_BOUNDS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile(
    "ci", max_examples=1000, stateful_step_count=20, derandomize=True, **_BOUNDS
)
hypothesis.settings.register_profile(
    "thorough", max_examples=10_000, stateful_step_count=50, **_BOUNDS
)
hypothesis.settings.load_profile("ci")


def _interpreted(fn):
    """Runs `fn` operation by operation: even what is jitted inside is not compiled."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        with jax.disable_jit():
            return fn(*args, **kwargs)

    return call


@pytest.fixture(params=[jax.jit, _interpreted], ids=["jit", "eager"])
def transform(request):
    """Each way to run a function: traced by an outer `jax.jit`, and not compiled at all."""
    return request.param


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> str:
    """A pool that stores numbers as they are, and one that may store bits."""
    return request.param


@pytest.fixture
def spec() -> CacheSpec:
    """A cache so small that it is often full."""
    return tiny_spec()
