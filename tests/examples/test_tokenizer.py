"""SentencePiece BPE rebuilt from a GGUF's tokens and scores, against merging by hand."""

import pathlib
import random

import pytest

from examples.models import tokenizer

PATH = pathlib.Path("tiny.gguf")
CONTROL, BYTE = 3, 6
ADDED = ["<bos>", "<eos>", "\n\n", "  "]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["a", "b", "c", "▁"]
WORDS = ["ab", "bc", "abc", "▁a", "▁ab", "ca", "aa", "bca", "▁▁", "cab"]


def fields(**changes):
    """Metadata of a GGUF with a tokenizer; the earlier a word, the higher its score."""
    tokens = [*ADDED, *BYTES, *WORDS, *LETTERS]
    kinds = [CONTROL, CONTROL, 4, 4] + [BYTE] * 256 + [1] * len(WORDS + LETTERS)
    scores = [0.0] * (len(ADDED) + 256) + [-float(i) for i in range(len(WORDS + LETTERS))]
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": kinds,
        "scores": scores,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": True,
        "add_space_prefix": False,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def merged(text):
    """Token texts of a text: again and again the neighbours are merged that make the best word."""
    pieces = list(text.replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in zip(pieces, pieces[1:], strict=False)]
        best = min((word for word in pairs if word in WORDS), key=WORDS.index, default=None)
        if best is None:
            return pieces
        i = pairs.index(best)
        pieces[i : i + 2] = [best]


def test_the_best_neighbours_are_merged_first():
    loaded = tokenizer.from_gguf(PATH, fields())
    rng = random.Random(0)
    tokens = fields()["tokenizer.ggml.tokens"]
    for _ in range(200):
        text = " ".join("".join(rng.choices("abc", k=rng.randrange(1, 6))) for _ in range(3))
        ids = loaded.encode(text)
        assert [tokens[i] for i in ids] == ["<bos>", *merged(text)]
        assert loaded.decode(ids) == text


def test_other_characters_are_bytes_and_added_tokens_stay_whole():
    loaded = tokenizer.from_gguf(PATH, fields())
    tokens = fields()["tokenizer.ggml.tokens"]
    ids = loaded.encode("ab\n\nb  é<eos>")
    texts = ["<bos>", "ab", "\n\n", "b", "  ", "<0xC3>", "<0xA9>", "<eos>"]
    assert [tokens[i] for i in ids] == texts
    assert loaded.decode(ids) == "ab\n\nb  é"
    assert loaded.eos_token_ids == (1,)


def test_a_model_that_wants_a_space_first_gets_one():
    loaded = tokenizer.from_gguf(PATH, fields(add_space_prefix=True, add_bos_token=False))
    assert loaded.encode("ab") == [fields()["tokenizer.ggml.tokens"].index("▁ab")]


@pytest.mark.parametrize(
    "changes", [{"scores": None}, {"scores": [1.0]}, {"scores": ["x"] * 274}, {"model": "t5"}]
)
def test_a_damaged_tokenizer_is_refused(changes):
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer.from_gguf(PATH, fields(**changes))
