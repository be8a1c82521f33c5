"""An oracle of a paged cache, with lists of tokens and counted blocks.

Each row has a plain list of its tokens, so that a row is right whatever its blocks are. The number
of blocks in use is counted over all rows each time.
"""

import dataclasses
from collections.abc import Sequence

NULL_SEQ = -1

# The causes of refusal.
UNKNOWN_ROW = "a row is out of range"
REPEATED_ROW = "a row is named twice"
ROW_IN_USE = "a row is in use"
EMPTY_PARENT = "a parent holds nothing"
BAD_SOURCE = "a source is out of range or also a target"
NEGATIVE = "a count is negative"
TOO_MANY = "a count is above what was announced"
TOO_LONG = "a row cannot hold so much"
NOT_HELD = "a length is above what a row holds"
NO_BLOCKS = "too few blocks are free"


OUTCOMES = {
    *((op, None) for op in ("allocate", "extend", "fork", "share", "truncate")),
    *((op, UNKNOWN_ROW) for op in ("allocate", "extend", "fork", "share", "truncate")),
    *((op, REPEATED_ROW) for op in ("allocate", "extend", "fork", "share", "truncate")),
    *((op, NO_BLOCKS) for op in ("allocate", "extend", "fork", "share", "truncate")),
    *((op, NEGATIVE) for op in ("allocate", "extend", "share", "truncate")),
    *((op, ROW_IN_USE) for op in ("allocate", "fork")),
    *((op, TOO_LONG) for op in ("allocate", "extend")),
    *((op, NOT_HELD) for op in ("share", "truncate")),
    ("extend", TOO_MANY),
    ("fork", EMPTY_PARENT),
    ("share", BAD_SOURCE),
}
"""Each operation's success, and each cause for which it may refuse."""


class Block:
    """A block is only itself: two are the same if they are one object."""


@dataclasses.dataclass
class Row:
    """One sequence. A token that was not written yet is None."""

    tokens: list[int | None] = dataclasses.field(default_factory=list)
    blocks: list[Block] = dataclasses.field(default_factory=list)


