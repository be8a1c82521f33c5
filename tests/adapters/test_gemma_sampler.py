"""The sampler on the cache, against the samplers of the package `gemma`."""

import pathlib
import re

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import SequenceTooLongError
from ferrum_jax.integrations import StepOptions, token_keys
from ferrum_jax.integrations.gemma import MethodSampling, PagedSampler
from tests.support import tiny_gemma as tiny

gm = tiny.gm
MODEL, PARAMS = tiny.make(tiny.Gemma3)
PROMPTS = ["hello", "a longer prompt, of more than one window of tokens", "x", "and another one"]
SIZES = {"cache_length": 128, "max_out_length": 32}
COMMON = {"model": MODEL, "params": PARAMS, "tokenizer": tiny.Tokenizer(), **SIZES}


@pytest.fixture(autouse=True)
def as_the_package_promotes():
    with tiny.promotion():
        yield


def paged(**fields):
    step = StepOptions(chunk_tokens=8, chunks_per_step=2)
    options = fj.EngineOptions(max_rows=2, step=step)
    return PagedSampler(**{**COMMON, "block_size": 8, "options": options, **fields})


def own(**fields):
    return gm.text.Sampler(**{**COMMON, "pad_length": 64, **fields})


def encoded(text, **options):
    return tiny.Tokenizer().encode(text, **options)


def assert_greedy(before, answer):
    """Asserts that each token is the best one after those before, in the package's own forward."""
    logits = tiny.forward(MODEL, PARAMS, before + answer, size=128)[len(before) - 1 : -1]
    logits[:, tiny.Tokenizer.FORBIDDEN_TOKENS] = -np.inf
    assert answer == logits.argmax(axis=-1).tolist()


# Against the package's own samplers.


def test_a_list_of_prompts_is_answered_as_by_the_packages_sampler():
    fields = {"stop_tokens": [int(own().sample(PROMPTS[0], max_new_tokens=4).split()[-1])]}
    want = own(**fields).sample(PROMPTS, max_new_tokens=20, return_state=True)
    sampler = paged(**fields)
    got = sampler.sample(PROMPTS, max_new_tokens=20, return_state=True)
    assert got.text == want.text
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert len({len(text.split()) for text in got.text}) > 1  # One has stopped, and one has not.
    assert not sampler.manager.list_handles()


def test_one_prompt_and_its_forbidden_tokens_are_taken_as_by_the_packages_sampler():
    best = int(own().sample("hello", max_new_tokens=1))
    fields = {"forbidden_tokens": [best]}
    want = own(**fields).sample("hello", max_new_tokens=6)
    got = paged(**fields).sample("hello", max_new_tokens=6)
    assert got == want and str(best) not in got.split()


def test_chat_formats_the_first_turn_as_the_packages_chat_sampler():
    want, got = gm.text.ChatSampler(**{**COMMON, "cache_length": 512}), paged()
    assert got.chat("hi", max_new_tokens=8) == want.chat("hi", max_new_tokens=8)
    assert got.turns == [turn.text for turn in want.turns]
    assert got.chat("hi", max_new_tokens=8) == got.turns[1]  # Without the turn before.
    conversation = tiny.dialog.Conversation(tiny.dialog.User("hi"))
    assert got.chat(conversation, max_new_tokens=8) == got.turns[1]


# Turns, prefixes, windows.


def test_the_next_turn_sees_all_turns_before_and_computes_its_own_tokens_only():
    sampler = paged(multi_turn=True)
    sampler.chat("hello there", max_new_tokens=9)
    before = sampler.last_state
    assert sampler.manager.stats().cache_hit_rate == 0
    sampler.chat("and now?", max_new_tokens=9)
    (tokens,) = sampler.last_state.token_ids
    answer = [token for token in sampler.last_state.predicted_tokens[0].tolist() if token]
    turn = encoded("<start_of_turn>user\nand now?<end_of_turn>\n<start_of_turn>model\n")
    assert list(tokens) == [*before.token_ids[0], *turn, *answer]
    assert_greedy(list(tokens[: -len(answer)]), answer)
    # All tokens but the last one of the first answer were written; full blocks of them are found.
    first = len(encoded(sampler.turns[0], add_bos=True))
    cached = sampler.manager.stats().cache_hit_rate * (first + len(tokens) - len(answer))
    assert round(cached) == (len(before.token_ids[0]) - 1) // 8 * 8


