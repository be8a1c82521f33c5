"""What all tests share: strict JAX, bounded Hypothesis, jit as a parameter, a tiny cache."""

import functools
import os
import pathlib

import hypothesis
import jax
import pytest

from ferrum_jax import CacheSpec
from tests.support.caches import tiny_spec

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A program is compiled once, for all processes of this run and for later runs.
_KEEP_PROGRAMS = {
    "jax_compilation_cache_dir": str(pathlib.Path(__file__).parent.parent / ".pytest_cache/jax"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in _KEEP_PROGRAMS.items():
    if option.upper() not in os.environ:
        jax.config.update(option, value)
        os.environ[option.upper()] = str(value)  # For processes that tests start.

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


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_modules():
    """Lets compiled programs go with the module that ran them: all of them take gigabytes."""
    yield
    jax.clear_caches()
