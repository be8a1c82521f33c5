"""Which requests begin with the same tokens because they share what was computed of them.

A request that holds another one's first tokens holds *those* tokens, whether or not they are
known yet: what is learned of one request's tokens is then known of all that share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ferrum_jax.manager.handle import Entry
from ferrum_jax.types import BlockId


def link(one: Entry, other: Entry, num_tokens: int) -> None:
    """Notes that two requests begin with the same `num_tokens` tokens, and tells each of these."""
    relatives = [
        (first, second, min(num_tokens, m, n))
        for first, m in [(one, num_tokens), *one.kin.items()]
        for second, n in [(other, num_tokens), *other.kin.items()]
        if first is not second
    ]
    for first, second, length in relatives:
        first.kin[second] = max(length, first.kin.get(second, 0))
        second.kin[first] = max(length, second.kin.get(first, 0))
    tell(one)
    tell(other)


def link_sharing(
    entries: Sequence[Entry],
    residents: Sequence[Entry],
    rows: Mapping[int, Sequence[BlockId]],
    block_size: int,
) -> None:
    """Links requests whose rows begin with the same blocks.

    If one of them must not be cached, no other may that shares its blocks uncached.

    Args:
      entries: Requests whose rows may have changed.
      residents: All requests that have a row.
      rows: The blocks of each row that holds some.
      block_size: Tokens per block.
    """
    for one in entries:
        for other in residents:
            pairs = list(zip(rows.get(one.seq_id, []), rows.get(other.seq_id, []), strict=False))
            known = one.kin.get(other, 0) // block_size
            if one is other or known >= len(pairs) or pairs[known][0] != pairs[known][1]:
                continue  # No more is shared than is known of these two.
            differ = (i for i, (mine, its) in enumerate(pairs) if mine != its)
            num_same = next(differ, len(pairs))
            if num_same > one.lease.num_blocks:
                one.may_be_cached = other.may_be_cached = one.may_be_cached & other.may_be_cached
            if num_same > known:
                link(one, other, num_same * block_size)


def tell(entry: Entry) -> None:
    """Tells a request's known tokens to those that share them."""
    known = entry.known_tokens
    for other, num_tokens in entry.kin.items():
        if min(num_tokens, len(known)) > len(other.inherited_tokens):
            other.inherited_tokens = known[:num_tokens]


def cut(entry: Entry, num_tokens: int) -> None:
    """Notes that a request was cut to `num_tokens`: what it holds behind them is its own."""
    entry.inherited_tokens = entry.inherited_tokens[:num_tokens]
    for other, length in entry.kin.items():
        entry.kin[other] = other.kin[entry] = min(length, num_tokens)


def unlink(entry: Entry) -> None:
    """Forgets a request's relatives; they keep what they know."""
    for other in entry.kin:
        del other.kin[entry]
    entry.kin.clear()