def test_a_state_can_be_continued_twice_and_by_several_prompts_at_once():
    sampler = paged()
    first = sampler.sample(PROMPTS[:2], max_new_tokens=5, return_state=True)
    turns = ["why?", "no"]
    once = sampler.sample(turns, max_new_tokens=5, last_state=first.state)
    again = sampler.sample(turns, max_new_tokens=5, last_state=first.state, return_state=True)
    assert again.text == once
    for tokens, answer in zip(again.state.token_ids, again.tokens.tolist(), strict=True):
        answer = [token for token in answer if token]
        assert_greedy(list(tokens[: -len(answer)]), answer)


def test_prompts_share_the_blocks_of_what_they_begin_with():
    sampler = paged()
    examples = "three examples of what is asked; "
    prompts = [examples + question for question in ("one", "two", "three", "four")]
    assert sampler.sample(prompts, max_new_tokens=2) == [
        paged().sample(prompt, max_new_tokens=2) for prompt in prompts
    ]
    lens = [len(encoded(prompt, add_bos=True)) for prompt in prompts]
    shared = len(encoded(examples, add_bos=True)) // 8 * 8
    assert sampler.manager.stats().cache_hit_rate * sum(lens) >= 3 * shared


def test_local_layers_hold_the_window_only_while_an_answer_grows():
    sampler, held = paged(), []
    for _ in sampler.sample("a prompt of thirty-two characters", max_new_tokens=32, stream=True):
        held.append(sampler.manager.stats().group_blocks)
    *_, blocks = [blocks for blocks in held if blocks["global"]]  # Before the last token's.
    assert blocks["global"] == -(-(34 + 30) // 8)
    assert blocks["local/0"] == blocks["local/1"] <= -(-(tiny.WINDOW + 1) // 8) + 1


# Streaming.


def test_a_stream_has_the_tokens_of_the_answer_and_ends_where_it_is_left(capsys):
    sampler = paged()
    want = sampler.sample("hello", max_new_tokens=6, return_state=True)
    pieces = list(sampler.sample("hello", max_new_tokens=6, stream=True, return_state=True))
    assert "".join(piece.text for piece in pieces) == want.text
    assert pieces[-1].state == want.state
    assert sampler.chat("hi", max_new_tokens=6, print_stream=True) == capsys.readouterr().out
    pieces = sampler.sample("hello", max_new_tokens=6, stream=True)
    next(pieces)
    assert sampler.manager.list_handles()
    pieces.close()
    assert not sampler.manager.list_handles()


# Drawing.


@pytest.mark.parametrize(
    "method",
    [
        gm.text.RandomSampling(temperature=0.7),
        gm.text.TopkSampling(temperature=2.0, k=5),
        gm.text.TopPSampling(p=0.6),
    ],
    ids=lambda method: type(method).__name__,
)
def test_each_row_draws_as_the_packages_method_does_with_the_rows_key(method):
    logits = jax.random.normal(jax.random.key(1), (5, 16))
    keys = token_keys(jax.random.split(jax.random.key(2), 5), np.arange(5))
    sampling = MethodSampling.of(method, forbidden_token_ids=(3, 4))
    without = logits.at[:, 3:5].set(-np.inf)
    want = [int(method.get_next_tokens(without[i : i + 1], rng=keys[i])[0]) for i in range(5)]
    assert sampling.sample(logits, keys).tolist() == want
    many = sampling.sample(jax.numpy.tile(logits[:1], (400, 1)), jax.random.key(3))
    assert not np.isin(many, [3, 4]).any() and len(set(many.tolist())) > 2


def test_draws_depend_on_the_seed_and_the_prompts_number_only():
    sampler = paged(sampling=gm.text.RandomSampling())
    once = sampler.sample(PROMPTS, max_new_tokens=6, rng=7)
    assert sampler.sample(PROMPTS, max_new_tokens=6, rng=jax.random.key(7)) == once
    assert sampler.sample(PROMPTS[0], max_new_tokens=6, rng=7) == once[0]
    assert sampler.sample(PROMPTS, max_new_tokens=6, rng=8) != once
    assert len({sampler.sample("x", max_new_tokens=6) for _ in range(8)}) > 1
    greedy = sampler.sample("x", max_new_tokens=6, sampling=gm.text.Greedy())
    assert greedy == paged().sample("x", max_new_tokens=6)


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": np.zeros((4, 4, 3))}, ValueError, "images cannot be given.*ChatSampler"),
        ({"sharding": 1}, ValueError, "sharding cannot be given.*Engine on a manager"),
        ({"image": 1}, TypeError, "takes no argument 'image'"),
        ({"max_new_tokens": 33}, ValueError, "at most max_out_length .32., got 33"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"sampling": "greedy"}, TypeError, "must be a gm.text.SamplingMethod, got str"),
        ({"last_state": 1}, ValueError, "last_state must be a SamplerState"),
    ],
)
def test_what_is_not_taken_is_refused(arguments, error, message):
    sampler = paged()
    with pytest.raises(error, match=message):
        sampler.chat("hi", **arguments) if "last_state" not in arguments else sampler.sample(
            "hi", **arguments
        )
    assert sampler.turns == [] and not sampler.manager.list_handles()


