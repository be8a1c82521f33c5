"""Code that another process compiles: it is waited for, and if it fails, this one compiles."""

import concurrent.futures
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from ferrum_jax import foreign
from ferrum_jax.attention import prepare_kernels
from ferrum_jax.foreign import code_cache, compiler
from ferrum_jax.foreign.function import CodePart, ForeignFunction
from ferrum_jax.foreign.machine_code import MachineCode

HERE = MachineCode(b"compiled by the tests' process", ())
PART = CodePart("part", "tests.foreign.slow_part", ("tests.foreign.slow_part",))
FUNCTION = ForeignFunction("function", (CodePart("other", "tests.foreign", ()), PART), "Testing")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(code_cache.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(compiler, "_compiling", {})
    return tmp_path


@pytest.fixture
def compiles_here(monkeypatch):
    """Has this process compile otherwise than another one."""
    from tests.foreign import slow_part

    monkeypatch.setattr(slow_part, "compile_part", lambda name: HERE)


def test_the_other_process_is_waited_for(folder, compiles_here):
    foreign.start_to_prepare(FUNCTION)
    foreign.start_to_prepare(FUNCTION)
    (process,) = compiler._compiling.values()
    assert process.poll() is None and not list(folder.iterdir())
    assert compiler.machine_code(PART).object_file == b"part by another process"
    assert process.poll() == 0
    compiler.start(PART)  # It is on disk.
    assert not compiler._compiling


FAILURES = {
    "it ends with an error": ["-c", "raise SystemExit(3)"],
    "it never ends": ["-c", "import time; time.sleep(60)"],
    "it leaves nothing": ["-c", ""],
}


@pytest.mark.parametrize("failure", FAILURES)
def test_if_it_fails_this_process_compiles(failure, compiles_here, monkeypatch):
    monkeypatch.setattr(compiler, "_MOST_SECONDS", 0.1)
    process = subprocess.Popen([sys.executable, *FAILURES[failure]])
    compiler._compiling[PART.name] = process
    started = time.monotonic()
    assert compiler.machine_code(PART) == HERE == code_cache.read(PART)
    assert time.monotonic() - started < 30 and not compiler._compiling
    assert process.returncode is not None  # It has ended, and was waited for.


def test_many_threads_start_one_process(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(1) or start(*args, **kwargs)
    )
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(compiler.start, [PART] * 32))
    assert len(started) == 1
    (process,) = compiler._compiling.values()
    compiler._end_all()  # As when Python ends.
    assert process.returncode is not None and not compiler._compiling


def test_an_interrupted_wait_can_be_repeated(compiles_here, monkeypatch):
    compiler.start(PART)
    (process,) = compiler._compiling.values()
    with monkeypatch.context() as patch:
        patch.setattr(process, "wait", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compiler.machine_code(PART)
    assert compiler.machine_code(PART).object_file == b"part by another process"


@pytest.mark.parametrize("absent", ["program", "Python", "folder", "room"])
def test_where_no_process_can_be_started_this_one_compiles(absent, compiles_here, monkeypatch):
    if absent == "program":
        monkeypatch.setattr(sys, "executable", "/no/such/python")
    elif absent == "Python":
        monkeypatch.setattr(sys, "executable", None)
    elif absent == "folder":
        monkeypatch.setenv(code_cache.FOLDER_VARIABLE, "")
    else:  # The folder is a file.
        monkeypatch.setenv(code_cache.FOLDER_VARIABLE, __file__)
    compiler.start(PART)
    assert not compiler._compiling
    assert compiler.machine_code(PART) == HERE


def test_prepare_kernels_starts_the_part_of_the_dtype(monkeypatch):
    started = []
    monkeypatch.setattr(compiler, "start", lambda part: started.append(part.name))
    for dtype in ("float32", jnp.bfloat16, "int8"):  # The kernel takes no int8.
        prepare_kernels(dtype)
    assert started == ["attention_float32", "attention_bfloat16"]
    monkeypatch.setattr(foreign, "_has_numba", lambda: False)
    prepare_kernels("float32")
    assert len(started) == 2
    with pytest.raises(TypeError, match="not understood"):
        prepare_kernels("float33")
