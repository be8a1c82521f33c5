"""Each example runs, and prints what its first line promises."""

import pathlib
import re
import subprocess
import sys

import pytest

import ferrum_jax as fj
from examples import (
    async_waiting,
    cache_compression,
    engine_linen,
    engine_nnx,
    prefix_caching,
    quickstart,
    rollout,
    samples,
    streaming,
    swapping,
)
from examples.models import toy

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_says_how_to_run_it_and_is_in_the_readme(name):
    text = (ROOT / f"examples/{name}.py").read_text(encoding="utf-8")
    assert f"examples/{name}.py" in (ROOT / "README.md").read_text(encoding="utf-8")
    if name != "generate":  # The main job has a command line.
        assert len(text.splitlines()) <= 60
        assert f"python -m examples.{name}`" in text


def test_quickstart_takes_blocks_as_sequences_grow_and_frees_them(capsys):
    quickstart.main()
    counts = re.findall(r"(\d+) blocks free", capsys.readouterr().out)
    assert counts == ["27", "25", "30"]  # 1 + 4 blocks, then 2 + 5, then 2.


def test_prefix_caching_computes_the_system_prompt_once_per_tenant(capsys):
    prefix_caching.main()
    said = capsys.readouterr().out
    assert re.findall(r"(\d+) of them cached; blocks taken: (\d+)", said) == [
        *(("0", "7"), ("96", "1"), ("96", "1"), ("0", "7"))
    ]
    assert "hit rate 47%" in said


def test_compression_takes_fewer_blocks_and_keeps_most_tokens_of_the_answer(capsys):
    cache_compression.main()
    said = capsys.readouterr().out
    found = re.findall(r"(\d+)% of the bytes, (\d+) blocks.* (\d+) of 16 new tokens", said)
    assert len(found) == len(cache_compression.METHODS)
    for (ratio, _), (percent, blocks, agreeing) in zip(
        cache_compression.METHODS.values(), found, strict=True
    ):
        assert int(percent) <= 100 * ratio + 5 and int(blocks) < 12 and int(agreeing) >= 8


def test_swapping_changes_no_token(capsys):
    swapping.main()
    said = capsys.readouterr().out
    manager = fj.PagedKvCacheManager(
        fj.CacheConfig(block_size=16, max_blocks=32, initial_blocks=32), toy.GEOMETRY
    )
    handle = manager.allocate(manager.new_request("chat", prompt_token_ids=swapping.PROMPT))
    before = toy.decode(manager, handle, toy.prefill(manager, handle, swapping.PROMPT), 4)
    after = toy.decode(manager, handle, before[-1], 4)
    assert f"tokens before {before}, after {after}; 128 tokens" in said
    assert re.findall("chat is (resident|swapped out), (.*?) of 32", said) == [
        *(("resident", "24"), ("swapped out", "32"), ("resident", "24")),
        *(("swapped out", "0"), ("resident", "24")),
    ]


def test_async_waiting_serves_the_urgent_request_before_those_that_came_earlier(capsys):
    async_waiting.main()
    said = capsys.readouterr().out
    begun = re.findall(r"(\w+) request (\d) begins", said)
    assert [int(number) for _, number in begun] == [0, 1, 4, 2, 3]
    assert "3 requests wait" in said and "'late' waited 0 seconds" in said


def test_an_engine_over_an_nnx_decoder_shares_a_system_prompt_and_serves_the_urgent_first(capsys):
    engine_nnx.main()
    said = capsys.readouterr().out
    first, num_steps = map(int, re.findall(r"urgent: (\d+) tokens after (\d+) steps", said)[0])
    assert first == 4 and num_steps <= 6
    found = re.findall(r"(\d+) tokens, (\d+) of (\d+) prompt tokens were cached", said)
    assert found == [("8", "0", "103"), ("8", "96", "102"), ("8", "96", "104")]


def test_an_engine_over_a_linen_decoder_gives_the_same_bits_alone(capsys):
    engine_linen.main()
    said = capsys.readouterr().out
    assert re.findall(r"(\d+) prompt tokens, 64 new ones; alone the same bits", said) == [
        *("5", "20", "1")
    ]
    assert re.search(r"steps by .*: \{\(4, 8\): \d+\}$", said.strip())


def test_streaming_shows_each_token_and_cancels_an_answer(capsys):
    streaming.main()
    said = capsys.readouterr().out
    for number in range(3):
        places = re.findall(rf"answer {number}: token (\d+) is", said)
        assert places == [str(place) for place in range(1, 13)]
    assert "cancelled after 5 of 400 tokens" in said
    assert "threads and coroutines read the same: True" in said and "0 requests left" in said


def test_samples_share_a_prompt_and_new_weights_find_nothing_of_the_old(capsys):
    samples.main()
    said = capsys.readouterr().out
    assert "take 6 blocks, not 12" in said
    drawn = re.findall(r"(\[.*\]): log-probability (-[\d.]+)", said)
    assert len(drawn) == 4 and len(set(drawn)) > 1
    assert "the same seed draws the same: True" in said
    assert "32 prompt tokens were cached" in said and "0 of them for the new weights" in said


def test_rollout_computes_each_prompt_once_and_uses_its_cache_again(capsys):
    rollout.main()
    said = capsys.readouterr().out
    sizes = re.findall(r"(\d+) prompt tokens were computed, not (\d+)", said)
    assert sizes == [(str(sum(map(len, rollout.PROMPTS))), "300")] * 2
    # 3 prompts share 4 full blocks; each of 12 samples ends in one of its own, or in two.
    peaks = [int(peak) for peak in re.findall(r"(\d+) blocks were in use", said)]
    assert len(peaks) == 2 and max(peaks) < 12 * 2
    assert "step 1: 12 samples" in said


def test_multi_device_moves_a_request_and_evens_devices_out():
    command = [sys.executable, "-m", "examples.multi_device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "moved chat 1 to cpu:3" in done.stdout
    stayed, moved = re.findall(r"(\[.*?\])", done.stdout)
    assert stayed == moved
    *_, last = re.findall(r"rebalanced: blocks in use (\{.*\})", done.stdout)
    assert sorted(re.findall(r": (\d+)", last)) == ["14", "14", "7", "7"]
