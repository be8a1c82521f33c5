"""Whether compiled programs work in place, and the programs of a small model to be looked at."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax.decoding.batch import PagedBatch
from tests.support.caches import tiny_spec
from tests.support.pools import keys, pool_bytes, values

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
    "write on CPU",
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


def use_layer(carry, layer, group=None):
    """One layer of a model: writes the new tokens' keys and values, then attends."""
    batch, x = carry
    batch = batch.write(layer, x, -x, group=group)
    return (batch, x + batch.attend(layer, x, group=group)), None


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


def grouped_state(dtype):
    """Layers 0 and 1 see all tokens, 2 and 3 a window; one pool."""
    payload = fj.KeyValue(HEADS, HEAD_DIM, dtype)
    groups = fj.LayerGroup("full", [0, 1], payload), fj.LayerGroup("local", [2, 3], payload, 9)
    spec = fj.CacheSpec(
        groups=groups, num_blocks=509, block_size=8, max_seqs=4, max_blocks_per_seq=8
    )
    state, ok = fj.allocate(fj.init(spec), [0, 1], [11, 24])
    assert bool(ok)
    return state


def grouped_step(state, run_layers):
    """Extends two rows by a token each, and runs the layers of all groups over them."""
    state, ok = fj.extend(state, ids(0, 1), ids(1, 1), max_new_tokens=1)
    batch = PagedBatch.of(state, ids(0, 1), ids(1, 1), num_tokens=1)
    batch, x = run_layers((batch, jnp.ones((2, 1, HEADS, HEAD_DIM), jnp.float32)))
    return state.with_pools(batch.pools), x, ok


def grouped_layers(state):
    """A step over layer groups, unrolled, in the order of the layers."""

    def run_layers(carry):
        for layer in (2, 0, 3, 1):
            carry, _ = use_layer(carry, layer)
        return carry

    return grouped_step(state, run_layers)


def grouped_scans(state):
    """A step over layer groups with a scan over the layers of each."""

    def run_layers(carry):
        for group in ("full", "local"):
            step = functools.partial(use_layer, group=group)
            carry, _ = jax.lax.scan(step, carry, jnp.arange(2, dtype=jnp.int32))
        return carry

    return grouped_step(state, run_layers)


def scanned_layers(state):
    return decode_step(state, scanned=True)


def pool_sized_results(compiled, pool):
    """Lists what makes an array as large as `keys(pool)`: pairs of instruction and opcode."""
    made = []
    for line in compiled.as_text().splitlines():
        found = re.match(r"\s*(?:ROOT )?(\S+) = \(?\w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if found and np.prod([int(n) for n in found[2].split(",") if n]) >= keys(pool).size:
            is_native = 'custom_call_target="ferrum_jax_write"' in line
            made.append((found[1], "write on CPU" if is_native else found[3]))
    return made


def addresses(pool):
    return keys(pool).unsafe_buffer_pointer(), values(pool).unsafe_buffer_pointer()


def assert_in_place(program, state):
    compiled = jax.jit(program, donate_argnums=0).lower(state).compile()
    pool = state.pool
    made = pool_sized_results(compiled, pool)
    assert made, "the text was not understood"
    assert {opcode for _, opcode in made} <= IN_PLACE
    num_bytes = pool_bytes(pool)
    assert compiled.memory_analysis().temp_size_in_bytes < num_bytes / 10
    before = addresses(pool)
    after = jax.tree.leaves(compiled(state))
    assert keys(pool).is_deleted() and values(pool).is_deleted()
    assert {leaf.unsafe_buffer_pointer() for leaf in after} >= set(before)
