"""The benchmark of attention on a GPU loses little when something fails, and ends in time."""

import contextlib
import sys
import types
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_attention, gpu_contestants, harness, plots
from benchmarks.gpu_contestants import HEADS, Case, Contestant, call_of, captured, numbers
from ferrum_jax.codecs import rotate
from ferrum_jax.types import TokenFormat


@pytest.fixture
def gpu_run(monkeypatch, tmp_path):
    """Runs gpu_attention on two small shapes, with contestants and a clock that stand still."""

    def run(builders, *options, difference=lambda case, interpret: 0.0):
        shapes = [Case(heads="9/3/64", rows=rows, context=40, cold_bytes=1) for rows in (1, 2)]
        monkeypatch.setattr(gpu_attention, "cases", lambda args: shapes)
        monkeypatch.setattr(gpu_attention, "contestants", lambda interpret: builders)
        monkeypatch.setattr(gpu_attention, "copy_bandwidth", lambda small: 1e12)
        monkeypatch.setattr(
            gpu_attention, "free_memory", lambda: None
        )  # A second, among all tests.
        monkeypatch.setattr(gpu_attention, "difference", difference)
        path = tmp_path / "gpu.json"
        gpu_attention.main(["--interpret", "--json", str(path), *options])
        return harness.read_report(path)["figures"]["figures"]

    return run


def ready(case):
    return Contestant(lambda times: None)


@pytest.mark.slow  # Compiles for half a minute; `test_gpu.py` interprets the kernel.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_the_gpu_script_runs_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_attention, "_COMPRESSED", ())  # Takes half a minute more to compile.
    path = tmp_path / "gpu.json"
    gpu_attention.main(["--interpret", "--json", str(path)])
    report = harness.read_report(path)
    figures = {figure["contestant"]: figure for figure in report["figures"]["figures"]}
    assert figures["ferrum_jax"]["difference_from_xla"] < 0.01
    assert figures["ferrum_jax, XLA"]["launched"] == "in one program"
    assert "cuDNN" in figures["jax.nn (cuDNN), dense"]["failed"]
    assert plots.draw(report).axes


@pytest.mark.parametrize("token_format", [TokenFormat.Int8, TokenFormat.Int8Int4])
def test_gpu_batches_are_packed_from_numbers_as_those_that_are_not(token_format, monkeypatch):
    # On a CPU XLA computes with bfloat16 in float32, where words that look like NaN are lost.
    # Those of float16 are the same words.
    monkeypatch.setattr(gpu_contestants, "_DTYPE", jnp.float16)
    case = Case(heads="9/3/64", rows=2, context=40, token_format=token_format.name, cold_bytes=1)
    assert case.layout is not None
    pool = call_of(case).pool
    halves = (jnp.asarray(np.asarray(x).view(np.uint16)) for x in pool.arrays.values())
    kv = case.layout.decode(*halves)
    for seed, (x, layout) in enumerate(zip(kv, (case.layout.k, case.layout.v), strict=True)):
        want = numbers(x.shape, seed).astype(jnp.float32)
        error = jnp.abs((rotate(x) if layout.is_rotated else x) - want)
        assert float(error.max()) < (0.5 if layout.is_rotated else 0.01)


def test_what_fails_on_a_gpu_costs_one_figure(gpu_run):
    def broken(case):
        raise RuntimeError("an illegal address\nand much more")

    def difference(case, interpret):
        if case.rows == 1 and case.token_format == "Int8":
            raise ValueError("no result")
        return 0.5

    figures = gpu_run({"ferrum_jax": ready, "a": broken, "b": ready}, difference=difference)
    # Ours on all shapes, then the others.
    names = [["ferrum_jax", "ferrum_jax, Int8"], "ab"]
    order = [(rows, name) for part in names for rows in (1, 2) for name in part]
    assert [(figure["rows"], figure["contestant"]) for figure in figures] == order
    failed = [figure.get("failed") for figure in figures if figure["contestant"] == "a"]
    assert failed == ["RuntimeError: an illegal address"] * 2
    assert all(figure["of_copy"] > 0 for figure in figures if figure["contestant"] != "a")
    assert figures[1]["check_failed"] == "ValueError: no result"
    assert all(figure["difference_from_xla"] == 0.5 for figure in (figures[0], *figures[2:4]))


