"""Benchmarks can be found, run, stored and drawn; how fast they are is no matter here."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import harness, page, plots
from benchmarks.__main__ import main, plan
from benchmarks.bandwidth import memory_roofs
from benchmarks.catalogue import CATALOGUE

BENCHMARKS = page.RESULTS.parent
STORED = sorted(page.RESULTS.glob("*.json"))
CPU = ("cpu", "cpu")
REQUESTS = [{"timestamp": i, "hash_ids": [1, 2, 3 + i % 4, 10 + i]} for i in range(40)]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, REQUESTS)))
    return path


@pytest.fixture
def gpu_report():
    def figure(rows, contestant, **rest):
        case = {"heads": "9/3/64", "rows": rows, "context": 1024}
        return {**case, "contestant": contestant, "microseconds": 1.0, **rest}

    figures = [
        figure(rows, name, gigabytes_per_second=speed, of_copy=speed / 2000)
        for rows in (1, 16)
        for name, speed in (("ferrum_jax", 1500.0), ("torch SDPA, dense", 700.0))
    ]
    figures.append(figure(1, "FlashInfer", failed="ModuleNotFoundError"))
    return {
        **{"benchmark": "gpu_attention", "options": {}},
        "environment": {**harness.environment(), "device": "gpu: NVIDIA H100", "seconds": 1.0},
        "figures": {"copy_bytes_per_second": [2e12, 2e12], "figures": figures},
    }


def assert_readable(figure, environment):
    """Every picture names its axes, explains its colors, and says where and when."""
    for axes in figure.axes:
        assert axes.get_xlabel() and axes.get_ylabel()
        assert figure.legends or axes.get_legend()
    title = figure.get_suptitle()
    assert environment["time"][:10] in title and plots.machine(environment) in title


def test_the_list_names_every_benchmark(capsys):
    modules = {
        path.stem
        for path in BENCHMARKS.glob("[a-z]*.py")
        if "\ndef main(" in path.read_text(encoding="utf-8")
    }
    assert modules == set(CATALOGUE)
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name, entry in CATALOGUE.items():
        assert re.search(
            rf"^{name} +{re.escape(entry.asks)} +{re.escape(entry.takes)}$", listed, re.M
        )


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_benchmark_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    for option in ("--quick", "--json", "--plot"):
        assert option in text
    for options in CATALOGUE[name].runs.values():
        assert all(option in text for option in options if option.startswith("--"))


def test_an_unknown_name_is_answered_with_those_that_there_are(capsys):
    assert main(["alocator"]) == 2
    said = capsys.readouterr().err
    assert "'alocator'" in said and all(name in said for name in CATALOGUE)


def test_a_benchmark_writes_where_its_figures_come_from_and_draws_them(trace, tmp_path):
    files = {end: tmp_path / f"replay.{end}" for end in ("json", "png")}
    arguments = ["--trace", trace, "--capacity", "4", "8", "--quick"]
    arguments += ["--json", files["json"], "--plot", files["png"]]
    command = [sys.executable, "-m", "benchmarks.replay", *map(str, arguments)]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 requests, 160 blocks" in done.stdout
    report = harness.read_report(files["json"])
    assert report["benchmark"] == "replay"
    assert report["options"] == {"quick": True, "trace": trace.name, "capacity": [4, 8]}
    assert str(tmp_path) not in files["json"].read_text()  # Folders are nobody's business.
    environment = report["environment"]
    for known in ("python", "commit", "device", "cpu", "num_cpus", "time", "seconds"):
        assert environment[known]
    assert {"jax", "jaxlib", "numpy"} <= set(environment["versions"])
    assert {"load_average_before", "load_average"} <= set(environment)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    figure = plots.draw(report)
    assert_readable(figure, environment)
    assert "quick" in figure.get_suptitle()
    assert "quick" not in plots.draw({**report, "options": {}}).get_suptitle()


def test_a_run_that_breaks_off_leaves_what_it_had_so_far(tmp_path):
    path = tmp_path / "x.json"

    def measure(args):
        yield {"shapes": 1}
        assert harness.read_report(path)["figures"] == {"shapes": 1}
        yield {"shapes": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.run(harness.make_parser("x", "", quick=""), measure, ["--json", str(path)])
    assert harness.read_report(path)["figures"] == {"shapes": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", STORED, ids=[path.stem for path in STORED])
def test_a_stored_run_can_be_drawn_again(path, tmp_path, capsys):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert main(["plot", str(copy)]) == 0
    picture = pathlib.Path(capsys.readouterr().out.strip())
    assert picture == copy.with_suffix(".png")
    assert picture.stat().st_size > 10_000
    report = harness.read_report(path)
    assert_readable(plots.draw(report), report["environment"])


def test_a_gpu_run_is_drawn_under_its_roof_without_those_who_failed(gpu_report):
    figure = plots.draw(gpu_report)
    assert_readable(figure, gpu_report["environment"])
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["ferrum_jax", "torch SDPA, dense", "plain copy, read + written"]
    (axes,) = figure.axes
    assert set(np.asarray(axes.lines[-1].get_ydata())) == {2000}


def test_attention_is_drawn_under_the_roof_of_a_plain_read():
    report = harness.read_report(page.RESULTS / "attention-cpu.json")
    shape = {key: report["figures"][0][key] for key in ("heads", "dtype")}
    figures = [
        {**shape, "contestant": name, "gigabytes_per_second": speed}
        for name, speed in (("paged", 9.0), ("dense", 6.0), ("plain read", 21.0))
    ]
    (axes,) = plots.draw({**report, "figures": figures}).axes
    (roof,) = axes.lines
    assert set(np.asarray(roof.get_xdata())) == {21} and axes.get_xlim()[1] > 21
    assert {text.get_text() for text in axes.texts} == {"9", "6", ""}


def test_a_report_of_an_unknown_benchmark_is_not_drawn(gpu_report):
    with pytest.raises(ValueError, match="'nothing'.*allocator"):
        plots.draw({**gpu_report, "benchmark": "nothing"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plot {}/other.json", "not a benchmark's report"),
        ("prefix --plot {}/x.png", "pip install matplotlib"),
        ("prefix --json {}/none/x.json", "there is no folder"),
        ("all --quick --refresh", "not kept"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    monkeypatch, capsys, tmp_path, words, message
):
    monkeypatch.setattr(plots, "is_available", lambda: "--plot" not in words)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SystemExit):
        main(words.replace("{}", str(tmp_path)).split())
    assert message in capsys.readouterr().err


def test_the_page_shows_the_stored_runs_and_all_benchmarks():
    text = page.PAGE.read_text(encoding="utf-8")
    # Where this fails, run `python -m benchmarks page`.
    assert page.render(text) == text
    for path in STORED:
        assert f"]({path.stem}.png)" in text and page.PAGE.with_name(f"{path.stem}.png").is_file()
    for name in CATALOGUE:
        assert f"<!-- results: {name} -->" in text and f"python -m benchmarks {name}" in text


def test_the_page_takes_its_tables_from_the_stored_runs(monkeypatch, tmp_path, gpu_report):
    marked = "Before.\n<!-- results: gpu_attention -->\nold\n<!-- end -->\nAfter.\n"
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    assert "No run of it is kept" in page.render(marked)
    gpu_report["environment"]["load_average_before"] = [0.25, 0.0, 0.0]
    (tmp_path / "gpu_attention-h100.json").write_text(json.dumps(gpu_report))
    text = page.render(marked)
    assert text.startswith("Before.\n") and text.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in text and "NVIDIA H100" in text
    assert "| 9/3/64 | 16 | 1,024 | 0.75 | 0.35 |  |" in text


def test_all_leaves_out_what_does_not_fit_the_machine_and_says_why():
    steps = {step.stem: step for step in plan(CPU, None, quick=True)}
    assert {step.name for step in steps.values()} == set(CATALOGUE)
    assert "it is for a GPU" in str(steps["gpu_attention-cpu"].why_not)
    assert "--trace FILE" in str(steps["replay-cpu"].why_not)
    assert steps["generate-cpu-bfloat16"].options == ["--dtype", "bfloat16", "--quick"]
    for name in ("allocator", "attention", "compression", "groups", "prefix", "tiers"):
        assert steps[f"{name}-cpu"].why_not is None


def test_all_replays_a_trace_that_is_named_and_runs_on_a_gpu_what_is_for_one(trace):
    device = ("gpu", "NVIDIA H100 80GB HBM3")
    steps = {step.name: step for step in plan(device, trace, quick=False)}
    assert steps["gpu_attention"].stem == "gpu_attention-nvidia-h100-80gb-hbm3"
    assert steps["gpu_attention"].why_not is None
    assert "it is for a CPU" in str(steps["attention"].why_not)
    assert steps["replay"].options == ["--trace", str(trace)] and steps["replay"].why_not is None


def test_one_command_runs_keeps_and_shows_all(trace, tmp_path, monkeypatch, capsys):
    replay = dataclasses.replace(CATALOGUE["replay"], runs={"": ("--capacity", "4", "8")})
    monkeypatch.setattr("benchmarks.__main__.CATALOGUE", {"replay": replay})
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text("<!-- results: replay -->\n<!-- end -->\n")
    assert main(["all", "--refresh", "--trace", str(trace)]) == 0
    (report,) = page.RESULTS.iterdir()
    assert report.suffix == ".json"
    assert (tmp_path / f"{report.stem}.png").is_file()
    assert f"]({report.stem}.png)" in page.PAGE.read_text()
    assert "| optimum | " in page.PAGE.read_text()
    assert re.search(rf"^{report.stem} +\d+ seconds$", capsys.readouterr().out, re.M)


def test_a_benchmark_that_fails_is_named_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__._device", lambda: CPU)
    monkeypatch.setattr("benchmarks.__main__.CATALOGUE", {"replay": CATALOGUE["replay"]})
    assert main(["all", "--out", str(tmp_path), "--trace", str(tmp_path / "none")]) == 1
    assert re.search(r"^replay-cpu +failed with status \d$", capsys.readouterr().out, re.M)


def test_the_commit_is_told_and_whether_the_code_differs_from_it(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    code, results = tmp_path / "benchmarks" / "harness.py", tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    code.write_text("one")
    assert harness.commit(tmp_path) == "unknown"
    git("init")
    assert harness.commit(tmp_path) == "unknown"  # It lies in a checkout that does not know it.
    git("add", ".")
    git("commit", "-m", "One")
    commit = harness.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (results / "x.json").write_text("{}")
    assert harness.commit(tmp_path) == commit
    code.write_text("two")
    assert harness.commit(tmp_path) == f"{commit} dirty"


def test_without_tqdm_progress_is_told_in_lines(monkeypatch, capsys):
    monkeypatch.setattr(harness, "_import_tqdm", lambda: None)
    monkeypatch.setattr(harness, "_SECONDS_BETWEEN_LINES", 0.0)
    assert list(harness.progress(range(3), "round")) == [0, 1, 2]
    assert capsys.readouterr().err.splitlines()[-1] == "round 3 of 3"
    harness.say("a table")
    assert capsys.readouterr().out == "a table\n"


def test_the_roofs_go_on_to_other_bytes_at_every_call(monkeypatch):
    array, seen = np.arange(1 << 12, dtype=np.int32), []
    monkeypatch.setattr("benchmarks.bandwidth.np.max", lambda part: seen.append(part))
    read = memory_roofs([array], num_bytes=1 << 12)["plain read"]
    for _ in range(4):
        read()
    assert sum(part.nbytes for part in seen) == array.nbytes
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), array)


def test_roofs_over_less_than_they_are_to_read_are_refused():
    with pytest.raises(ValueError, match="the arrays hold 64 bytes"):
        memory_roofs([np.zeros(16, np.int32)], num_bytes=1 << 12)
