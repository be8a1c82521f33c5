"""Whether compiled programs work in place, and the programs of a small model to be looked at."""

import re

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax.integrations.batch import PagedBatch
from tests.support.caches import tiny_spec

LAYERS, HEADS, HEAD_DIM = 3, 2, 16
IN_PLACE = {
    "bitcast",
    "call",
    "conditional",
    "dynamic-update-slice",
    "fusion",  # The instructions inside are listed, and judged, as well.
    "get-tuple-element",
    "parameter",
    "scatter",
}
"""What may yield an array of a pool's size."""


def ids(*values):
    return jnp.asarray(values, jnp.int32)


def new_state(dtype):
    model = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM, "dtype": dtype}
    spec = tiny_spec(**model, num_blocks=509, block_size=8, max_seqs=4, max_blocks_per_seq=8)
    state, ok = fj.allocate(fj.init(spec), [0, 1], [11, 8])
    assert bool(ok)
    return state


def use_layer(carry, layer):
    """One layer of a model: writes the new tokens' keys and values, then attends."""
    batch, x = carry
    batch = batch.write(layer, x, -x)
    return (batch, x + batch.attend(layer, x)), None


def decode_step(state, scanned):
    """Extends two rows by a token each, and runs every layer over them."""
    state, ok = fj.extend(state, ids(0, 1), ids(1, 1), max_new_tokens=1)
    batch = PagedBatch.of(state, ids(0, 1), ids(1, 1), num_tokens=1)
    carry = (batch, jnp.ones((2, 1, HEADS, HEAD_DIM), jnp.float32))
    if scanned:
        carry, _ = jax.lax.scan(use_layer, carry, jnp.arange(LAYERS, dtype=jnp.int32))
    else:
        for layer in range(LAYERS):
            carry, _ = use_layer(carry, layer)
    batch, x = carry
    return state.with_pools(batch.pools), x, ok


def scanned_layers(state):
    return decode_step(state, scanned=True)


def pool_sized_results(compiled, pool):
    """Lists what makes an array as large as `pool.k`: pairs of instruction and opcode."""
    made = []
    for line in compiled.as_text().splitlines():
        found = re.match(r"\s*(?:ROOT )?(\S+) = \(?\w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if found and np.prod([int(n) for n in found[2].split(",") if n]) >= pool.k.size:
            made.append((found[1], found[3]))
    return made


def addresses(pool):
    return pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()


def assert_in_place(program, state):
    compiled = jax.jit(program, donate_argnums=0).lower(state).compile()
    pool = state.pool
    made = pool_sized_results(compiled, pool)
    assert made, "the text was not understood"
    assert {opcode for _, opcode in made} <= IN_PLACE
    pool_bytes = pool.k.nbytes + pool.v.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 10
    before = addresses(pool)
    after = jax.tree.leaves(compiled(state))
    assert pool.k.is_deleted() and pool.v.is_deleted()
    assert {leaf.unsafe_buffer_pointer() for leaf in after} >= set(before)
