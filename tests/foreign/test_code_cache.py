"""Machine code on disk: whatever is wrong with it, the function is compiled."""

import concurrent.futures
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import llvmlite.binding
import pytest

from ferrum_jax.attention import cpu
from ferrum_jax.attention.cpu import helper
from ferrum_jax.foreign import code_cache, compiler
from ferrum_jax.foreign.function import CodePart
from ferrum_jax.foreign.machine_code import MachineCode
from tests.support.attention_problems import problem

CODE = MachineCode(b"machine\ncode", ("malloc",))
OTHER_CODE = MachineCode(b"other code", ())
ROOT = pathlib.Path(__file__).parent.parent.parent


SOURCES = ("ferrum_jax.attention.cpu", "ferrum_jax.attention.softmax")


def named(name):
    return CodePart(name, helper.__name__, SOURCES)


FLOAT32, BFLOAT16 = named("attention_float32"), named("attention_bfloat16")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(code_cache.FOLDER_VARIABLE, str(tmp_path / "new" / "folder"))
    return tmp_path / "new" / "folder"


@pytest.fixture
def file(folder):
    """The file of float32's code."""
    code_cache.keep(FLOAT32, CODE)
    (path,) = folder.iterdir()
    assert code_cache.read(FLOAT32) == CODE
    return path


def test_a_later_process_does_not_import_numba():
    call = problem(block_size=16).call()
    assert (cpu.accepts(call) or cpu.prepare(call)) is None
    (handler, helper_part) = map(code_cache.read, cpu._function(call).parts)
    assert set(handler.names) == {"malloc", "free", "sched_yield"}
    assert set(helper_part.names) == {"free"}
    program = """if True:
        import sys
        from ferrum_jax.attention import paged_attention
        from tests.support.attention_oracle import assert_right
        from tests.support.attention_problems import problem
        p = problem(block_size=16)
        assert_right(paged_attention(**p.arguments(), backend="cpu"), p)
        assert "numba" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def flip(path, place):
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_another(path):
    code_cache.keep(BFLOAT16, CODE)
    (other,) = path.parent.glob("*bfloat16*")
    os.replace(other, path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, 0),
    "bit of names": lambda path: flip(path, 66),
    "last bit": lambda path: flip(path, -1),
    "text": lambda path: path.write_text("no code\n" * 9),
    "absent": lambda path: path.unlink(),
    "folder": replace_by_folder,
    "for other numbers": replace_by_another,
    "written by others": lambda path: path.chmod(0o666),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_damaged_file_the_kernel_is_compiled(damage, file, monkeypatch):
    DAMAGE[damage](file)
    assert code_cache.read(FLOAT32) is None
    monkeypatch.setattr(helper, "compile_part", lambda _: OTHER_CODE)
    assert compiler.machine_code(FLOAT32) == OTHER_CODE
    if not file.is_dir():  # The file was replaced by a good one.
        assert compiler.machine_code(FLOAT32) == code_cache.read(FLOAT32) == OTHER_CODE


def test_code_is_not_loaded_where_a_function_is_missing(folder):
    code_cache.keep(FLOAT32, MachineCode(b"code", ("malloc", "no_such_function")))
    assert list(folder.iterdir()) and code_cache.read(FLOAT32) is None


CHANGES = {
    "processor": (llvmlite.binding, "get_host_cpu_name", lambda: "another"),
    "features": (llvmlite.binding, "get_host_cpu_features", llvmlite.binding.FeatureMap),
    "versions": (importlib.metadata, "version", lambda _: "99"),
    "Python": (sys, "version", "4.0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_code_for_another_processor_or_version_is_not_read(change, file, monkeypatch):
    monkeypatch.setattr(*CHANGES[change])
    assert code_cache.read(FLOAT32) is None


def test_options_of_numba_make_other_code(file, monkeypatch):
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert code_cache.read(FLOAT32) is None


@pytest.mark.parametrize("module", ["ferrum_jax.foreign", "ferrum_jax.arithmetic", *SOURCES])
def test_a_change_of_any_source_makes_other_code(module, file, tmp_path, monkeypatch):
    sources_of = code_cache._sources_of
    copies = [pathlib.Path(shutil.copy(source, tmp_path)) for source in sources_of(module)]
    monkeypatch.setattr(
        code_cache, "_sources_of", lambda name: copies if name == module else sources_of(name)
    )
    assert copies and code_cache.read(FLOAT32) == CODE
    for source in copies:
        text = source.read_text()
        source.write_text(text + "\n")
        assert code_cache.read(FLOAT32) is None, source
        source.write_text(text)
    assert code_cache.read(FLOAT32) == CODE


def test_without_sources_or_home_no_code_is_kept(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(code_cache, "_sources_of", lambda module: [folder / "softmax.pyc"])
        code_cache.keep(FLOAT32, CODE)
    with monkeypatch.context() as patch:
        patch.delenv(code_cache.FOLDER_VARIABLE)
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/proc/no_home"))
        code_cache.keep(FLOAT32, CODE)
        assert code_cache.read(FLOAT32) is None
    assert not folder.exists()


def test_the_folder_is_chosen_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(code_cache.FOLDER_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code_cache.keep(FLOAT32, CODE)
    assert code_cache.read(FLOAT32) is None and not list(tmp_path.iterdir())
    monkeypatch.delenv(code_cache.FOLDER_VARIABLE)
    code_cache.keep(FLOAT32, CODE)
    assert code_cache.read(FLOAT32) == CODE and list((tmp_path / "ferrum_jax").iterdir())


def test_a_folder_that_cannot_be_written_is_as_good_as_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/no/folder", "\0"):
        with monkeypatch.context() as patch:
            patch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path))
            patch.setattr(code_cache, "_folder", lambda folder=folder: pathlib.Path(folder))
            code_cache.keep(FLOAT32, CODE)
            assert code_cache.read(FLOAT32) is None


def test_the_oldest_files_are_deleted(folder):
    for age in range(40):
        code_cache.keep(named(f"old{age}"), CODE)
        (path,) = folder.glob(f"*old{age}_*")
        os.utime(path, (age, age))
    code_cache.keep(FLOAT32, CODE)
    assert len(list(folder.iterdir())) <= 32
    assert code_cache.read(FLOAT32) == code_cache.read(named("old39")) == CODE
    assert code_cache.read(named("old0")) is None


def test_two_processes_may_write_and_read_at_once(folder):
    def keep_and_read(i):
        code_cache.keep(FLOAT32, (CODE, OTHER_CODE)[i % 2])
        return code_cache.read(FLOAT32)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert set(threads.map(keep_and_read, range(100))) == {CODE, OTHER_CODE}
    assert len(list(folder.iterdir())) == 1
