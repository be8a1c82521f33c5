"""What the benchmark of compression counts, without a model."""

import dataclasses

import numpy as np
import pytest

from benchmarks import page
from benchmarks.compression import all_cases, figures_of, num_same, quick_cases
from benchmarks.held_text import TOPICS, Outcome, held_texts
from ferrum_jax.compression.scores import scorer_names
from ferrum_jax.records import CompressionReport
from ferrum_jax.types import TokenFormat

PLAIN = Outcome(
    log_probs=np.full((2, 4), -2.0),
    choices=np.arange(8).reshape(2, 4),
    own_choices=np.arange(6).reshape(2, 3),
    reports=[],
)


def report(seconds: float) -> CompressionReport:
    errors = {"attention_error": 0.25, "pruning_error": 0.0, "fitting_error": 0.0}
    sizes = {"num_tokens": 64, "num_kept_tokens": 64, "ratio": 0.5, "freed_bytes": 3 << 20}
    return CompressionReport(token_format=TokenFormat.Int8, seconds=seconds, **sizes, **errors)


def test_an_uncompressed_cache_is_set_beside_itself():
    row = figures_of(None, PLAIN, PLAIN)
    assert row["perplexity"] == pytest.approx(np.exp(2.0))
    assert row["times_plain"] == row["agreement"] == row["own_agreement"] == 1.0
    assert row["standard_error"] == 0.0 and row["same_tokens"] == 3.0


def test_what_a_case_costs_is_told_against_the_uncompressed_cache():
    log_probs = PLAIN.log_probs - np.array([[0.0], [0.2]])
    choices, own_choices = PLAIN.choices.copy(), PLAIN.own_choices.copy()
    choices[0, 0] = own_choices[1, 1] = 99
    reports = [report(seconds) for seconds in (9.0, 1.0, 1.0)]  # The first one compiles.
    outcome = Outcome(log_probs, choices, own_choices, reports)
    row = figures_of(quick_cases()[0], outcome, PLAIN)
    assert row["method"] == "Int8" and row["seconds"] == 1.0 and row["freed_mib"] == 3.0
    assert row["times_plain"] == pytest.approx(np.exp(0.1))
    assert row["perplexity"] == pytest.approx(np.exp(2.1))
    assert row["standard_error"] == pytest.approx(0.1 * np.exp(0.1))
    assert row["agreement"] == 7 / 8 and row["own_agreement"] == 5 / 6
    assert row["same_tokens"] == (3 + 1) / 2


def test_tokens_count_as_the_same_until_the_first_that_differs():
    tokens = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    others = np.array([[0, 2, 3], [4, 5, 6], [7, 8, 0]])
    assert num_same(tokens, others).tolist() == [0, 3, 2]


def test_every_case_is_asked_once_and_every_format_and_scorer_is_among_them():
    cases = all_cases()
    assert len({(case.name, case.ratio) for case in cases}) == len(cases)
    methods = [case.method for case in cases]
    assert {method.token_format for method in methods} == {None, *TokenFormat}
    assert {*scorer_names(), None} == {method.scorer for method in methods}
    for case in cases:  # A fit has its like without, so that its gain can be told.
        if case.method.fit_steps:
            plain = dataclasses.replace(case.method, fit_steps=0)
            assert any(plain == method for method in methods)


def test_texts_differ_and_have_the_tokens_asked_for():
    texts = held_texts(lambda text: list(text.encode()), len(TOPICS), 200)
    assert [len(text) for text in texts] == [200] * len(TOPICS)
    assert len(set(map(tuple, texts))) == len(TOPICS)


def test_too_much_text_is_refused():
    with pytest.raises(ValueError, match="There are 8 texts, got num_texts=9"):
        held_texts(str.split, 9, 10)
    with pytest.raises(ValueError, match="1000000 are asked for"):
        held_texts(str.split, 1, 1_000_000)


def test_the_page_sets_what_is_fitted_beside_the_same_without():
    keys = ("ratio", "pruning_error", "attention_error", "times_plain", "agreement")
    pruned = {"method": "Native, window", "asked": 0.5, **dict.fromkeys(keys, 0.5)}
    fitted = {**pruned, "method": "Native, window, fitted", "attention_error": 0.25}
    _, (_, rows) = page._compression_tables({"methods": [pruned, fitted]})
    assert rows == [["Native, window, fitted", 0.5, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5]]
    assert len(page._compression_tables({"methods": [pruned]})) == 1
