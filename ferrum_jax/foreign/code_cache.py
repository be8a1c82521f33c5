"""Machine code on disk, so that a later process neither compiles it nor imports numba.

A file's name has a digest of all that the code depends on: processor, versions, and the sources.
The file is a digest of that and of the rest, a line of the names that the code expects, and the
code. A file that cannot be used is as good as none, and so is a folder.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import tempfile

import llvmlite.binding
import numpy as np

from ferrum_jax.foreign.function import CodePart
from ferrum_jax.foreign.machine_code import MachineCode

FOLDER_VARIABLE = "FERRUM_JAX_CACHE_DIR"
"""Environment variable that names the folder; empty for none."""

_MAX_FILES = 32  # Of about 40 KB; older ones are deleted.
_PREFIX = "foreign_"


def read(part: CodePart) -> MachineCode | None:
    """Returns the code of a part, or None if there is none that can be used."""
    with contextlib.suppress(Exception):  # Whatever is wrong, compiling is the remedy.
        path, key = _path_and_key(part)
        with open(path, "rb") as file:
            is_trusted = _is_trusted(os.fstat(file.fileno()))
            digest, _, rest = file.read().partition(b"\n")
        if is_trusted and digest == _digest(key, rest):
            names, _, object_file = rest.partition(b"\n")
            code = MachineCode(object_file, tuple(json.loads(names)))
            return code if code.can_be_loaded else None
    return None


def is_kept() -> bool:
    """Returns whether there is a folder to keep code in; makes it."""
    with contextlib.suppress(Exception):
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    return False


def keep(part: CodePart, code: MachineCode) -> None:
    """Writes the code of a part, if that can be done; deletes the oldest files."""
    with contextlib.suppress(Exception):  # A later process compiles it again.
        path, key = _path_and_key(part)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        rest = json.dumps(code.names).encode() + b"\n" + code.object_file
        # Another process may write the same file.
        handle, unfinished = tempfile.mkstemp(prefix=_PREFIX, dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(_digest(key, rest) + b"\n" + rest)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
        files = path.parent.glob(f"{_PREFIX}*")
        for old in sorted(files, key=lambda file: file.stat().st_mtime)[:-_MAX_FILES]:
            old.unlink()


def _path_and_key(part: CodePart) -> tuple[pathlib.Path, bytes]:
    """Returns the path of a file, and all that its code depends on."""
    modules = "ferrum_jax.foreign", "ferrum_jax.arithmetic", *part.sources
    sources = [source for module in modules for source in _sources_of(module)]
    key = [
        part.name,
        llvmlite.binding.get_process_triple(),
        llvmlite.binding.get_host_cpu_name(),
        llvmlite.binding.get_host_cpu_features().flatten(),
        sys.version,
        np.__version__,
        [importlib.metadata.version(name) for name in ("numba", "llvmlite")],
        sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_")),
        [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources],
    ]
    encoded = json.dumps(key).encode()
    name = f"{_PREFIX}{part.name}_{hashlib.sha256(encoded).hexdigest()[:32]}"
    return _folder() / name, encoded


def _sources_of(module: str) -> list[pathlib.Path]:
    """Returns the files of a package, or that of a module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{module} has no source: its code is not kept.")
    file = pathlib.Path(spec.origin)
    return [file] if spec.submodule_search_locations is None else sorted(file.parent.glob("*.py"))


def _folder() -> pathlib.Path:
    """Returns the folder of the files; raises FileNotFoundError if there shall be none."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen == "":
        raise FileNotFoundError(f"{FOLDER_VARIABLE} is empty: no code is kept.")
    if chosen is not None:
        return pathlib.Path(chosen)
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else pathlib.Path.home() / ".cache") / "ferrum_jax"


def _is_trusted(status: os.stat_result) -> bool:
    """Returns whether only this user, or the system's, can have written a file."""
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _digest(key: bytes, rest: bytes) -> bytes:
    return hashlib.sha256(key + b"\n" + rest).hexdigest().encode()
