"""The replay of traces: hit rates of policies, the optimum, and the command line."""

import codecs
import itertools
import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from ferrum_jax.policies.blocks import block_policy_names, registry
from ferrum_jax.policies.blocks.recency import LruBlockPolicy
from ferrum_jax.replay import (
    TracedRequest,
    format_table,
    optimal_hit_rate,
    read_trace,
    replay,
    replay_all,
)
from ferrum_jax.replay.__main__ import main
from ferrum_jax.tokens import TokenIds


def as_trace(paths):
    """Makes a trace of paths: each prefix has its own id."""
    ids = {}
    return [
        TracedRequest(
            float(i),
            TokenIds([ids.setdefault(path[:n], len(ids)) for n in range(1, len(path) + 1)]),
        )
        for i, path in enumerate(paths)
    ]


PATHS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=12)


def simple_lru(trace, capacity):
    """Hit rate of leaf-first LRU, by a search of all blocks each time."""
    last_use, num_found, num_asked = {}, 0, 0
    for i, request in enumerate(trace):
        path = tuple(request.hash_ids)
        num_asked += len(path)
        prefixes = [path[:n] for n in range(1, len(path) + 1)]
        num_found += sum(prefix in last_use for prefix in prefixes)
        kept = set(prefixes[:capacity])
        while len(last_use.keys() | kept) > capacity:
            leaves = [p for p in last_use.keys() - kept if all(q[:-1] != p for q in last_use)]
            # Of blocks used at the same time, the deepest is evicted first.
            del last_use[min(leaves, key=lambda p: (last_use[p], -len(p)))]
        last_use |= dict.fromkeys(kept, i)
    return num_found / num_asked


def simple_optimum(trace, capacity):
    """The best hit rate, by trying every choice of what to keep after each request."""
    best = {frozenset(): 0}
    for request in trace:
        ids, after = list(request.hash_ids), {}
        for cached, num_found in best.items():
            num_found += len(list(itertools.takewhile(cached.__contains__, ids)))
            known = cached | set(ids)
            for size in range(min(capacity, len(known)) + 1):
                for kept in map(frozenset, itertools.combinations(sorted(known), size)):
                    after[kept] = max(after.get(kept, 0), num_found)
        best = after
    return max(best.values()) / sum(len(request.hash_ids) for request in trace)


@pytest.fixture(autouse=True)
def no_policy_fails(caplog):
    """A policy that fails is logged, without an error."""
    yield
    assert not caplog.records


@pytest.fixture
def trace_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * i, "input_length": 1024, "output_length": 7, "hash_ids": ids}
        for i, ids in enumerate([[0, 1, 2], [0, 3], [0, 1, 2, 4], [0, 3, 5]])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@hypothesis.settings(max_examples=100)
@hypothesis.given(paths=PATHS, capacity=st.integers(1, 8))
def test_replay_of_lru_agrees_with_a_search_of_all_blocks(paths, capacity):
    trace = as_trace(paths)
    assert replay(trace, "lru", capacity) == pytest.approx(simple_lru(trace, capacity))


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    paths=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=7),
    capacity=st.integers(1, 3),
)
def test_optimal_hit_rate_is_the_best_of_all_choices(paths, capacity):
    trace = as_trace(paths)
    assert optimal_hit_rate(trace, capacity) == pytest.approx(simple_optimum(trace, capacity))


@hypothesis.settings(max_examples=20)
@hypothesis.given(paths=PATHS, capacity=st.integers(1, 8))
def test_replay_never_exceeds_the_optimal_hit_rate(paths, capacity):
    trace = as_trace(paths)
    best = optimal_hit_rate(trace, capacity)
    for name in block_policy_names():
        assert replay(trace, name, capacity) <= best + 1e-9


@pytest.mark.parametrize("name", block_policy_names())
def test_replay_finds_every_repeated_block_if_there_is_room(name):
    trace = as_trace(["abc", "abd", "abc", "x", "abde"])
    num_again = 0 + 2 + 3 + 0 + 3
    assert replay(trace, name, 100) == num_again / 14 == optimal_hit_rate(trace, 100)


def test_replay_does_not_count_skipped_requests():
    trace = as_trace(["ab", "ab", "xy", "abc"])
    assert replay(trace, "lru", 8, num_skipped=2) == 2 / 5
    assert optimal_hit_rate(trace, 8, num_skipped=2) == 2 / 5
    assert replay(trace, "lru", 8, num_skipped=4) == 0


def test_replay_of_requests_larger_and_much_smaller_than_the_pool():
    assert replay(as_trace(["abcdef", "abcdef"]), "lru", 4) == 4 / 12
    trace = as_trace(["abc", "abd", "abc", "x", "abde"])
    for name in block_policy_names():
        assert replay(trace, name, 2**40) == replay(trace, name, 14)
    assert replay([], "lru", 2**40) == 0


def test_replay_refuses_a_pool_without_blocks():
    for rate in (lambda: replay([], "lru", 0), lambda: optimal_hit_rate([], 0)):
        with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
            rate()


def test_replay_all_and_format_table():
    trace = as_trace(["ab", "cd", "ab", "cd"])
    rates = replay_all(trace, {"mine": LruBlockPolicy, "theirs": "lru"}, [2, 4])
    assert rates == {"mine": [0, 0.5], "theirs": [0, 0.5], "optimum": [0.25, 0.5]}
    lines = format_table(rates, [2, 4]).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        *("2 4", "mine 0.00 50.00", "theirs 0.00 50.00", "optimum 25.00 50.00")
    ]


