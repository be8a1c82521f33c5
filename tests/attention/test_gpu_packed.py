import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.attention.gpu import gpu_attention, supports
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.formats import block_layout
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat
from tests.attention.test_gpu import (
    GPU,
    INTERPRET,
    SMALL,
    abstract_inputs,
    lowered_for_h100,
    run,
)
from tests.attention.test_paged_attention import VARIANTS
from tests.support.attention_oracle import Problem, attention, problem

# jax 0.11 says so whenever it lowers a kernel for a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")


def compressed_problem(
    token_format, dtype, head_dim, *, offset=0.0, **options
) -> tuple[Problem, AttentionInputs]:
    """Rows in compressed blocks: the numbers that these hold, still rotated, and the arguments.

    Values are moved by an offset before. The scales of whatever no row holds are NaN.
    """
    block_size, stored = 16, dtype
    if INTERPRET and dtype == "bfloat16":
        # On a CPU XLA computes with bfloat16 in float32, where words that look like NaN are lost.
        # Those of float16 are the same words.
        stored = "float16"
    layout = block_layout(token_format, block_size=block_size, head_dim=head_dim, dtype=stored)
    sizes = {"block_size": layout.num_tokens, "head_dim": head_dim}
    p = problem(held_lens=(70, 0, 150, 1), dtype=dtype, **sizes, **options)
    halves = layout.encode(jnp.asarray(p.k), jnp.asarray(p.v + offset), jnp.dtype(stored))
    k, v = (np.asarray(x) for x in layout.decode(*halves))
    pool = BlockPool(*halves, dtype=np.dtype(stored))
    q, _, *rest = p.args(GPU)
    return dataclasses.replace(p, k=k, v=v), attention_inputs(q, pool, *rest)


@pytest.mark.parametrize("form", ["decode", "chunk"])
@pytest.mark.parametrize(
    "token_format, dtype, head_dim",
    [
        (TokenFormat.Int8, "bfloat16", 128),
        (TokenFormat.Int8, "float32", 80),
        (TokenFormat.Int8Int4, "bfloat16", 64),
        (TokenFormat.Int8Int4, "float32", 128),
        (TokenFormat.Int4, "bfloat16", 80),
        (TokenFormat.Int4, "float32", 64),
        (TokenFormat.Int4, "float16", 128),
    ],
)
def test_compressed_blocks_are_right(token_format, dtype, head_dim, form):
    chunk = {"num_queries": 13, "q_lens": (13, 0, 2, 1), **VARIANTS["all"]}
    options = chunk if form == "chunk" else {}
    p, inputs = compressed_problem(token_format, dtype, head_dim, **options)
    assert supports(inputs)
    out = run(inputs, SMALL, token_format=token_format).reshape(p.q.shape)
    is_rotated = token_format != TokenFormat.Int8
    assert out.dtype == jnp.dtype("float32" if is_rotated else dtype)
    # Also for queries of float16, values are multiplied in bfloat16.
    bound = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64), attention(p), rtol=0, atol=bound)


def test_what_is_still_rotated_may_be_larger_than_float16_has():
    p, inputs = compressed_problem(TokenFormat.Int4, "float16", 128, offset=2e4)
    assert np.nanmax(p.v) > 65504
    out = run(inputs, SMALL, token_format=TokenFormat.Int4).reshape(p.q.shape)
    np.testing.assert_allclose(np.asarray(out, np.float64), attention(p), rtol=2e-2, atol=1e3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_value_that_is_not_finite_makes_what_sees_it_nan(dtype):
    offset = np.zeros(128, np.float16)
    offset[3] = np.inf
    p, inputs = compressed_problem(TokenFormat.Int8, dtype, 128, offset=offset)
    out = np.asarray(run(inputs, SMALL, token_format=TokenFormat.Int8)).reshape(p.q.shape)
    has_tokens = p.held_lens > 0
    assert np.isnan(out[has_tokens]).all() and not out[~has_tokens].any()


ALL_OPTIONS = AttentionOptions(sliding_window=512, soft_cap=30.0, sinks=jnp.zeros(32))
LOWERED = {
    "Int8": (TokenFormat.Int8, {}),
    "Int8Int4": (TokenFormat.Int8Int4, {"heads": (9, 3, 64), "rows": 1}),
    "Int4": (TokenFormat.Int4, {"block_size": 128}),
    "Int8 of 256": (TokenFormat.Int8, {"heads": (16, 1, 256)}),
    "Int8Int4 of float16 80": (TokenFormat.Int8Int4, {"heads": (20, 5, 80), "dtype": "float16"}),
    "Int4 of float32 64": (TokenFormat.Int4, {"heads": (9, 3, 64), "dtype": "float32"}),
    "chunk of Int8": (TokenFormat.Int8, {"num_queries": 512, "rows": 4}),
    "chunk of Int8Int4": (TokenFormat.Int8Int4, {"num_queries": 512, "dtype": "float32"}),
    "Int4 with all options": (TokenFormat.Int4, {"options": ALL_OPTIONS}),
}


@pytest.mark.parametrize("case", LOWERED)
def test_compressed_blocks_lower_for_an_h100_and_are_neither_copied_nor_decoded(case):
    token_format, shapes = LOWERED[case]
    inputs = abstract_inputs(**shapes)
    assert supports(inputs)
    kernel = functools.partial(gpu_attention, token_format=token_format)
    module = lowered_for_h100(kernel, inputs)
    assert module.count("__gpu$xla.gpu.triton") == 2
    # Since jax 0.11 a mesh has an attribute, `{stablehlo.mesh = ..`, that is no operation.
    operations = set(re.findall(r"(?<!\{)stablehlo\.(\w+)", module))
    assert operations <= {"reshape", "constant", "broadcast_in_dim", "convert", "custom_call"}


def test_rows_of_every_format_are_left_to_the_kernel():
    inputs = abstract_inputs()
    pool = dataclasses.replace(inputs.pool, formats=tuple(TokenFormat))
    formats = jax.ShapeDtypeStruct((16,), jnp.int32)
    q = jax.ShapeDtypeStruct((16, 32, 128), jnp.bfloat16)
    args = (q, pool, inputs.layer, inputs.block_ids, inputs.held_lens, formats)
    module = lowered_for_h100(
        lambda q, *args: paged_attention(q, *args[:-1], formats=args[-1]), *args
    )
    assert module.count("__gpu$xla.gpu.triton") == 2 * len(TokenFormat)