class OracleCache:
    """Predicts each operation. Those that can fail return the cause, or None for success."""

    def __init__(self, *, num_blocks: int, block_size: int, max_seqs: int, max_blocks_per_seq: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_blocks_per_seq = max_blocks_per_seq
        self.rows = [Row() for _ in range(max_seqs)]

    @property
    def seq_lens(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    @property
    def num_free(self) -> int:
        return self.num_blocks - len({block for row in self.rows for block in row.blocks})

    def used_rows(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.tokens]

    def free_rows(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if not row.tokens]

    def allocate(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> str | None:
        named = _named(seq_ids, num_tokens)
        if cause := self._wrong_rows([i for i, _ in named]):
            return cause
        if any(self.rows[i].blocks for i, _ in named):
            return ROW_IN_USE
        return self._grow(named)

    def extend(
        self, seq_ids: Sequence[int], num_tokens: Sequence[int], max_new_tokens: int
    ) -> str | None:
        named = _named(seq_ids, num_tokens)
        if cause := self._wrong_rows([i for i, _ in named]):
            return cause
        if any(n > max_new_tokens for _, n in named):
            return TOO_MANY
        return self._grow(named)

    def free(self, seq_ids: Sequence[int]) -> None:
        for i in seq_ids:
            if self._exists(i):
                self.rows[i] = Row()

    def fork(self, parents: Sequence[int], children: Sequence[int]) -> str | None:
        named = _named(children, parents)
        if cause := self._wrong_rows([i for i, _ in named]):
            return cause
        if any(not self._exists(parent) or not self.rows[parent].tokens for _, parent in named):
            return EMPTY_PARENT
        if any(self.rows[i].blocks for i, _ in named):
            return ROW_IN_USE
        tails = [len(self.rows[parent].tokens) % self.block_size for _, parent in named]
        if sum(tail > 0 for tail in tails) > self.num_free:
            return NO_BLOCKS
        for (i, parent), tail in zip(named, tails, strict=True):
            tokens, blocks = self.rows[parent].tokens, self.rows[parent].blocks
            self.rows[i] = Row(list(tokens), blocks[:-1] + [Block()] if tail else list(blocks))
        return None

    def share(
        self, sources: Sequence[int], targets: Sequence[int], num_tokens: Sequence[int]
    ) -> str | None:
        named = _named(targets, sources, num_tokens)
        rows = [i for i, _, _ in named]
        if cause := self._wrong_rows(rows):
            return cause
        if any(not self._exists(source) or source in rows for _, source, _ in named):
            return BAD_SOURCE
        if any(n < 0 for _, _, n in named):
            return NEGATIVE
        if any(n > min(len(self.rows[r].tokens) for r in (i, source)) for i, source, n in named):
            return NOT_HELD
        replaced = [i for i, _, n in named if self._is_tail_shared(i, n)]
        if len(replaced) > self.num_free:
            return NO_BLOCKS
        for i, source, n in named:
            row, num_full, is_partial = self.rows[i], *divmod(n, self.block_size)
            row.tokens[:n] = self.rows[source].tokens[:n]
            row.blocks[:num_full] = self.rows[source].blocks[:num_full]
            if is_partial and i in replaced:
                row.blocks[num_full] = Block()
        return None

    def truncate(self, seq_ids: Sequence[int], seq_lens: Sequence[int]) -> str | None:
        named = _named(seq_ids, seq_lens)
        if cause := self._wrong_rows([i for i, _ in named]):
            return cause
        if any(n < 0 for _, n in named):
            return NEGATIVE
        if any(n > len(self.rows[i].tokens) for i, n in named):
            return NOT_HELD
        replaced = [i for i, n in named if self._is_tail_shared(i, n)]
        if len(replaced) > self.num_free:
            return NO_BLOCKS
        for i, n in named:
            row = self.rows[i]
            del row.tokens[n:], row.blocks[self._num_blocks(n) :]
            if i in replaced:
                row.blocks[-1] = Block()
        return None

    def write(self, row: int, position: int, token: int) -> None:
        self.rows[row].tokens[position] = token

    def check_blocks(self, block_ids: Sequence[Sequence[int]]) -> None:
        """Asserts that rows share real blocks exactly where they share blocks here."""
        pairs = set()
        for row, ids in zip(self.rows, block_ids, strict=True):
            held = [block_id for block_id in ids if block_id >= 0]
            pairs |= set(zip(row.blocks, held, strict=True))
        assert len(pairs) == len({block for block, _ in pairs}) == len({i for _, i in pairs})

    def _exists(self, row: int) -> bool:
        return 0 <= row < len(self.rows)

    def _wrong_rows(self, rows: Sequence[int]) -> str | None:
        if not all(self._exists(row) for row in rows):
            return UNKNOWN_ROW
        return REPEATED_ROW if len(set(rows)) < len(rows) else None

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _is_tail_shared(self, row: int, num_tokens: int) -> bool:
        """Whether `num_tokens` of a row end inside a block that another row holds too."""
        if num_tokens % self.block_size == 0:
            return False
        tail = self.rows[row].blocks[num_tokens // self.block_size]
        return sum(tail in other.blocks for other in self.rows) > 1

    def _grow(self, named: Sequence[tuple[int, int]]) -> str | None:
        if any(n < 0 for _, n in named):
            return NEGATIVE
        new_lens = {i: len(self.rows[i].tokens) + n for i, n in named}
        if any(n > self.max_blocks_per_seq * self.block_size for n in new_lens.values()):
            return TOO_LONG
        num_new = {i: self._num_blocks(n) - len(self.rows[i].blocks) for i, n in new_lens.items()}
        if sum(num_new.values()) > self.num_free:
            return NO_BLOCKS
        for i, n in named:
            self.rows[i].tokens += [None] * n
            self.rows[i].blocks += [Block() for _ in range(num_new[i])]
        return None


def _named(rows: Sequence[int], *others: Sequence[int]) -> list[tuple[int, ...]]:
    """Drops the pairs that are padding."""
    return [pair for pair in zip(rows, *others, strict=True) if pair[0] != NULL_SEQ]
