"""The words that CONTRIBUTING rules out are in no name, docstring, comment, error or document."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = [path for top in ("ferrum_jax", "examples") for path in (ROOT / top).rglob("*.py")]
# Benchmarks name the parts of other systems: MaxText's pages, CUDA graphs.
DOCUMENTS = [ROOT / "README.md", *{*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/benchmarks.md"}]


def read_table() -> dict[str, list[str]]:
    """The phrases in which each ruled-out word is allowed."""
    table = CONTRIBUTING.split("### Ruled out")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    return {
        word: re.findall("`(.+?)`", allowed)
        for words, _, allowed in rows
        for word in re.findall("`(.+?)`", words)
    }


RULED_OUT = read_table()


def flowing(path: pathlib.Path) -> str:
    """A file's text with comments and adjacent strings joined over their lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = re.sub(r'"\n\s*f?"', "", text)
    return re.sub(r"\s*\n[\s#]*", " ", text)


TEXTS = {path: flowing(path) for path in [*CODE, *DOCUMENTS]}


def find_word(word: str, text: str) -> list[str]:
    """Each place where a word stands alone or as a part of a name, with what is around it."""
    for phrase in RULED_OUT[word]:
        text = re.sub(rf"(?<![A-Za-z]){re.escape(phrase)}(?![A-Za-z])", "", text)
    found = re.finditer(rf"(?<![A-Za-z]){word}(?![A-Za-z])", text, re.IGNORECASE)
    return [text[max(0, m.start() - 30) : m.end() + 30] for m in found]


def find_function(name: str, path: pathlib.Path) -> list[str]:
    """Each function of a file that is called so, alone or with more words behind it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    classes = {f: node.name for node in nodes if isinstance(node, ast.ClassDef) for f in node.body}
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = [f for f in functions if f"{f.name.lstrip('_')}_".startswith(f"{name}_")]
    names = [f"{classes[f]}.{f.name}" if f in classes else f.name for f in found]
    return [x for x in names if x not in RULED_OUT.get(f"{name}()", [])]


def find(word: str) -> dict[str, list[str]]:
    """The places of a ruled-out word, by file."""
    if word.endswith("()"):
        found = {path: find_function(word[:-2], path) for path in CODE}
    else:
        found = {path: find_word(word, text) for path, text in TEXTS.items()}
    return {str(path.relative_to(ROOT)): places for path, places in found.items() if places}


@pytest.mark.parametrize("word", RULED_OUT)
def test_a_word_that_the_glossary_rules_out_is_nowhere(word):
    assert not find(word)


def test_a_word_is_found_in_names_but_not_in_longer_words_and_exceptions():
    text = "k_page, find_page, PAGE_WORDS; a Page of paged, PageTables, page_table, page tables"
    assert len(find_word("page", text)) == 4
    assert not find_word("pages", text)


def test_a_phrase_is_found_over_the_end_of_a_line(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        'def forget_it():\n    # none of\n    # it can be\n    f("can "\n      "be had")'
    )
    assert find_word("none of it", flowing(path)) and find_word("can be had", flowing(path))
    assert find_function("forget", path) == ["forget_it"] and not find_function("drop", path)
