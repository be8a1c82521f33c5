"""`require`, and mistakes with the loops that are noticed on the host."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import integrations
from ferrum_jax.integrations import GenerateOptions, PagedBatch, generate, prefill, record_queries
from tests.support.caches import same_bits, snapshot, tiny_spec

OPTIONS = GenerateOptions(max_new_tokens=2)


@pytest.fixture
def state() -> fj.CacheState:
    state, ok = fj.allocate(fj.init(tiny_spec()), [0, 2], [7, 3])
    assert bool(ok)
    return state


def model_fn(params, tokens, batch):
    raise AssertionError("No model is called.")


# `require`.


def test_require_returns_none_if_ok(state):
    _, ok = fj.extend(state, [0], 1, max_new_tokens=1)
    assert fj.require(ok, "extend row 0 by 1 token", state) is None
    fj.require(np.asarray([True, True]), "two things")


def test_require_raises_with_what_was_asked_and_what_is_free(state):
    after, ok = fj.allocate(state, [1], [99])
    with pytest.raises(fj.FerrumError) as raised:
        fj.require(ok, what="allocate row 1 for 99 tokens", state=after)
    assert type(raised.value).__name__ == "RefusedError"
    assert str(raised.value).startswith(
        "Not ok: allocate row 1 for 99 tokens. 8 of 12 blocks (3 tokens each) and 3 of 5 rows are "
        "free (1, 3, 4); a row holds at most 5 blocks. Free rows, ask for less"
    )
    assert same_bits(after, snapshot(state))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda state: fj.require(jnp.asarray([True, False]), "two forks"), "Not ok: two forks"),
        *(
            (lambda state, ok=ok: fj.require(ok, "something"), "ok must be the bool")
            for ok in (None, 1, "yes", np.ones(2))
        ),
        (lambda state: fj.require(fj.allocate(state, [1], [1]), "it"), "got tuple. Unpack"),
        (lambda state: jax.jit(lambda ok: fj.require(ok, "it"))(True), "outside"),
    ],
)
def test_require_refuses_what_is_not_true_on_the_host(state, call, message):
    with pytest.raises((ValueError, fj.FerrumError), match=message):
        call(state)


# What was consumed, and what cannot be compiled.


CALLS = {
    "prefill": lambda fn, state: prefill(fn, None, state, [0], [[1]]),
    "generate": lambda fn, state: generate(fn, None, state, [0], [1], options=OPTIONS),
    "record_queries": lambda fn, state: record_queries(fn, None, state, [0], [[1]], num_q_heads=1),
}


@pytest.mark.parametrize("call", [*CALLS, "PagedBatch.of", "require"])
@pytest.mark.parametrize("part", ["pool", "tables"])
def test_a_consumed_state_is_refused_before_anything_runs(state, call, part):
    calls = {
        **CALLS,
        "PagedBatch.of": lambda _, state: PagedBatch.of(state, [0], [1], num_tokens=1),
        "require": lambda _, state: fj.require(np.asarray(False), "something", state),
    }
    for leaf in jax.tree.leaves(getattr(state, part)):
        leaf.delete()
    with pytest.raises(ValueError, match="This state was consumed.*prefill"):
        calls[call](model_fn, state)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, params, tokens, batch):
        raise AssertionError("No model is called.")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "model, message", [(Unhashable(), "model_fn must be hashable"), ({}, "must be a function")]
)
def test_a_model_that_cannot_be_compiled_once_is_refused(state, call, model, message):
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, state)


@pytest.mark.parametrize("options", [{"max_new_tokens": 3}, 3])
def test_options_of_another_type_are_refused(state, options):
    with pytest.raises(ValueError, match="options must be a GenerateOptions"):
        generate(model_fn, None, state, [0], [1], options=options)
    with pytest.raises(ValueError, match="options must be a PrefillOptions"):
        prefill(model_fn, None, state, [0], [[1]], options=options)


# Names.


def test_integrations_exports_functions_and_does_not_load_flax():
    assert not [name for name in integrations.__all__ if inspect.ismodule(vars(integrations)[name])]
    program = "import sys, ferrum_jax.integrations; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
