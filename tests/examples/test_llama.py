"""The example model: loaders against a plain numpy forward, the real weights against goldens."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import dense
from examples.models import downloads, families, model_config, tokenizer, weights
from ferrum_jax.attention import AttentionOptions
from tests.support.tiny_llama import (
    LLAMA3_ROPE,
    TOKENS,
    gemma3_config,
    hf_config,
    random_tensors,
    reference_logits,
    write_folder,
    write_gguf,
)

GOLDENS_FILE = pathlib.Path(__file__).parent.parent / "goldens/smollm2_135m.json"
GOLDENS = json.loads(GOLDENS_FILE.read_text())
PROMPT = [3, 250, 17, 17, 88, 140, 9, 201, 33]


def all_logits(config, params, token_ids, num_prefilled):
    """Logits of the dense run from the last prefilled token on: a prefill, then steps."""
    model_fn, params = families.functional(families.from_params(config, params))
    cache = dense.init_cache(config, 1, len(token_ids))
    tokens = jnp.asarray([token_ids[:num_prefilled]], jnp.int32)
    lens = jnp.asarray([num_prefilled], jnp.int32)
    logits, cache = dense.prefill(model_fn, params, tokens, lens, cache)
    rows = [logits]
    for position in range(num_prefilled, len(token_ids)):
        token = jnp.asarray([token_ids[position]], jnp.int32)
        lens = jnp.asarray([position + 1], jnp.int32)
        logits, cache = dense.decode_step(model_fn, params, token, lens, cache)
        rows.append(logits)
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("changes", "num_shards"),
    [
        ({}, 1),
        ({"tie_word_embeddings": False}, 2),
        ({"model_type": "mistral", "sliding_window": 3}, 1),
        ({"rope_scaling": LLAMA3_ROPE}, 1),
        ({"model_type": "qwen3", "sliding_window": 3, "use_sliding_window": False}, 2),
        (gemma3_config(), 1),
    ],
    ids=["tied", "untied-sharded", "sliding-window", "llama3-rope", "qwen3", "gemma3"],
)
def test_a_safetensors_folder_gives_the_logits_of_a_plain_forward(tmp_path, changes, num_shards):
    fields = hf_config(**changes)
    tensors = random_tensors(fields)
    write_folder(tmp_path, fields, tensors, num_shards)
    config, params, _ = weights.load(tmp_path)
    want = reference_logits(fields, tensors, PROMPT)
    np.testing.assert_allclose(all_logits(config, params, PROMPT, 6), want[5:], atol=1e-4)


def test_a_gguf_file_gives_the_logits_of_a_plain_forward(tmp_path):
    fields = hf_config(hidden_size=32)
    tensors = random_tensors(fields)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, fields, tensors, quantised=("model.layers.0.mlp.gate_proj.weight",))
    config, params, loaded = weights.load(path)
    want = reference_logits(fields, tensors, PROMPT)
    np.testing.assert_allclose(all_logits(config, params, PROMPT, 6), want[5:], atol=1e-4)
    assert loaded.eos_token_ids == (0,)


@pytest.fixture(scope="module")
def tiny():
    """`(fields, tensors, config, model_fn, params)` of a tiny model."""
    fields = hf_config()
    tensors = random_tensors(fields)
    config = model_config.from_json(fields)
    params = weights.assemble(config, tensors.__getitem__, jnp.float32)
    return fields, tensors, config, *families.functional(families.from_params(config, params))


def test_ragged_rows_generate_what_each_generates_alone(tiny):
    fields, tensors, config, model_fn, params = tiny
    prompts = [PROMPT, PROMPT[:2], PROMPT[3:8]]
    together = dense.generate(model_fn, params, config, prompts, max_new_tokens=6)
    for prompt, new in zip(prompts, together, strict=True):
        want = list(prompt)
        for _ in range(6):
            want.append(int(reference_logits(fields, tensors, want)[-1].argmax()))
        assert new == want[len(prompt) :]


def test_a_row_stops_at_its_end_token_while_the_others_go_on(tiny):
    *_, config, model_fn, params = tiny
    prompts = [PROMPT, PROMPT[:2]]
    free = dense.generate(model_fn, params, config, prompts, max_new_tokens=6)
    end = next(token for token in free[0] if token not in free[1])
    ended = dense.generate(
        model_fn, params, config, prompts, max_new_tokens=6, eos_token_ids=(end,)
    )
    assert ended == [free[0][: free[0].index(end) + 1], free[1]]


def test_a_chunk_in_the_middle_of_a_row_is_written_and_attended(tiny):
    fields, tensors, config, model_fn, params = tiny
    cache = dense.init_cache(config, 2, len(PROMPT))
    start = jnp.asarray([PROMPT[:4], PROMPT[2:6]], jnp.int32)
    _, cache = dense.prefill(model_fn, params, start, jnp.asarray([4, 2], jnp.int32), cache)
    batch = dense.DenseBatch(
        pools=cache,
        seq_lens=jnp.asarray([9, 5], jnp.int32),
        q_lens=jnp.asarray([5, 3], jnp.int32),
        num_tokens=5,
    )
    tokens = jnp.asarray([PROMPT[4:], [*PROMPT[4:7], 0, 0]], jnp.int32)
    logits, _ = jax.jit(model_fn)(params, tokens, batch)
    for row, prompt in zip(logits, (PROMPT, PROMPT[2:7]), strict=True):
        want = reference_logits(fields, tensors, prompt)[-1]
        np.testing.assert_allclose(row, want, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_step_writes_the_dense_cache_in_place(tiny, num_rows):
    *_, config, model_fn, params = tiny
    cache = dense.init_cache(config, num_rows, 4096)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    ones = jnp.ones(num_rows, jnp.int32)
    compiled = dense.decode_step.lower(model_fn, params, ones, ones, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < nbytes / 3
    _, after = dense.decode_step(model_fn, params, ones, ones, cache)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)] == pointers


def test_a_step_computes_rotary_angles_once(tiny):
    *_, config, model_fn, params = tiny
    assert config.num_layers > 1
    ones = jnp.ones(3, jnp.int32)
    step = dense.decode_step.lower(model_fn, params, ones, ones, dense.init_cache(config, 3, 8))
    assert step.compile().as_text().count(" cosine(") == 1


def test_the_dense_cache_refuses_options_that_it_does_not_know(tiny):
    config = tiny[2]
    ones = jnp.ones(1, jnp.int32)
    batch = dense.DenseBatch(
        pools=dense.init_cache(config, 1, 4), seq_lens=ones, q_lens=ones, num_tokens=1
    )
    q = jnp.zeros((1, 1, config.num_q_heads, config.head_dim), jnp.float32)
    with pytest.raises(ValueError, match="soft_cap"):
        batch.attend(0, q, AttentionOptions(soft_cap=5.0))


def test_digits_stand_alone_and_special_tokens_stay_whole(tmp_path):
    fields = hf_config(hidden_size=32)
    write_gguf(tmp_path / "tiny.gguf", fields, random_tensors(fields))
    *_, loaded = weights.load(tmp_path / "tiny.gguf")
    ids = loaded.encode("ab ab12<|end|>")
    assert [TOKENS[i] for i in ids] == ["ab", "Ġab", "1", "2", "<|end|>"]
    assert loaded.decode(ids) == "ab ab12"
    assert loaded.decode(loaded.encode("naïve 東京")) == "naïve 東京"
    assert loaded.apply_chat("ab").endswith("<|im_start|>assistant\n")


def test_a_folder_brings_its_template_and_its_start_token(tmp_path):
    fields = hf_config()
    write_folder(tmp_path, fields, {})
    template = (
        "{{ bos_token }}[{{ messages[0].content }}]{% if add_generation_prompt %}>{% endif %}"
    )
    settings = {"bos_token": {"content": "<|end|>"}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = tokenizer.from_folder(tmp_path)
    assert loaded.apply_chat("ab") == "<|end|>[ab]>"
    assert loaded.encode("<|end|>ab") == [0, TOKENS.index("ab")]
    assert loaded.eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({"model_type": "gemma3"}, None, "gemma3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, None, "yarn"),
        ({"num_key_value_heads": 3}, None, "num_kv_heads=3"),
        ({}, "model.layers.0.self_attn.q_proj.bias", "does not use"),
        ({"model_type": "qwen3"}, None, "no tensor model.layers.0.self_attn.q_norm.weight"),
        ({**gemma3_config(), "layer_types": ["full_attention"]}, None, "for each of 3 layers"),
        ({**gemma3_config(), "final_logit_softcapping": 30.0}, None, "no soft cap"),
        ({"num_hidden_layers": 2**30}, None, "num_hidden_layers=1073741824"),
    ],
)
def test_a_model_of_another_family_is_refused(tmp_path, changes, tensor, message):
    tensors = random_tensors(hf_config())
    if tensor is not None:
        tensors[tensor] = np.zeros(32, np.float32)
    write_folder(tmp_path, hf_config(**changes), tensors)
    with pytest.raises(ValueError, match=message):
        weights.load(tmp_path)


def test_an_incomplete_model_names_what_is_missing(tmp_path):
    tensors = random_tensors(hf_config())
    del tensors["model.norm.weight"]
    write_folder(tmp_path, hf_config(), tensors)
    with pytest.raises(ValueError, match="model.norm.weight"):
        weights.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.load(tmp_path.parent)


def test_weights_of_another_shape_are_refused(tiny):
    *_, config, _, _ = tiny
    with pytest.raises(ValueError, match="embedding"):
        families.from_params(config, {"embedding": np.zeros((2, 2), np.float32)})


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError, match="GGUF"):
        downloads.resolve("./nowhere.gguf")


@pytest.fixture(scope="module")
def smollm2():
    """`(config, tokenizer, model_fn, params)` of the real model."""
    config, params, loaded = weights.load(downloads.resolve())
    return config, loaded, *families.functional(families.from_params(config, params))


@pytest.mark.model
def test_the_tokenizer_reproduces_the_golden_ids(smollm2):
    _, loaded, *_ = smollm2
    for case in GOLDENS["cases"]:
        assert loaded.encode(case["prompt"]) == case["token_ids"]
        text = loaded.decode(case["token_ids"])
        assert text == case["prompt"].replace("<|im_start|>", "").replace("<|im_end|>", "")
    question = "Explain in three sentences why the sky is blue."
    assert loaded.eos_token_ids == (2,)
    chat = loaded.apply_chat(question)
    assert chat == GOLDENS["cases"][-1]["prompt"]
