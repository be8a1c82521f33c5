"""Weights of a model, read from a GGUF file or a Hugging Face folder."""

import concurrent.futures
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.models import inputs, model_config
from examples.models import tokenizer as tokenizer_lib
from examples.models.gemma3 import Gemma3Config
from examples.models.shape import ModelConfig
from ferrum_jax.memory import use_huge_pages

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
GEMMA3_TENSOR_NAMES = TENSOR_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# The tensors of a layer by the parameter that stacks them, under their Hugging Face names.
LAYER_TENSORS = {
    "attention_norm.scale": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm.scale": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
HEAD_NORM_TENSORS = {
    "attention.q_norm.scale": ("self_attn.q_norm",),
    "attention.k_norm.scale": ("self_attn.k_norm",),
}
GEMMA3_LAYER_TENSORS = LAYER_TENSORS | {
    "attention_out_norm.scale": ("post_attention_layernorm",),
    "mlp_norm.scale": ("pre_feedforward_layernorm",),
    "mlp_out_norm.scale": ("post_feedforward_layernorm",),
}
DAMAGED = "Download the model again, or pass another one."
IGNORED_TENSORS = ("rope_freqs.weight", "rotary_emb.inv_freq")

Loaded = tuple[ModelConfig, dict[str, Any], tokenizer_lib.Tokenizer]
Reader = Callable[[str], np.ndarray]


def load(path: str | pathlib.Path, dtype: DTypeLike = jnp.float32) -> Loaded:
    """Reads a model of the Llama family (Llama, Mistral, Qwen 3), or a Gemma 3.

    Args:
      path: A GGUF file, or a folder with config.json, model*.safetensors and tokenizer.json.
      dtype: Type of the weights in memory.

    Returns:
      `(config, params, tokenizer)`; `params` is a nested dict for
      `families.from_params`.

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
            # A memory map takes long to slice, and a vocabulary is 500,000 slices.
            self.data = np.asarray(self.data)
            return super()._get(offset, dtype, count, override_order)

    with inputs.foreign("reading the GGUF file", DAMAGED):
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        is_gemma3 = fields.get("general.architecture") == "gemma3"
        names = GEMMA3_TENSOR_NAMES if is_gemma3 else TENSOR_NAMES
        tensors = {_folder_name(tensor.name, names): tensor for tensor in reader.tensors}
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
        if is_gemma3 or not tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            return rows
        # GGUF orders the rows of a Llama's head for RoPE on neighbours; undo it for rotate-half.
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
            tensor = handles[name].get_tensor(name)
        if isinstance(config, Gemma3Config) and name.endswith("norm.weight"):
            return tensor + 1  # Gemma's folders store how far a scale is from 1; GGUF adds it.
        return tensor

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


def _folder_name(name: str, names: Mapping[str, str]) -> str:
    """Translates GGUF's name of a tensor into the one that a safetensors folder uses."""
    if "." not in name:
        return name
    *prefix, stem, kind = name.split(".")
    layer = f"model.layers.{prefix[1]}." if len(prefix) == 2 else ""
    return f"{layer}{names.get(stem, stem)}.{kind}"


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Returns the tensors of a layer by the parameter that stacks them."""
    tensors = GEMMA3_LAYER_TENSORS if isinstance(config, Gemma3Config) else LAYER_TENSORS
    return tensors | HEAD_NORM_TENSORS if config.normalizes_heads else tensors


def _tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors of a model under their Hugging Face names, with their shapes."""
    q_width, kv_width = (n * config.head_dim for n in (config.num_q_heads, config.num_kv_heads))
    width, inner = config.width, config.mlp_width
    shapes = {
        "self_attn.q_proj": (q_width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, q_width),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    yield "model.norm.weight", (width,)
    if not config.ties_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)
    for index in range(config.num_layers):
        for names in _layer_tensors(config).values():
            for name in names:
                yield f"model.layers.{index}.{name}.weight", shapes.get(name, (width,))


def _check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if the tensors are not those that the config describes."""
    used: set[str] = set()
    for name, shape in _tensor_shapes(config):
        if name not in shapes:
            raise ValueError(
                f"The model has no tensor {name}. Its file is incomplete, or of another family "
                "than its config."
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
            "Choose a Llama, Mistral, Qwen 3 or Gemma 3 without biases or adapters."
        )


def assemble(config: ModelConfig, read: Reader, dtype: DTypeLike) -> dict[str, Any]:
    """Builds the nested parameters from tensors under their Hugging Face names.

    Args:
      config: Shape of the model.
      read: Returns the tensor of a name such as "model.norm.weight", in the shape that `config`
        describes.
      dtype: Type of the weights in memory.

    Returns:
      A nested dict for `families.from_params`.
    """

    def weight(*names: str) -> Any:
        """The named matrices, one under the other."""
        return jnp.asarray(np.concatenate([read(f"{name}.weight") for name in names]), dtype)

    def layer(index: int) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for path, names in _layer_tensors(config).items():
            *modules, name = path.split(".")
            place = params
            for module in modules:
                place = place.setdefault(module, {})
            place[name] = weight(*(f"model.layers.{index}.{tensor}" for tensor in names))
        return params

    with concurrent.futures.ThreadPoolExecutor() as threads:
        params = {
            "embedding": weight("model.embed_tokens"),
            "layers": dict(enumerate(threads.map(layer, range(config.num_layers)))),
            "norm": {"scale": weight("model.norm")},
        }
    if not config.ties_embeddings:
        params["head"] = weight("lm_head")
    return use_huge_pages(params)