def test_read_trace_returns_the_requests_with_and_without_a_byte_order_mark(trace_file):
    for mark in (b"", codecs.BOM_UTF8):
        trace_file.write_bytes(mark + trace_file.read_bytes())
        trace = read_trace(trace_file)
        assert [list(request.hash_ids) for request in trace][:2] == [[0, 1, 2], [0, 3]]
        assert [request.arrival_seconds for request in trace] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", '{"timestamp": 0}', '{"hash_ids": [1]}']
    + [f'{{"timestamp": 0, "hash_ids": {ids}}}' for ids in ('"ab"', "[1.5]", "[-1]", "[[1]]", "7")]
    + [f'{{"timestamp": 0, "hash_ids": {ids}}}' for ids in ("null", "[2147483648]", "[null]")]
    + [
        f'{{"timestamp": {timestamp}, "hash_ids": [1]}}'
        for timestamp in ("1e999", "NaN", "-Infinity", '"inf"', "null", "1" + "0" * 400, "9" * 5000)
    ]
    + ["[" * 100_000, '{"timestamp": 0, "hash_ids": "\udcff"}'],
    ids=lambda line: line[:40],
)
def test_read_trace_names_a_wrong_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    text = f'{{"timestamp": 0, "hash_ids": [1]}}\n{line}\n'
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=r"Line 2 of .*bad\.jsonl is not a request .*hash_ids"
    ) as bad:
        read_trace(path)
    assert len(str(bad.value)) < 500


def test_read_trace_refuses_a_trace_without_blocks(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": []}\n')
    with pytest.raises(ValueError, match="no request with blocks"):
        read_trace(path)


def test_the_command_line_prints_a_table(trace_file):
    command = [sys.executable, "-m", "ferrum_jax.replay", str(trace_file)]
    words = ["--capacity", "3", "8", "--policy", "lru"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    title, header, lru, optimum = done.stdout.splitlines()
    assert title.startswith("4 requests, 12 blocks")
    assert header.split() == ["3", "8"]
    assert lru.split() == ["lru", "33.33", "50.00"]
    assert optimum.split() == ["optimum", "41.67", "50.00"]


def test_the_command_line_writes_json_and_a_plot(trace_file, tmp_path, capsys):
    plot, report = tmp_path / "hits.png", tmp_path / "hits.json"
    main([str(trace_file), "--capacity", "8", "--plot", str(plot), "--json", str(report)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(report.read_text())
    assert written.pop("hit_rates") == dict.fromkeys([*block_policy_names(), "optimum"], [0.5])
    sizes = {"num_requests": 4, "num_skipped": 0, "num_blocks": 12, "capacities": [8]}
    assert written == {"trace": "trace.jsonl", **sizes}
    assert "return_rate     50.00" in capsys.readouterr().out


def test_the_command_line_takes_a_part_of_the_trace(trace_file, capsys):
    main([str(trace_file), "--capacity", "8", "--policy", "lru", "--limit", "3", "--skip", "2"])
    assert "3 requests" in (out := capsys.readouterr().out)
    assert "lru         75.00" in out


def test_the_command_line_imports_the_users_policies(trace_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_replay_policies.py").write_text(
        "from ferrum_jax.policies.blocks.recency import LruBlockPolicy\n"
        "from ferrum_jax.policies.blocks import register_block_policy\n"
        "register_block_policy('mine', LruBlockPolicy)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    words = ["--capacity", "8", "--policy", "mine", "--import", "my_replay_policies"]
    main([str(trace_file), *words])
    assert "mine        50.00" in capsys.readouterr().out


@pytest.mark.parametrize(("has_tqdm", "shown"), [(True, "100%"), (False, "4/4 runs")])
def test_the_command_line_shows_progress(trace_file, monkeypatch, capsys, has_tqdm, shown):
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    main([str(trace_file), "--capacity", "3", "8", "--policy", "lru"])
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--policy lur", "Block policy 'lur' is not registered"),
        ("--capacity 8 0", "capacity must be at least 1, got 0"),
        (f"--capacity {10**30}", "capacity must be below 2147483648, got 1000"),
        ("--limit -1", "limit must be at least 1, got -1"),
        ("--limit 0", "limit must be at least 1, got 0"),
        ("--skip -1", "skip must be at least 0, got -1"),
        ("--skip 4", "--skip 4 leaves none of 4 requests to count"),
        ("--limit 2 --skip 2", "--skip 2 leaves none of 2 requests to count"),
        ("--json nowhere/hits.json", "--json nowhere/hits.json cannot be written: No such file"),
        ("--json .", "--json . cannot be written: it is a folder"),
        ("--plot nowhere/hits.png", "--plot nowhere/hits.png cannot be written: No such file"),
        ("--plot hits.png", "--plot draws with matplotlib, which is not installed"),
        ("--import no_such_module", "--import no_such_module fails: ModuleNotFoundError: No mod"),
        ("--import my_failing_policies", "--import my_failing_policies fails: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trace_file, words, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (trace_file.parent / "my_failing_policies.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(trace_file.parent)
    with pytest.raises(SystemExit) as stopped:
        main([str(trace_file), *words.split()])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"replay: {message}") and len(err.splitlines()) == 1
    assert out == "", "the work has begun"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{}/trace.jsonl --plot {}/hits.xyz", "hits.xyz has no known format"),
        ("{}/trace.jsonl --capacity " + "9" * 5000, "--capacity: must be an integer"),
        ("{}/trace.jsonl --policy lru --json /dev/full", "--json /dev/full cannot be written: No"),
        ("{}/absent.jsonl", "absent.jsonl"),
    ],
    ids=lambda words: words[:40],
)
def test_files_and_numbers_that_cannot_be_are_named(trace_file, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.replace("{}", str(trace_file.parent)).split())
    assert stopped.value.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and len(last) < 300
    assert [path.name for path in trace_file.parent.iterdir()] == ["trace.jsonl"]
