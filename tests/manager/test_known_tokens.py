"""What is known of requests' tokens: shared tokens are known of every request that holds them."""

import ast
import dataclasses
import pathlib
import random

import ferrum_jax.manager
from ferrum_jax.manager.known_tokens import KnownTokens
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.tokens import TokenIds


def test_commit_tells_the_tokens_to_all_requests_that_share_them():
    """Random links and commits, against sequences that are really shared."""
    dice = random.Random(0)
    for _ in range(50):
        true = [[dice.randrange(3) for _ in range(12)] for _ in range(4)]
        known = [KnownTokens(tokens=TokenIds(())) for _ in true]
        for _ in range(8):
            i, j, length = dice.randrange(4), dice.randrange(4), dice.randrange(13)
            if dice.random() < 0.5:
                length = max(length, len(known[i].tokens))
                known[i].commit(TokenIds(true[i][:length]), length, None)
            elif dice.random() < 0.5:
                known[i].truncate(length)
                true[i][length:] = [dice.randrange(3) for _ in true[i][length:]]
            elif i != j:
                known[j].truncate(0)
                true[j] = true[i][:length] + [dice.randrange(3) for _ in range(12 - length)]
                known[j].share(known[i], length, 0)
                assert len(known[j].longest) >= min(length, len(known[i].longest))
            for tokens, each in zip(true, known, strict=True):
                assert list(each.longest) == tokens[: len(each.longest)]
                assert each.num_computed <= len(each.tokens)


def test_share_lets_a_request_count_no_token_as_computed_that_its_source_has_not():
    source, target = (KnownTokens(tokens=TokenIds(range(8))) for _ in range(2))
    source.commit(source.tokens, 4, None)
    target.commit(target.tokens, 8, None)
    source.forbid_caching()
    target.share(source, num_tokens=6, num_cached=2)
    assert (target.num_computed, target.may_be_cached) == (4, False)
    source.unlink()
    assert not target.num_shared_with


def test_only_a_request_itself_assigns_its_fields():
    classes = LiveRequest, KnownTokens
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    folder = pathlib.Path(ferrum_jax.manager.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                is_own = path.stem == "known_tokens" or ast.unparse(node.value) == "self"
                assert is_own or node.attr not in fields, f"{path.name}:{node.lineno}"
