"""A tiny random model of each family of the examples."""

import functools

from flax import nnx

from examples.models import families
from examples.models.gemma3 import Gemma3Config
from examples.models.gemma4 import Gemma4Config
from examples.models.gpt_oss import GptOssConfig
from examples.models.llama import LlamaConfig
from tests.support.tiny_model import random_module

SIZES = {"vocab_size": 61, "width": 24, "num_q_heads": 4, "mlp_width": 40}
HEADS = {"num_kv_heads": 2, "head_dim": 8}
CONFIGS = {
    "qwen3": LlamaConfig(**SIZES, **HEADS, num_layers=2, normalizes_heads=True),
    "gemma3": Gemma3Config(**SIZES, **HEADS, num_layers=3, sliding_window=5, full_layers=(2,)),
    "gpt-oss": GptOssConfig(
        **SIZES,
        **HEADS,
        num_layers=2,
        sliding_window=4,
        full_layers=(1,),
        num_experts=3,
        num_used_experts=2,
    ),
    "gemma4": Gemma4Config(
        **SIZES,
        **HEADS,
        num_layers=6,
        sliding_window=5,
        full_layers=(1, 3, 5),
        num_global_kv_heads=1,
        global_head_dim=16,
        num_kv_shared_layers=2,
    ),
}


@functools.cache
def tiny_model(config):
    """Returns `(model_fn, params)` of a config, with the same weights for equal shapes."""
    return families.functional(random_module(lambda: families.init_model(config, rngs=nnx.Rngs(0))))
