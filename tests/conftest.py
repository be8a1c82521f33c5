"""JAX and Hypothesis settings of all tests, and their shared fixtures."""

import functools
import gc
import os
import pathlib

import hypothesis
import jax
import pytest

from ferrum_jax import CacheSpec
from ferrum_jax.codecs import CODECS, CodecEntry
from tests.support.caches import num_compilations, tiny_spec
from tests.support.crossed_codec import MadeUpFormat, crossed_codec
from tests.support.devices import FAST_COMPILE

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)

# Together a tenth of the tests' time: places in the source that nobody reads, and the search for
# garbage among programs that live on.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 50, 100)

# Set XLA_FLAGS, which may be empty, to compile as users do.
os.environ.setdefault("XLA_FLAGS", FAST_COMPILE)

# Each compiled program is kept, for all workers of this run and for later runs. Keeping one costs a
# tenth of compiling it.
_CACHE_OPTIONS = {
    "jax_compilation_cache_dir": str(pathlib.Path(__file__).parent.parent / ".pytest_cache/jax"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in _CACHE_OPTIONS.items():
    if option.upper() not in os.environ:
        jax.config.update(option, value)
        os.environ[option.upper()] = str(value)  # For processes that tests start.

# So is the machine code of the CPU kernel.
os.environ.setdefault(
    "FERRUM_JAX_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache/ferrum_jax")
)

# Each profile but `thorough` draws the same programs in each run.
_BOUNDS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile(
    "fast", max_examples=100, stateful_step_count=20, derandomize=True, **_BOUNDS
)
hypothesis.settings.register_profile(
    "full", max_examples=1000, stateful_step_count=20, derandomize=True, **_BOUNDS
)
hypothesis.settings.register_profile(
    "thorough", max_examples=10_000, stateful_step_count=50, **_BOUNDS
)
hypothesis.settings.load_profile("fast")


def _interpreted(fn):
    """Runs `fn` operation by operation: functions that are jitted inside are not compiled."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        with jax.disable_jit():
            return fn(*args, **kwargs)

    return call


@pytest.fixture(params=[jax.jit, _interpreted], ids=["jit", "eager"])
def transform(request):
    """Runs a function under an outer `jax.jit`, or without any compilation."""
    return request.param


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request) -> str:
    """Dtype of a pool: float32 is stored as it is, bfloat16 may be stored as uint16 bits."""
    return request.param


@pytest.fixture
def spec() -> CacheSpec:
    """Sizes of a cache that is small enough to be full often."""
    return tiny_spec()


@pytest.fixture
def crossed_format(monkeypatch):
    """A token format that only this test knows: an entry in the registry of codecs."""
    with monkeypatch.context() as patch:
        patch.setitem(CODECS, MadeUpFormat.Crossed, CodecEntry(crossed_codec))
        yield MadeUpFormat.Crossed
    assert MadeUpFormat.Crossed not in CODECS


@pytest.fixture(autouse=True, scope="module")
def bounded_programs():
    """Drops compiled programs after each 500, at the end of a module.

    A program takes 2 MB of memory, and 4 to 30 of the 65,530 memory maps that Linux grants a
    process. A worker compiles several thousand.
    """
    before = num_compilations()
    yield
    if num_compilations() // 500 > before // 500:
        jax.clear_caches()
