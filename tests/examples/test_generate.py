"""The main job with tiny models: the answers of a plain forward, and what the table counts."""

import json

import jax
import pytest

from examples import generate
from examples.models import downloads
from tests.support.tiny_llama import (
    gemma3_config,
    hf_config,
    random_tensors,
    reference_logits,
    write_folder,
)

NUM_NEW = 6
LONG = [3, 250, 17, 17, 88, 140, 9, 201, 33]
PROMPTS = [LONG, LONG[:2], [*LONG, 5, 6], [40, 41], [*LONG[:8], 7]]


def answers(fields, tensors):
    """Greedy continuations of the prompts."""
    texts = [list(prompt) for prompt in PROMPTS]
    for text in texts:
        for _ in range(NUM_NEW):
            text.append(int(reference_logits(fields, tensors, text)[-1].argmax()))
    return [text[-NUM_NEW:] for text in texts]


@pytest.mark.parametrize(
    ("fields", "num_blocks"),
    [(hf_config(), None), (hf_config(), 5), (gemma3_config(), None)],
    ids=["llama", "few-blocks", "gemma3"],
)
def test_the_main_job_gives_the_tokens_of_a_plain_forward(tmp_path, capsys, fields, num_blocks):
    tensors = random_tensors(fields)
    write_folder(tmp_path, fields, tensors)
    lines = [json.dumps({"token_ids": ids}) for ids in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    generate.main(
        ["--model", str(tmp_path), "--prompts-file", str(tmp_path / "prompts.jsonl")]
        + ["--max-new-tokens", str(NUM_NEW), "--ignore-eos", "--block-size", "4"]
        + ["--batch-size", "2", "--json", str(tmp_path / "out.json")]
        + (["--num-blocks", str(num_blocks)] if num_blocks else [])
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert [result["prompt_token_ids"] for result in report["results"]] == PROMPTS
    assert [result["new_token_ids"] for result in report["results"]] == answers(fields, tensors)
    cache, first = report["cache"], report["first_token_seconds"]
    assert cache["prompt_tokens"] == sum(map(len, PROMPTS))
    assert cache["new_tokens"] == len(PROMPTS) * NUM_NEW
    assert cache["free_blocks"] + cache["evictable_blocks"] == cache["total_blocks"]
    assert 4 <= cache["peak_blocks"] <= cache["total_blocks"]
    assert cache["reused_prompt_tokens"] >= 8, "three begin alike"
    assert 0 < first["mean"] <= first["last"] <= report["seconds"]
    assert report["floor_seconds"] > 0
    assert sum(cache["group_blocks"].values()) > 0
    said = capsys.readouterr()
    assert f"{len(PROMPTS) * NUM_NEW}/{len(PROMPTS) * NUM_NEW}" in said.err  # The progress bar.
    assert ("preempted" in said.out) == bool(report["preempted"])


class Settings:
    """The settings of JAX that are read and changed."""

    def __init__(self, folder):
        self.jax_compilation_cache_dir, self.changed = folder, {}

    def update(self, name, value):
        self.changed[name] = value


def test_programs_are_kept_beside_the_weights_unless_jax_is_set_to_keep_them(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder in (None, "elsewhere"):
        settings = Settings(folder)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "config", settings)
            downloads.keep_programs()
        kept = settings.changed.get("jax_compilation_cache_dir")
        assert kept == (None if folder else str(tmp_path / "ferrum_jax/compiled"))
        assert bool(settings.changed) == (folder is None)
