"""Prompts and options of the example scripts: what is read, and what is refused before the work."""

import codecs
import json
import pathlib
import random

import jax
import pytest

from examples import generate
from examples.models import cache, downloads, inputs, prompts, tokenizer
from tests.support.tiny_llama import TOKENS, hf_config, random_tensors, write_folder

NOT_LINE_BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
VOCAB_SIZE = len(TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_folder(folder, hf_config(), random_tensors(hf_config()))
    return folder


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be read of a model."""

    def fail(*args):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(downloads, "resolve", fail)


def stop(main, words):
    """The exit status or the line with which a script ends."""
    with pytest.raises(SystemExit) as stopped:
        inputs.run_script(lambda: main(words))
    assert not isinstance(stopped.value.code, str) or len(stopped.value.code.splitlines()) == 1
    return stopped.value.code


def random_texts(rng):
    pool = "ab é東{}\"'\\" + NOT_LINE_BREAKS
    texts = ["".join(rng.choices(pool, k=rng.randrange(1, 9))) + "x" for _ in range(6)]
    return ["start", *texts]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["plain", "BOM"])
def test_a_prompts_file_has_a_prompt_per_line_feed(tmp_path, end, mark):
    rng = random.Random(0)
    for _ in range(30):
        texts = random_texts(rng)
        plain, as_json = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
        plain.write_bytes(mark + end.join([*texts, "", ""]).encode())
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        lines.insert(3, json.dumps({"token_ids": [1, 2]}))
        as_json.write_bytes(mark + end.join(lines).encode())
        assert [prompt.content for prompt in prompts.read_prompts([], plain)] == texts
        want = [*texts[:3], [1, 2], *texts[3:]]
        assert [prompt.content for prompt in prompts.read_prompts(["ab"], as_json)] == ["ab", *want]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "p.txt has no prompt"),
        ("p.jsonl", b"\n \n\n", "p.jsonl has no prompt"),
        ("p.txt", codecs.BOM_UTF8, "p.txt has no prompt"),
        ("p.txt", b"ab\nab \xff\n", "p.txt: line 2 is not UTF-8"),
        ("p.jsonl", b'{"text": "ab"}\n{"text": 3}', "p.jsonl, line 2: must be"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl, line 1: is not JSON that can be read"),
        ("p.jsonl", b'\n{"token_ids": [' + b"9" * 5000 + b"]}", "p.jsonl, line 2: is not JSON"),
        ("p.jsonl", b'{"token_ids": [true]}', "p.jsonl, line 1: must be"),
        ("p.jsonl", b'{"token_ids": [1.0]}', "p.jsonl, line 1: must be"),
        ("p.jsonl", rb'{"text": "a\ud800"}', "p.jsonl, line 1: text has the lone surrogate"),
        ("p.jsonl", b"nonsense", "p.jsonl, line 1: is not JSON"),
    ],
)
def test_a_prompts_file_that_cannot_be_used_is_named_before_the_work(
    tmp_path, no_work, name, data, message
):
    (tmp_path / name).write_bytes(data)
    output = tmp_path / "out.json"
    words = ["--prompts-file", str(tmp_path / name), "--json", str(output)]
    assert message in stop(generate.main, words)
    assert not output.exists()


def test_a_prompt_that_is_not_unicode_is_refused(no_work):
    assert "--prompt 2 has the lone surrogate" in stop(
        generate.main, ["--prompt", "ab", "--prompt", "a\udcff"]
    )


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        *(
            (main, [option, text], f"{option}: must be a whole number from 1 to 2**31 - 1, got")
            for main, option in (
                (generate.main, "--max-new-tokens"),
                (generate.main, "--batch-size"),
            )
            for text in ("0", "-1", "abc", "1.5", str(2**31), "9" * 5000)
        ),
        (generate.main, ["--temperature", "nan"], "--temperature: temperature must be a number"),
        (generate.main, ["--temperature", "-1"], "--temperature: temperature must be"),
        (generate.main, ["--temperature", "warm"], "could not convert string to float: 'warm'"),
        (generate.main, ["--prompts-file", "nowhere.txt"], "nowhere.txt is not a file"),
        (generate.main, ["--json", "nowhere/out.json"], "--json nowhere/out.json cannot be writt"),
        (generate.main, ["--json", "."], "--json . cannot be written: it is a folder"),
        (generate.main, ["--json", "x" * 300], "cannot be written: File name too long"),
    ],
)
def test_an_option_of_a_wrong_value_is_refused_before_the_work(
    no_work, capsys, main, words, message
):
    assert stop(main, words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and "%(" not in last and len(last) < 500


def test_an_output_that_can_be_written_is_left_as_it_was(tmp_path, no_work):
    old = tmp_path / "old.json"
    old.write_text("of an earlier run")
    (tmp_path / "empty.txt").write_text("")
    for path in (old, tmp_path / "new.json"):
        stop(generate.main, ["--json", str(path), "--prompts-file", str(tmp_path / "empty.txt")])
    assert old.read_text() == "of an earlier run"
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "empty.txt"}


def test_a_full_disk_is_named():
    with pytest.raises(OSError, match="--json /dev/full cannot be written: No space"):
        inputs.write_json(pathlib.Path("/dev/full"), {})


def test_token_ids_of_a_prompt_are_those_of_the_vocabulary(folder):
    loaded = tokenizer.from_folder(folder)
    rng = random.Random(0)
    choices = [0, 1, VOCAB_SIZE - 1, VOCAB_SIZE, -1, 2**31, 10**30]
    for _ in range(50):
        ids = rng.choices(choices, weights=[9, 9, 9, 1, 1, 1, 1], k=4)
        given = [prompts.Prompt("p.jsonl, line 3", ids)]
        if set(ids) <= set(range(VOCAB_SIZE)):
            assert prompts.encode_prompts(given, loaded, VOCAB_SIZE, chat=False) == [ids]
        else:
            with pytest.raises(ValueError, match=r"p.jsonl, line 3: token id .* 0 to 258"):
                prompts.encode_prompts(given, loaded, VOCAB_SIZE, chat=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "--prompt 1: the prompt is empty"),
        (["--num-blocks", "1"], "Raise --num-blocks"),
        (["--block-size", "4096"], "larger than the 2048 tokens that the model holds"),
        (["--max-new-tokens", "2147483647"], "lower --max-new-tokens"),
        (["--num-blocks", "2147483647"], "Lower num_blocks"),
        (["--num-blocks", "1000"], r"pool of 1000 blocks of 16 tokens cannot be made (no memory)"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_before_compiling(folder, monkeypatch, words, message):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("no memory")

    monkeypatch.setattr(generate, "Engine", None)
    if "1000" in words:
        monkeypatch.setattr(cache, "PagedKvCacheManager", fail)
    assert message in stop(generate.main, ["--model", str(folder), *words])


@pytest.mark.parametrize(
    ("peak_bytes", "words"), [(50, "50% of a padded"), (100, "100% of"), (267, "are not full")]
)
def test_the_peak_is_a_share_of_a_dense_cache_unless_it_is_more(capsys, peak_bytes, words):
    last = printed_table(capsys, peak_bytes=peak_bytes, group_blocks={"all": 7})[-1]
    assert words in last and "267%" not in last


def test_the_table_says_what_each_kind_of_layer_holds_at_the_end(capsys):
    groups = {"full": 9, "window-8/0": 2, "window-8/1": 3}
    last = printed_table(capsys, peak_bytes=50, group_blocks=groups)[-1]
    assert last.split() == "held at end 14 blocks full 9, window-8 2 + 3".split()


def printed_table(capsys, **cache):
    """The lines of the table that the main job prints."""
    names = ("prompt_tokens", "reused_prompt_tokens", "new_tokens", "peak_blocks", "block_size")
    counts = dict.fromkeys([*names, "total_blocks"], 1)
    names = ("tokens_per_second", "decode_tokens_per_second", "compile_seconds", "floor_seconds")
    report = {
        **dict.fromkeys([*names, "seconds"], 1.0),
        "first_token_seconds": {"mean": 1.0, "last": 2.0},
        "preempted": 0,
        "cache": {**counts, "dense_bytes": 100, **cache},
    }
    generate._print_table(report)
    return capsys.readouterr().out.splitlines()
