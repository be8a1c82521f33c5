"""A tiny Llama, Qwen 3 or Gemma 3 in the file formats of real ones, and its forward in numpy."""

import json

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from examples.models import weights

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *ALPHABET, "ab", "Ġab"]
MERGES = [("a", "b"), ("Ġ", "ab")]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_config(**changes):
    """Fields of a tiny config.json."""
    return {
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        **changes,
    }


def gemma3_config(**changes):
    """Fields of a tiny config.json of Gemma 3."""
    return hf_config(
        model_type="gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        num_hidden_layers=3,
        query_pre_attn_scalar=16,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_theta=1000.0,
        rope_local_base_freq=100.0,
        **changes,
    )


def random_tensors(fields, seed=0):
    """Every tensor of the model that `fields` describes, by its Hugging Face name."""
    rng = np.random.default_rng(seed)
    width, inner = fields["hidden_size"], fields["intermediate_size"]
    q_width = fields["num_attention_heads"] * fields["head_dim"]
    kv_width = fields["num_key_value_heads"] * fields["head_dim"]
    shapes = {"model.embed_tokens": (fields["vocab_size"], width), "model.norm": (width,)}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head"] = (fields["vocab_size"], width)
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm": (width,),
            f"{prefix}.self_attn.q_proj": (q_width, width),
            f"{prefix}.self_attn.k_proj": (kv_width, width),
            f"{prefix}.self_attn.v_proj": (kv_width, width),
            f"{prefix}.self_attn.o_proj": (width, q_width),
            f"{prefix}.post_attention_layernorm": (width,),
            f"{prefix}.mlp.gate_proj": (inner, width),
            f"{prefix}.mlp.up_proj": (inner, width),
            f"{prefix}.mlp.down_proj": (width, inner),
        }
        if fields["model_type"] in ("qwen3", "gemma3_text"):
            head_dim = fields["head_dim"]
            shapes |= {f"{prefix}.self_attn.{x}_norm": (head_dim,) for x in "qk"}
        if fields["model_type"] == "gemma3_text":
            shapes |= {f"{prefix}.{x}_feedforward_layernorm": (width,) for x in ("pre", "post")}
    return {
        f"{name}.weight": rng.normal(float(len(shape) == 1), 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def rope_frequencies(fields, is_local=False):
    """Rotary frequencies, stretched as Llama 3.1 does where the fields say so."""
    half = fields["head_dim"] // 2
    base = fields["rope_local_base_freq" if is_local else "rope_theta"]
    frequencies = base ** (-np.arange(half) / half)
    if (rope := fields.get("rope_scaling")) is None:
        return frequencies
    wavelengths = 2 * np.pi / frequencies
    original = rope["original_max_position_embeddings"]
    smooth = (original / wavelengths - rope["low_freq_factor"]) / (
        rope["high_freq_factor"] - rope["low_freq_factor"]
    )
    between = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
    long = wavelengths > original / rope["low_freq_factor"]
    short = wavelengths < original / rope["high_freq_factor"]
    return np.where(long, frequencies / rope["factor"], np.where(short, frequencies, between))


def reference_logits(fields, tensors, token_ids):
    """The forward pass in float64, without a cache: logits [tokens, vocab_size]."""
    weight = {name.removesuffix(".weight"): x.astype(np.float64) for name, x in tensors.items()}
    is_gemma = fields["model_type"] == "gemma3_text"
    x = weight["model.embed_tokens"][token_ids]
    if is_gemma:  # Its files store how far the scales of norms are from 1.
        weight = {name: x + name.endswith("norm") for name, x in weight.items()}
        x = x * fields["hidden_size"] ** 0.5

    def norm(x, name):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + fields["rms_norm_eps"])
        return x / scale * weight[name]

    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm")
        h = _reference_attention(fields, weight, layer, h, norm)
        x = x + (norm(h, f"{prefix}.post_attention_layernorm") if is_gemma else h)
        before = "pre_feedforward_layernorm" if is_gemma else "post_attention_layernorm"
        h = norm(x, f"{prefix}.{before}")
        gate, up = (h @ weight[f"{prefix}.mlp.{y}_proj"].T for y in ("gate", "up"))
        if is_gemma:
            gate = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
        else:
            gate = gate / (1 + np.exp(-gate))
        h = (gate * up) @ weight[f"{prefix}.mlp.down_proj"].T
        x = x + (norm(h, f"{prefix}.post_feedforward_layernorm") if is_gemma else h)
    return norm(x, "model.norm") @ weight.get("lm_head", weight["model.embed_tokens"]).T


def _reference_attention(fields, weight, layer, h, norm):
    n, head_dim, half = len(h), fields["head_dim"], fields["head_dim"] // 2
    types = fields.get("layer_types")
    is_local = types is not None and types[layer] == "sliding_attention"
    has_window = fields.get("use_sliding_window", True) if types is None else is_local
    window = fields.get("sliding_window") if has_window else None
    turns = np.exp(1j * np.arange(n)[:, None] * rope_frequencies(fields, is_local))[:, None]
    seen = np.tri(n, dtype=bool)
    if window is not None:
        seen &= ~np.tri(n, k=-window, dtype=bool)

    def turned(x):
        pairs = (x[..., :half] + 1j * x[..., half:]) * turns
        return np.concatenate([pairs.real, pairs.imag], -1)

    prefix = f"model.layers.{layer}.self_attn"
    q, k, v = ((h @ weight[f"{prefix}.{y}_proj"].T).reshape(n, -1, head_dim) for y in "qkv")
    if f"{prefix}.q_norm" in weight:
        q, k = norm(q, f"{prefix}.q_norm"), norm(k, f"{prefix}.k_norm")
    q, k = turned(q), turned(k)
    k, v = (np.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
    scale = fields.get("query_pre_attn_scalar", head_dim) ** -0.5
    scores = np.where(seen, np.einsum("thd,shd->hts", q, k) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v)
    return out.reshape(n, -1) @ weight[f"{prefix}.o_proj"].T


def write_folder(folder, fields, tensors, num_shards=1):
    """Writes a Hugging Face model folder."""
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(tensors)
    shards = {
        f"model-{i}.safetensors" if num_shards > 1 else "model.safetensors": names[i::num_shards]
        for i in range(num_shards)
    }
    for file, held in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file)
    if num_shards > 1:
        places = {name: file for file, held in shards.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        (folder / "model-old.safetensors").write_bytes(b"not in the index")
    bpe = models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES)
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(TOKENS[:1])
    backend.save(str(folder / "tokenizer.json"))


def write_gguf(path, fields, tensors, *, quantised=()):
    """Writes a GGUF file, Q and K permuted as its convention asks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_rope_freq_base(fields["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_eos_token_id(0)
    folder_names = {hf: name for name, hf in weights.TENSOR_NAMES.items()}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if "q_proj" in stem or "k_proj" in stem:
            halves = tensor.reshape(-1, 2, fields["head_dim"] // 2, tensor.shape[1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            target = f"blk.{layer}.{folder_names[stem]}.weight"
        else:
            target = f"{folder_names[stem]}.weight"
        if name in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            tensors[name] = gguf.dequantize(gguf.quantize(tensor, kind), kind)
            writer.add_tensor(target, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
