"""Tunix's models on the cache: the logits of their own forward pass, and the modules unchanged."""

import functools
import importlib

import jax
import numpy as np
import pytest
from flax import nnx

import ferrum_jax as fj
from ferrum_jax.integrations import PrefillOptions
from ferrum_jax.sharding import init_sharded
from tests.adapters.quietly import import_quietly

pytest.importorskip("tunix", reason="google-tunix is not installed (the extra `tunix`)")
pytestmark = pytest.mark.filterwarnings("ignore")
models = import_quietly("tests.adapters.tunix_models")
ft = import_quietly("ferrum_jax.integrations.tunix")

FAMILIES = list(models.CONFIGS)
tiny_model = functools.cache(models.tiny_model)


def spec_of(model) -> fj.CacheSpec:
    layers = ft.cache_layers(model)
    return fj.CacheSpec(**layers, num_blocks=128, block_size=4, max_seqs=4, max_blocks_per_seq=16)


def paged_logits(model, prompts, state=None) -> tuple[np.ndarray, fj.CacheState]:
    """Logits after each prompt, which is read in chunks of eight tokens."""
    model_fn, params = ft.tunix_model(model)
    state = fj.init(spec_of(model)) if state is None else state
    options = PrefillOptions(chunk_tokens=8, rows_per_step=2)
    logits, state = fj.prefill(
        model_fn, params, state, range(len(prompts)), prompts, options=options
    )
    return np.asarray(logits), state


def assert_dense(model, prompts, logits, atol=1e-5):
    dense = [models.dense_logits(model, prompt)[-1] for prompt in prompts]
    np.testing.assert_allclose(logits, dense, atol=atol)
    assert np.ptp(logits) > 1  # Weights that decide something.


def names_of(cls: type) -> dict[str, int]:
    """What a class and its module define, by identity."""
    owners = cls, importlib.import_module(cls.__module__)
    pairs = [pair for owner in owners for pair in vars(owner).items()]
    return {name: id(value) for name, value in pairs if not name.startswith("__")}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_tunix_which_stays_as_it_is(family):
    model, prompts = tiny_model(family), models.random_prompts()
    attention = type(model.layers[0].attn)
    before = names_of(attention)
    logits, state = paged_logits(model, prompts)
    assert_dense(model, prompts, logits)
    fj.check_state(state)
    assert names_of(attention) == before
    assert {type(layer.attn) for layer in model.layers} == {attention}


@pytest.mark.parametrize("family", ["Gemma3", "Gemma4"])
def test_layers_with_a_window_hold_the_window(family):
    model = tiny_model(family)
    _, state = paged_logits(model, models.random_prompts((33,)))
    local = [place for place in state.layers.places if place.group.sliding_window]
    assert local and len(local) < len(state.layers.places)
    for place in local:
        tables = state.page_tables[place.pool]
        held = tables.num_blocks_held.reshape(tables.num_groups, -1)[place.index, 0]
        assert int(held) <= (models.WINDOW + 16) // 4 + 2 < 33 // 4


def test_the_cache_of_gemma_4_has_two_head_sizes_and_no_layers_that_share():
    layers = ft.cache_layers(tiny_model("Gemma4"))
    sizes = {g.layers: (g.payload.num_kv_heads, g.payload.head_dim) for g in layers["groups"]}
    assert sizes == {(0, 2): (2, 8), (1, 3): (1, 16)}
    assert [group.sliding_window for group in layers["groups"]] == [models.WINDOW, None]
    assert layers["shared_layers"] == {4: 2, 5: 3}
    assert fj.CacheGeometry(**layers, max_seqs=2, max_sequence_length=64).groups


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama3", {"remat_config": "BLOCK"}),
        ("Gemma3", {"remat_config": "DECODER"}),
        ("Qwen3", {"use_flash_attention": True}),
    ],
)
def test_settings_of_training_are_no_hindrance(family, changes):
    prompts = models.random_prompts()
    module = importlib.import_module(type(models.CONFIGS[family]).__module__)
    if "remat_config" in changes:
        changes = {"remat_config": module.RematConfig[changes["remat_config"]]}
    logits, _ = paged_logits(models.tiny_model(family, **changes), prompts)
    assert_dense(tiny_model(family), prompts, logits)


def test_a_model_with_lora_is_one_of_its_family():
    qwix = import_quietly("qwix")
    provider = qwix.LoraProvider(module_path=".*(q_proj|v_proj|down_proj)", rank=4, alpha=2.0)
    base = tiny_model("Qwen3")
    model = qwix.apply_lora_to_model(base, provider, **base.get_model_input())
    lora = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), lora))
    prompts = models.random_prompts()
    logits, _ = paged_logits(model, prompts)
    assert_dense(model, prompts, logits)
    assert np.abs(logits - paged_logits(base, prompts)[0]).max() > 0.1


def test_model_functions_are_compared_by_structure():
    model_fn = ft.tunix_model(tiny_model("Qwen3"))[0]
    again = ft.tunix_model(models.tiny_model("Qwen3", seed=1))[0]
    assert model_fn == again and hash(model_fn) == hash(again)
    for other in (
        ft.tunix_model(tiny_model("Llama3"))[0],
        ft.tunix_model(models.tiny_model("Qwen3", norm_eps=1e-5))[0],
    ):
        assert model_fn != other


def test_a_family_that_is_not_known_is_refused():
    class Mamba(nnx.Module):
        pass

    for function in (ft.tunix_model, ft.cache_layers):
        with pytest.raises(TypeError, match="Mamba is not .* Qwen3, (.|\n)*attend_new"):
            function(Mamba())


@functools.cache
def sharded_model():
    """Qwen3 with its weights divided over two devices as its configuration says."""
    model = models.tiny_model("Qwen3")
    graphdef, params = nnx.split(model)
    mesh = jax.make_mesh((1, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = nnx.get_partition_spec(params)
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    return nnx.merge(graphdef, jax.device_put(params, shardings)), mesh


def test_heads_are_divided_over_a_mesh():
    model, mesh = sharded_model()
    prompts = models.random_prompts()
    state = init_sharded(spec_of(model), mesh, "tp")
    logits, state = paged_logits(model, prompts, state)
    assert_dense(tiny_model("Qwen3"), prompts, logits)
    assert tuple(state.pool.sharding.spec) == (None, None, "tp")
