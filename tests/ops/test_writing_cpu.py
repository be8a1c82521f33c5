"""Tokens are written on a CPU by a foreign function, as a scatter would write them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import foreign
from ferrum_jax.ops import writing
from tests.support.pools import kv_pool

SHAPE = (6, 3, 2, 4, 8)
NUM_SLOTS = SHAPE[0] * SHAPE[3]
# Each slot once, in any order, with those before and behind the array.
SLOTS = [-(2**31), -5, -1, *range(NUM_SLOTS), NUM_SLOTS, NUM_SLOTS + 1, 2**31 - 1]


def arguments(dtype, layer, seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    slots = rng.permutation(np.asarray(SLOTS, np.int32))[: 2 * (len(SLOTS) // 2)].reshape(2, -1)
    array, tokens = (
        jnp.asarray(rng.integers(-9, 9, size), dtype)
        for size in (shape, (*slots.shape, shape[2], shape[4]))
    )
    return array, jnp.int32(layer), jnp.asarray(slots), tokens


@pytest.mark.parametrize("layer", [0, 2, -1, 3, 2**31 - 1])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "uint16", "float32"])
def test_each_token_lies_where_a_scatter_puts_it(dtype, layer):
    args = arguments(dtype, layer)
    want = writing.write_each_token(*args)
    address = args[0].unsafe_buffer_pointer()
    program = jax.jit(writing.write_numbers, donate_argnums=0).lower(*args)
    assert "ferrum_jax_write" in program.as_text() and "scatter" not in program.as_text()
    got = program.compile()(*args)
    np.testing.assert_array_equal(got, want)
    assert got.unsafe_buffer_pointer() == address


def test_an_array_that_is_used_later_is_not_changed():
    args = arguments("float32", 1)
    before = np.array(args[0])
    got, kept = jax.jit(lambda *args: (writing.write_numbers(*args), args[0] + 0))(*args)
    np.testing.assert_array_equal(kept, before)
    np.testing.assert_array_equal(args[0], before)
    np.testing.assert_array_equal(got, writing.write_each_token(*args))


def test_under_vmap_and_with_a_gradient_it_is_a_scatter():
    each = [arguments("float32", layer, seed=layer) for layer in range(3)]
    stacked = [jnp.stack(parts) for parts in zip(*each, strict=True)]
    got = jax.jit(jax.vmap(writing.write_numbers))(*stacked)
    for one, args in zip(got, each, strict=True):
        np.testing.assert_array_equal(one, writing.write_each_token(*args))

    def gradients(write):
        array, layer, slots, tokens = each[1]
        weights = jnp.arange(array.size, dtype=jnp.float32).reshape(array.shape)
        loss = lambda array, tokens: jnp.sum(weights * write(array, layer, slots, tokens))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(array, tokens)

    for got, want in zip(
        *map(gradients, (writing.write_numbers, writing.write_each_token)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2"])
def test_numbers_smaller_than_a_byte_are_written_by_a_scatter(dtype):
    args = arguments(dtype, 1)
    program = jax.jit(writing.write_numbers).lower(*args)
    assert "ferrum_jax_write" not in program.as_text()
    want = writing.write_each_token(*args)
    np.testing.assert_array_equal(program.compile()(*args), want)


def test_a_branch_that_writes_may_be_mapped():
    each = [arguments("float32", layer, seed=layer) for layer in range(3)]

    def write_if(is_meant, array, *args):
        write = lambda array: writing.write_numbers(array, *args)  # noqa: E731
        return jax.lax.cond(is_meant, write, lambda array: array, array)

    stacked = [jnp.stack(parts) for parts in zip(*each, strict=True)]
    got = jax.vmap(write_if)(jnp.asarray([True, False, True]), *stacked)
    for one, is_meant, args in zip(got, (True, False, True), each, strict=True):
        want = writing.write_each_token(*args) if is_meant else args[0]
        np.testing.assert_array_equal(one, want)


def test_nothing_is_written_of_no_tokens_or_into_no_array():
    array, layer, slots, tokens = arguments("float32", 0)
    np.testing.assert_array_equal(
        writing.write_numbers(array, layer, slots[:, :0], tokens[:, :0]), array
    )
    assert not writing.write_numbers(array[:0], layer, slots, tokens).size


def test_a_program_is_exported_for_a_cpu_with_a_scatter():
    pool = kv_pool(jnp.zeros(SHAPE), jnp.zeros(SHAPE))
    k = np.ones((2, pool.num_kv_heads, pool.head_dim), np.float32)
    write = lambda pool, slots: fj.write(pool, 0, slots, k, k, backend="xla")  # noqa: E731
    slots = jnp.asarray([1, 5], jnp.int32)
    exported = jax.export.export(jax.jit(write), platforms=["cpu"])(pool, slots)
    with pytest.raises(ValueError, match="custom call"):
        whole = lambda pool, slots: fj.write(pool, 0, slots, k, k)  # noqa: E731
        jax.export.export(jax.jit(whole), platforms=["cpu"])(pool, slots)
    got = exported.call(pool, slots)
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(write)(pool, slots))
    with pytest.raises(ValueError, match="\"xla\" or None, got 'cpu'"):
        fj.write(pool, 0, slots, k, k, backend="cpu")


def test_wrong_arguments_are_an_error_not_a_crash():
    array, layer, slots, tokens = arguments("float32", 0)
    writing.write_numbers(array, layer, slots, tokens)
    target = jax.ffi.ffi_call("ferrum_jax_write", array)
    with pytest.raises(Exception, match="other arguments"):
        target(array, layer, slots)


def test_without_numba_it_is_a_scatter(monkeypatch):
    monkeypatch.setattr(foreign, "_has_numba", lambda: False)
    program = jax.jit(lambda *args: writing.write_numbers(*args)).lower(*arguments("float32", 0))
    assert "ferrum_jax_write" not in program.as_text() and "scatter" in program.as_text()


def test_a_failure_to_compile_is_reported_once_and_xla_writes():
    program = """if True:
        import sys, warnings
        import jax, numpy as np
        sys.modules["ferrum_jax.ops.cpu.handler"] = None
        from ferrum_jax.ops import writing
        from tests.ops.test_writing_cpu import arguments
        for seed in range(2):
            args = arguments("float32", 1, seed=seed)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                got = jax.jit(lambda *args: writing.write_numbers(*args))(*args)
            assert len(found) == (seed == 0), found
            assert not found or "Writing tokens on CPU" in str(found[0].message)
            np.testing.assert_array_equal(got, writing.write_each_token(*args))
    """
    environment = {"FERRUM_JAX_CACHE_DIR": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **environment})