def test_after_every_shape_the_gpu_figures_are_on_disk(gpu_run, tmp_path):
    def killed(case):
        if case.rows == 2:
            raise KeyboardInterrupt
        return ready(case)

    with pytest.raises(KeyboardInterrupt):
        gpu_run({"ferrum_jax": killed})
    figures = harness.read_report(tmp_path / "gpu.json")["figures"]
    names = [figure["contestant"] for figure in figures["figures"]]
    assert names == ["ferrum_jax", "ferrum_jax, Int8"]


def test_out_of_time_no_other_contestant_starts(gpu_run, monkeypatch, capsys):
    now = 100.0

    def slow(case):
        nonlocal now
        now += 10.0
        return ready(case)

    clock = types.SimpleNamespace(
        monotonic=lambda: now, perf_counter=gpu_attention.time.perf_counter
    )
    monkeypatch.setattr(gpu_attention, "time", clock)
    figures = gpu_run({"ferrum_jax": ready, "a": slow, "b": slow}, "--limit-seconds", "25")
    slow_ones = [(figure["rows"], figure["contestant"]) for figure in figures[4:]]
    assert slow_ones == [(1, "a"), (1, "b"), (2, "a")]  # The last one began after 20 seconds.
    assert "out of time" in capsys.readouterr().out


def test_what_had_no_memory_is_not_tried_on_a_larger_shape(gpu_run):
    tried = []

    def large(case):
        tried.append(case.rows)
        raise MemoryError("Out of memory: 1 TiB")

    figures = gpu_run({"ferrum_jax": ready, "a": large})
    assert tried == [1]
    assert "not tried" in figures[-1]["failed"] and figures[-1]["rows"] == 2


def test_a_program_runs_fewer_times_the_longer_it_takes(monkeypatch):
    def times_run(seconds):
        now, calls = 0.0, []

        def run(times):
            nonlocal now
            calls.append(times)
            now += times * seconds

        clock = types.SimpleNamespace(perf_counter=lambda: now)
        monkeypatch.setattr(gpu_attention, "time", clock)
        samples = gpu_attention.sampled(run)
        np.testing.assert_allclose(samples, seconds)
        assert len(samples) <= len(calls)
        return sum(calls), len(samples)

    assert times_run(2.0) == (1, 1)
    assert times_run(0.5) == (5, 3)
    assert times_run(0.001) == (2 + 10 * 20, 10)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("context", [1024, 8192, 32768])
@pytest.mark.parametrize("rows", [1, 16, 64, 256])
def test_gpu_batches_pass_by_the_gpus_cache_and_fit_its_memory(heads, context, rows):
    for token_format in ("Native", "Int8"):
        case = Case(heads=heads, rows=rows, context=context, token_format=token_format)
        assert case.copies * case.live_bytes >= 3 * 50 << 20
        assert case.copies * case.loops <= 512
        assert case.pool_bytes < 30 << 30


@pytest.mark.parametrize("breaks", [False, True])
def test_a_cuda_graph_keeps_what_it_reads_and_one_that_breaks_is_done_without(monkeypatch, breaks):
    replays, calls = [], []

    @contextlib.contextmanager
    def graph(it, capture_error_mode):
        yield
        if breaks:
            raise RuntimeError("not permitted\nwhen capturing")

    cuda = types.SimpleNamespace(
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: replays.append(1)),
        Stream=lambda: None,
        graph=graph,
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda: None,
    )
    torch = types.SimpleNamespace(cuda=cuda, inference_mode=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "torch", torch)

    class Keys:
        pass

    case, copies = Case(heads="9/3/64", rows=1, context=40, cold_bytes=1), [Keys()]
    kept = weakref.ref(copies[0])
    contestant = captured(case, lambda q, copy: calls.append(copy), None, copies)
    del copies
    calls.clear()
    contestant.run(3)
    assert kept() is not None
    if breaks:
        assert contestant.launched == "call by call: not permitted"
        assert len(calls) == 3 * case.loops and not replays
    else:
        assert contestant.launched == "in one graph"
        assert len(replays) == 3 and not calls