def test_a_conversation_that_is_too_long_leaves_no_request_behind():
    sampler = paged()
    with pytest.raises(SequenceTooLongError, match="129 prompt tokens.*a request holds 128"):
        sampler.sample(["short", "x" * 128], max_new_tokens=1)
    with pytest.raises(ValueError, match="stream is for one prompt, got 2"):
        sampler.sample(["a", "b"], stream=True)
    state = sampler.sample(["a"], max_new_tokens=1, return_state=True).state
    with pytest.raises(ValueError, match="has 1 conversations, and 2 prompts"):
        sampler.sample(["a", "b"], last_state=state)
    assert sampler.sample([]) == [] and not sampler.manager.list_handles()


def test_an_answer_ends_where_the_conversation_is_full():
    assert len(paged().sample("x" * 120, return_state=True).state.token_ids[0]) == 129


def test_fields_of_the_sampler_are_checked():
    with pytest.raises(ValueError, match="'ab' is 2 tokens"):
        paged(stop_tokens=["ab"])
    with pytest.raises(ValueError, match="names no tokenizer"):
        paged(tokenizer=None)
    spread = jax.device_put(PARAMS, jax.sharding.NamedSharding(jax.make_mesh((2,), "a"), jax.P()))
    with pytest.raises(ValueError, match="The parameters are on 2 devices.*ManagerOptions.mesh"):
        paged(params=spread)


# The page about it.


def test_the_code_of_the_page_runs(monkeypatch):
    page = pathlib.Path(__file__).parents[2] / "docs/gemma.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 3
    monkeypatch.setattr(tiny.Gemma3, "INFO", gm.nn.config.ModelInfo(tokenizer_version=3))
    monkeypatch.setattr(gm.nn, "Gemma3_1B", lambda: MODEL, raising=False)
    monkeypatch.setattr(gm.ckpts, "load_params", lambda path: PARAMS, raising=False)
    monkeypatch.setattr(gm.text.Tokenizer, "from_version", lambda version: tiny.Tokenizer())
    names = {}
    for block in blocks:
        exec(compile(block, "docs/gemma.md", "exec"), names)
    assert names["served"].ok.all()
