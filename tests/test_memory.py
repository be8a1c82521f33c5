"""Large arrays lie in huge pages, where Linux gives them; nothing else about them changes."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import memory
from ferrum_jax.memory import use_huge_pages

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 1 << 20


def huge_bytes(address: int) -> int:
    """Returns how much of the mapping around an address is in huge pages."""
    found = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no mapping has address {address:x}")


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system has no huge pages"
)
def test_the_pools_of_a_new_cache_lie_in_huge_pages():
    spec = fj.CacheSpec(
        num_layers=4,
        num_kv_heads=4,
        head_dim=64,
        dtype="float32",
        num_blocks=128,
        block_size=16,
        max_seqs=4,
        max_blocks_per_seq=8,
    )
    for array in fj.init(spec).pool.arrays.values():
        assert array.nbytes == 8 * MIB
        assert huge_bytes(array.unsafe_buffer_pointer() + 4 * MIB) >= 4 * MIB
        np.testing.assert_array_equal(array, 0)


def test_arrays_keep_their_address_and_content_and_other_leaves_are_passed_over():
    tree = {"large": jnp.arange(3 * MIB, dtype=jnp.int32), "small": jnp.ones(3), "n": 2}
    large = np.asarray(tree["large"]).copy()
    address = tree["large"].unsafe_buffer_pointer()
    assert use_huge_pages(tree) is tree
    assert tree["large"].unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(tree["large"], large)


def test_traced_arrays_are_passed_over():
    jax.eval_shape(lambda: use_huge_pages(jnp.zeros(4 * MIB)))


def test_only_whole_pages_inside_an_array_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *call: asked.append(call))
    array = use_huge_pages({"large": jnp.zeros(2 * MIB), "small": jnp.zeros(MIB - 1)})["large"]
    start, end = array.unsafe_buffer_pointer(), array.unsafe_buffer_pointer() + 8 * MIB
    assert len(asked) == 2
    for first, num_bytes, _ in asked:
        assert first % (2 * MIB) == num_bytes % (2 * MIB) == 0
        assert start <= first < start + 2 * MIB
        assert end - 2 * MIB < first + num_bytes <= end


def test_other_systems_do_nothing(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory._madvise.cache_clear()
    try:
        use_huge_pages(jnp.zeros(2 * MIB))
        assert memory._madvise() is None
    finally:
        memory._madvise.cache_clear()
