"""Another engine as a worker process of `benchmarks.serve`, in a Python that has it installed.

It imports nothing of this repository. Each line of standard input is a JSON list of prompts and a
number of new tokens; each line of the answer, on standard output, has the seconds of the whole run
and those until each request's first token, if the engine tells.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

Run = Callable[[Sequence[Sequence[int]], int], dict[str, object]]


def vllm(folder: str) -> Run:
    """VLLM's CPU build: continuous batching with prefix caching."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True).llm_engine

    def run(prompts: Sequence[Sequence[int]], num_new: int) -> dict[str, object]:
        engine.reset_prefix_cache()
        options = SamplingParams(
            max_tokens=num_new, temperature=0, ignore_eos=True, detokenize=False
        )
        first: dict[str, float] = {}
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, options)
        while engine.has_unfinished_requests():
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter() - started)
        return {"seconds": time.perf_counter() - started, "first": list(first.values())}

    return run


def transformers(folder: str) -> Run:
    """`generate` of transformers: one padded batch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def run(prompts: Sequence[Sequence[int]], num_new: int) -> dict[str, object]:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        started = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        return {"seconds": time.perf_counter() - started, "first": []}

    return run


def transformers_paged(folder: str) -> Run:
    """`generate_batch` of transformers: continuous batching on its paged cache."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoModelForCausalLM,
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    paged = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512)

    def run(prompts: Sequence[Sequence[int]], num_new: int) -> dict[str, object]:
        options = GenerationConfig(
            max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        inputs = [list(prompt) for prompt in prompts]
        started = time.perf_counter()
        answers = model.generate_batch(
            inputs, generation_config=options, continuous_batching_config=paged
        )
        seconds = time.perf_counter() - started
        assert all(len(answer.generated_tokens) == num_new for answer in answers.values())
        return {"seconds": seconds, "first": []}

    return run


def onednn(folder: str) -> Run:
    """No engine: the model's matrix products by oneDNN, for as many tokens as the prompts have."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        stacked = [
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ]
        weights += [torch.cat([part.weight.data for part in parts]) for parts in stacked]
    head = model.lm_head.weight.data

    def seconds_of(num_tokens: int, num_rows: int, dtype: object) -> float:
        cast = [weight.to(dtype) for weight in (*weights, head)]
        widths = {weight.shape[1] for weight in cast}
        xs = {width: torch.zeros(num_tokens, width, dtype=dtype) for width in widths}
        times = []
        for _ in range(6):
            started = time.perf_counter()
            for weight in cast[:-1]:
                torch.nn.functional.linear(xs[weight.shape[1]], weight)
            torch.nn.functional.linear(xs[head.shape[1]][:num_rows], cast[-1])
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    @torch.inference_mode()
    def run(prompts: Sequence[Sequence[int]], num_new: int) -> dict[str, object]:
        num_tokens = sum(map(len, prompts))
        names = ("float32", "bfloat16")
        return {name: seconds_of(num_tokens, num_new, getattr(torch, name)) for name in names}

    return run


ENGINES = {
    "vllm": vllm,
    "transformers": transformers,
    "transformers_paged": transformers_paged,
    "onednn": onednn,
}


def answer_requests() -> None:
    """Answers requests until the input ends."""
    name, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What the engine prints is not an answer.
    run = ENGINES[name](folder)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    answer_requests()
