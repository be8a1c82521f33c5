"""A tiny Llama in the file formats of real ones, and its forward pass in plain numpy."""

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
    return {
        f"{name}.weight": rng.normal(float(len(shape) == 1), 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def rope_frequencies(fields):
    """Rotary frequencies, stretched as Llama 3.1 does where the fields say so."""
    half = fields["head_dim"] // 2
    frequencies = fields["rope_theta"] ** (-np.arange(half) / half)
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
    head_dim, half = fields["head_dim"], fields["head_dim"] // 2
    n = len(token_ids)
    angles = np.arange(n)[:, None] * rope_frequencies(fields)
    turns = np.exp(1j * angles)[:, None]
    seen = np.tri(n, dtype=bool)
    if (window := fields.get("sliding_window")) is not None:
        seen &= ~np.tri(n, k=-window, dtype=bool)

    def norm(x, name):
        scale = np.sqrt((x**2).mean(1, keepdims=True) + fields["rms_norm_eps"])
        return x / scale * weight[name]

    def turned(x):
        pairs = (x[..., :half] + 1j * x[..., half:]) * turns
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = weight["model.embed_tokens"][token_ids]
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (
            (h @ weight[f"{prefix}.self_attn.{y}_proj"].T).reshape(n, -1, head_dim) for y in "qkv"
        )
        q, k = turned(q), turned(k)
        k, v = (np.repeat(y, q.shape[1] // y.shape[1], axis=1) for y in (k, v))
        scores = np.where(seen, np.einsum("thd,shd->hts", q, k) / np.sqrt(head_dim), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v)
        x = x + out.reshape(n, -1) @ weight[f"{prefix}.self_attn.o_proj"].T
        h = norm(x, f"{prefix}.post_attention_layernorm")
        gate, up = (h @ weight[f"{prefix}.mlp.{y}_proj"].T for y in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight[f"{prefix}.mlp.down_proj"].T
    return norm(x, "model.norm") @ weight.get("lm_head", weight["model.embed_tokens"]).T


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
