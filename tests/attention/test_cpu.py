"""The CPU kernel: numbers as they are stored, threads, and a numba that fails."""

import concurrent.futures
import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest
from jax import lax

from ferrum_jax import foreign
from ferrum_jax.attention import cpu, paged_attention, xla
from ferrum_jax.attention.cpu import helper
from ferrum_jax.foreign.code_cache import FOLDER_VARIABLE
from tests.support.attention_oracle import assert_right
from tests.support.attention_problems import problem
from tests.support.pools import keys, kv_pool

MEMORY = pathlib.Path("/proc/self/statm")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_stored_number_is_widened_exactly(dtype):
    # The result of a row of one token is the token's value.
    every = np.arange(1 << 16, dtype=np.uint16).reshape(1, 1, 256, 1, 256)
    values = np.asarray(lax.bitcast_convert_type(jnp.asarray(every), jnp.dtype(dtype)))
    v = every if dtype == "bfloat16" else values
    pool = kv_pool(jnp.zeros_like(jnp.asarray(v)), jnp.asarray(v), dtype)
    rows = {"block_ids": jnp.asarray([[0]]), "held_lens": jnp.asarray([1])}
    out = paged_attention(jnp.ones((1, 256, 256), jnp.float32), pool, 0, backend="cpu", **rows)
    want = values.astype(np.float32).reshape(out.shape)
    tiny = np.abs(want) < np.finfo(np.float32).tiny  # Processors may flush these to zero.
    np.testing.assert_array_equal(np.where(tiny, 0, np.asarray(out)), np.where(tiny, 0, want))


def test_many_threads_may_attend_at_once():
    arguments = problem(held_lens=(3000, 800, 5), block_size=16).arguments()

    @jax.jit
    def twice(q):
        return [paged_attention(**{**arguments, "q": x}, backend="cpu") for x in (q, -q)]

    want = twice(arguments["q"])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for got in threads.map(lambda _: twice(arguments["q"]), range(200)):
            for x, y in zip(got, want, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_it_equals_xla_on_a_full_batch():
    rng = np.random.default_rng(0)
    shape = {"heads": (9, 3), "head_dim": 64, "block_size": 16}
    call = problem(held_lens=rng.integers(100, 2000, 16), **shape).call()
    np.testing.assert_allclose(cpu.attend(call), xla.attend(call), rtol=0, atol=1e-6)


def test_numba_is_not_imported_before_it_is_needed():
    code = "import ferrum_jax, sys; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba_xla_attends(monkeypatch):
    monkeypatch.setattr(foreign, "_has_numba", lambda: False)
    p = problem()
    program = jax.jit(lambda x: paged_attention(**x)).lower(p.arguments())  # Not traced before.
    assert "ferrum_jax_attention" not in program.as_text()
    assert_right(program.compile()(p.arguments()), p)
    with pytest.raises(ValueError, match="numba is not installed"):
        paged_attention(**p.arguments(), backend="cpu")


def refuse_target(*_, **__):
    raise jax.errors.JaxRuntimeError("its version is too old")


def fail_to_compile(_):
    raise numba.errors.TypingError("untyped global name")


FAILURES = {
    "too old": lambda patch: patch.setattr(jax.ffi, "register_ffi_target", refuse_target),
    "untyped global name": lambda patch: patch.setattr(helper, "compile_part", fail_to_compile),
    "ModuleNotFoundError": lambda patch: patch.setitem(sys.modules, helper.__name__, None),
}


@pytest.mark.parametrize("error", FAILURES)
def test_a_kernel_that_cannot_be_compiled_or_registered_is_reported_once(error, monkeypatch):
    p = problem(dtype="bfloat16")
    monkeypatch.setattr(foreign, "_outcomes", {})
    if error != "too old":
        monkeypatch.setenv(FOLDER_VARIABLE, "")  # Code on disk needs no compiler.
    FAILURES[error](monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"slower.*{error}") as warnings:
        for _ in range(2):
            out = jax.jit(lambda arguments: paged_attention(**arguments))(p.arguments())
            assert_right(out, p)
    assert len(warnings) == 1
    assert error in cpu.accepts(p.call())
    with pytest.raises(ValueError, match=f"'cpu' does not take this call.*{error}"):
        paged_attention(**p.arguments(), backend="cpu")


def test_a_branch_that_attends_may_be_mapped():
    p = problem()
    arguments = p.arguments()

    def attend_if(is_meant, q):
        attend = lambda q: paged_attention(**{**arguments, "q": q})  # noqa: E731
        return lax.cond(is_meant, attend, jnp.zeros_like, q)

    q = arguments["q"]
    first, second = jax.vmap(attend_if)(jnp.asarray([True, False]), jnp.stack([q, q]))
    assert_right(first, p)
    assert not np.asarray(second).any()


def test_wrong_arguments_are_an_error_not_a_crash():
    call = problem().call()
    assert (cpu.accepts(call) or cpu.prepare(call)) is None
    target = jax.ffi.ffi_call("ferrum_jax_attention_float32", call.q)
    with pytest.raises(Exception, match="other arguments"):
        target(call.q, keys(call.pool))


@pytest.mark.skipif(not MEMORY.exists(), reason="only Linux counts the memory of a process so")
def test_calls_leave_no_memory_behind():
    arguments = problem().arguments()

    def attend_again(_, q):
        return paged_attention(**{**arguments, "q": q}, backend="cpu")

    program = jax.jit(lambda times: lax.fori_loop(0, times, attend_again, arguments["q"]))
    program(1000).block_until_ready()
    before = resident_bytes()
    program(100_000).block_until_ready()
    assert resident_bytes() - before < 8 << 20  # A job is 360 bytes: 36 MB in all.


def resident_bytes():
    return int(MEMORY.read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms_do_not_call_it(platform):
    arguments = problem().arguments()
    exported = jax.export.export(jax.jit(paged_attention), platforms=[platform])(**arguments)
    assert "ferrum_jax_attention" not in exported.mlir_module()


def test_no_program_that_calls_it_is_exported():
    with pytest.raises(ValueError, match="custom call"):
        jax.export.export(jax.jit(paged_attention), platforms=["cpu"])(**problem().arguments())
