"""Which backend takes a call, and what it says of the calls that it does not take."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax import foreign
from ferrum_jax.attention import (
    AttentionBackend,
    AttentionCall,
    cpu,
    explain_backend,
    gpu,
    paged_attention,
    tpu,
)
from ferrum_jax.codecs import CODECS, CodecEntry
from ferrum_jax.codecs.packed import packed_codec
from ferrum_jax.types import TokenFormat
from tests.support.attention_kernels import abstract_call, described
from tests.support.attention_oracle import assert_right
from tests.support.attention_problems import packed_problem, problem

# Each case is what a call has beside `abstract_call`, and a part of the reason.
REFUSED = {
    gpu: [
        ({"heads": (8, 8, 640)}, "640 numbers; 512 may"),
        ({"dtype": "float8_e4m3fn"}, "queries are float8_e4m3fn"),
        ({"dtype": "uint16", "q_dtype": "float32"}, "pool is uint16"),
        ({"dtype": "int8", "q_dtype": "float32"}, "pool is int8"),
        ({"rows": 0}, "no queries"),
        ({"max_blocks": 0}, "no blocks"),
        ({"block_size": 1, "num_blocks": 1 << 26}, "32-bit"),  # 2**31 vectors.
        ({"max_blocks": (1 << 27) - 1}, "32-bit"),  # Nearly 2**31 tokens.
    ],
    tpu: [
        ({"heads": (8, 8, 640)}, "640 numbers"),
        ({"heads": (8, 8, 36), "block_size": 128}, "36 numbers; a multiple of 8"),
        ({"heads": (9, 3, 64), "block_size": 64}, "heads of 64 need a multiple of 128"),
        ({"block_size": 12}, "blocks have 12 tokens; heads of 128 need a multiple of 8"),
        ({"block_size": 8192}, "1 MiB"),
        ({"dtype": "float16"}, "queries are float16"),
        ({"q_dtype": "float16"}, "queries are float16"),
        ({"dtype": "float8_e4m3fn"}, "queries are float8_e4m3fn"),
        ({"dtype": "uint16", "q_dtype": "float32"}, "pool is uint16"),
        ({"rows": 0}, "no queries"),
        ({"max_blocks": 0}, "no blocks"),
        ({"rows": 100_000}, "scalar memory"),
        ({"max_blocks": 50_000}, "scalar memory"),
        ({"heads": (128, 1, 128), "block_size": 1024, "max_blocks": 16_384}, "32-bit"),
        ({"token_format": TokenFormat.Int8}, "native rows only"),
    ],
    cpu: [
        ({"heads": (2, 1, 1024), "dtype": "float32"}, "1024 numbers; 512 may"),
        ({"dtype": "int8", "q_dtype": "float32"}, "pool is int8"),
        ({"dtype": "float8_e4m3fn", "q_dtype": "float32"}, "pool is float8_e4m3fn"),
        ({"rows": 0}, "no queries"),
        ({"token_format": TokenFormat.Int4, "heads": (2, 2, 28)}, "7 words; it needs 8"),
    ],
}
CASES = [(backend, *case) for backend, cases in REFUSED.items() for case in cases]
REFUSE = {cpu: cpu.accepts, gpu: gpu.refuse_shapes, tpu: tpu.refuse_shapes}
NAMES = {"ids": lambda x: getattr(x, "name", str(x))}


@pytest.mark.parametrize(("backend", "changes", "reason"), CASES, **NAMES)
def test_a_backend_says_why_it_does_not_take_a_call(backend, changes, reason):
    assert REFUSE[backend](abstract_call()) is None
    assert reason in REFUSE[backend](abstract_call(**changes))


def test_bits_of_a_cpu_pool_are_not_taken_for_numbers():
    call = problem(dtype="bfloat16", head_dim=128, block_size=8).call()
    assert call.pool.stored_dtype == jnp.uint16
    for backend in (gpu, tpu):
        assert "holds bfloat16 as uint16" in backend.refuse_shapes(call)
    with jax.enable_x64(True):
        assert "float64" in gpu.refuse_shapes(abstract_call(dtype="float64"))


@pytest.mark.parametrize("backend", [cpu, gpu, tpu], **NAMES)
def test_a_backend_refuses_a_token_format_that_it_does_not_know(
    backend, crossed_format, monkeypatch
):
    refuse, call = REFUSE[backend], abstract_call(heads=(8, 8, 128), dtype="float32")
    unknown = dataclasses.replace(call, token_format=crossed_format)
    assert re.search("does not know the token format Crossed|native rows only", refuse(unknown))
    two_bits = functools.partial(packed_codec, name="TwoBits", bits=(8, 2))
    monkeypatch.setitem(CODECS, TokenFormat.Int8Int4, CodecEntry(two_bits))
    narrow = dataclasses.replace(call, token_format=TokenFormat.Int8Int4)
    assert re.search(r"\[2\] bits|native rows only", refuse(narrow))


@pytest.mark.parametrize(
    ("device", "want"), [(None, "cpu"), ("gpu", "gpu"), ("tpu", "tpu")], ids=str
)
def test_explain_backend_names_the_kernel_of_the_platform(device, want):
    arguments, told = problem(head_dim=128, block_size=8).arguments(), []
    with described(device) if device else contextlib.nullcontext():  # Traced: nothing runs there.
        jax.eval_shape(lambda: told.append(explain_backend(**arguments)))
    assert [choice.backend for choice in told[0].choices] == [want]


def test_explain_backend_says_why_the_others_do_not_compute_a_call():
    arguments = problem(head_dim=520).arguments()
    explanation = str(explain_backend(**arguments))
    assert explanation.startswith("Native rows: xla (not cpu: heads have 520 numbers")
    assert "not gpu: this program is for cpu; not tpu: this program is for cpu" in explanation
    assert str(explain_backend(**arguments, backend="xla")) == "Native rows: xla"


def test_explain_backend_has_a_line_for_each_token_format():
    p = packed_problem(TokenFormat.Int4, head_dim=56)
    pool = dataclasses.replace(p.pool, formats=(TokenFormat.Native, TokenFormat.Int4))
    formats = jnp.full(p.held_lens.shape, TokenFormat.Int4, jnp.int32)
    arguments = {**p.arguments(), "pool": pool, "token_formats": formats}
    first, second = str(explain_backend(**arguments)).splitlines()
    assert first.startswith("Native rows: cpu") and second.startswith("Int4 rows: xla")
    assert "7 words" in second


def test_explain_backend_compiles_and_warns_nothing(monkeypatch):
    monkeypatch.setattr(foreign, "_outcomes", {})
    monkeypatch.setattr(foreign, "_register", lambda numbers: pytest.fail("compiled"))
    assert str(explain_backend(**problem().arguments())).startswith("Native rows: cpu")


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_a_named_backend_computes_the_call(backend):
    p = problem(num_queries=3)
    arguments = p.arguments()
    program = jax.jit(lambda x: paged_attention(**x, backend=backend)).lower(arguments)
    assert ("ferrum_jax_attention" in program.as_text()) == (backend == "cpu")
    assert_right(program.compile()(arguments), p)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cpu", "'cpu' does not take this call: heads have 520 numbers.*\"xla\" takes every call"),
        ("gpu", "'gpu' does not take this call: this program is for cpu"),
        ("cuda", "'cuda' is unknown; there are cpu, gpu, tpu, xla"),
        (3, "backend 3 is unknown; .* an object with the attributes of AttentionBackend"),
        (AttentionCall, "is unknown"),
        (AttentionBackend, "is unknown"),  # A class, where an instance is meant.
    ],
)
@pytest.mark.parametrize("function", [paged_attention, explain_backend])
def test_a_named_backend_that_does_not_take_the_call_is_refused(function, backend, message):
    with pytest.raises(ValueError, match=message):
        function(**problem(head_dim=520).arguments(), backend=backend)


@dataclasses.dataclass
class OwnBackend:
    """A backend of a user, which returns ones and counts its calls."""

    refusal: str | None = None
    failure: str | None = None
    name: str = "own"
    calls: list = dataclasses.field(default_factory=list)

    def accepts(self, call: AttentionCall) -> str | None:
        self.calls.append("accepts")
        return self.refusal

    def prepare(self, call: AttentionCall) -> str | None:
        self.calls.append("prepare")
        return self.failure

    def attend(self, call: AttentionCall) -> jax.Array:
        self.calls.append("attend")
        return jnp.ones(call.q.shape, call.out_dtype)


def test_a_backend_may_be_an_object_of_the_user():
    arguments, own = problem().arguments(), OwnBackend()
    assert (np.asarray(paged_attention(**arguments, backend=own)) == 1).all()
    assert own.calls == ["accepts", "prepare", "attend"]
    assert str(explain_backend(**arguments, backend=own)) == "Native rows: own"
    for refusing in (OwnBackend(refusal="too tired"), OwnBackend(failure="too tired")):
        with pytest.raises(ValueError, match="'own' does not take this call: too tired"):
            paged_attention(**arguments, backend=refusing)


@pytest.mark.parametrize("change", [lambda x: x.ravel(), lambda x: x.astype("float16")])
def test_a_backend_that_returns_another_shape_or_dtype_is_refused(change):
    own = OwnBackend()
    own.attend = lambda call: change(jnp.ones(call.q.shape, call.out_dtype))
    with pytest.raises(ValueError, match=r"backend 'own' returned float\d\d\[.*needs float32"):
        paged_attention(**problem().arguments(), backend=own)


def test_a_chosen_kernel_that_cannot_be_prepared_is_passed_over(monkeypatch):
    p = problem(sinks=True)
    monkeypatch.setattr(cpu, "prepare", lambda call: "no compiler")
    program = jax.jit(lambda x: paged_attention(**x)).lower(p.arguments())  # Not traced before.
    assert "ferrum_jax_attention" not in program.as_text()
    assert_right(program.compile()(p.arguments()), p)
    with pytest.raises(ValueError, match="'cpu' does not take this call: no compiler"):
        paged_attention(**p.arguments(), backend="cpu")
