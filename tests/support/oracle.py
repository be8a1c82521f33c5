"""An oracle of a paged cache, with lists of tokens and counted blocks.

Each row has a plain list of its tokens, so that a row is right whatever its blocks are. In each
layer group it has a list of blocks, with None in place of a block that it has released. Blocks in
use are counted over all rows each time, and whether a row can go on is looked up token by token.
"""

import dataclasses
from collections.abc import Iterable, Sequence

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
GONE = "a needed token is gone"
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
"""Each operation's success, and each cause for which it may refuse where no group has a window."""

WINDOW_OUTCOMES = {
    *((op, cause) for op, cause in OUTCOMES if cause is None),
    *((op, GONE) for op in ("share", "truncate")),
}
"""The outcomes that a window may change: each operation's success, and that a token is gone."""


class Block:
    """A block is only itself: two are the same if they are one object."""


@dataclasses.dataclass(frozen=True)
class OracleGroup:
    """A layer group: the index of its pool, and how many tokens a query sees (None for all)."""

    pool: int = 0
    window: int | None = None


@dataclasses.dataclass
class Row:
    """One sequence, and its blocks in each group. A token that was not written yet is None."""

    blocks: list[list[Block | None]]
    tokens: list[int | None] = dataclasses.field(default_factory=list)


class OracleCache:
    """Predicts each operation. Those that can fail return the cause, or None for success."""

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        block_size: int,
        max_seqs: int,
        max_blocks_per_seq: int,
        groups: Sequence[OracleGroup] = (OracleGroup(),),
    ):
        self.num_blocks = num_blocks  # Of each pool.
        self.block_size = block_size
        self.max_blocks_per_seq = max_blocks_per_seq
        self.groups = groups
        self.rows = [self._free_row() for _ in range(max_seqs)]

    @property
    def seq_lens(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    @property
    def num_free(self) -> list[int]:
        """Free blocks of each pool."""
        used = [set() for _ in self.num_blocks]
        for row in self.rows:
            for group, blocks in zip(self.groups, row.blocks, strict=True):
                used[group.pool] |= {block for block in blocks if block}
        return [size - len(blocks) for size, blocks in zip(self.num_blocks, used, strict=True)]

    @property
    def most_blocks(self) -> int:
        """How many blocks a free row can take in every group."""
        most = 0
        while self._has_room((most + 1) * [*range(len(self.groups))]):
            most += 1
        return min(most, self.max_blocks_per_seq)

    def used_rows(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if row.tokens]

    def free_rows(self) -> list[int]:
        return [i for i, row in enumerate(self.rows) if not row.tokens]

    def held(self, row: int, group: int) -> list[int | None]:
        """A row's tokens in a group; 0 for one that is in a released block."""
        blocks, tokens = self.rows[row].blocks[group], self.rows[row].tokens
        return [token if blocks[p // self.block_size] else 0 for p, token in enumerate(tokens)]

    def allocate(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> str | None:
        named = _named(seq_ids, num_tokens)
        if cause := self._wrong_rows([i for i, _ in named]):
            return cause
        if any(self.rows[i].tokens for i, _ in named):
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
                self.rows[i] = self._free_row()

    def fork(self, parents: Sequence[int], children: Sequence[int]) -> str | None:
        named = _named(children, parents)
        if cause := self._wrong_rows([i for i, _ in named]):
            return cause
        if any(not self._exists(parent) or not self.rows[parent].tokens for _, parent in named):
            return EMPTY_PARENT
        if any(self.rows[i].tokens for i, _ in named):
            return ROW_IN_USE
        tails = [parent for _, parent in named if self.seq_lens[parent] % self.block_size]
        if not self._has_room(len(tails) * [*range(len(self.groups))]):
            return NO_BLOCKS
        for i, parent in named:
            row = self.rows[parent]
            self.rows[i] = Row([list(blocks) for blocks in row.blocks], list(row.tokens))
            if parent in tails:
                for blocks in self.rows[i].blocks:
                    blocks[-1] = Block()
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
        if any(n > min(self.seq_lens[i], self.seq_lens[source]) for i, source, n in named):
            return NOT_HELD
        if any(self._is_gone(source, n) for _, source, n in named):
            return GONE
        replaced = self._shared_tails([(i, n) for i, _, n in named])
        if not self._has_room([g for _, g, _ in replaced]):
            return NO_BLOCKS
        for i, source, n in named:
            row, other = self.rows[i], self.rows[source]
            row.tokens[:n] = other.tokens[:n]
            for blocks, shared in zip(row.blocks, other.blocks, strict=True):
                for index in range(n // self.block_size):  # What one row has released is gone.
                    blocks[index] = blocks[index] and shared[index]
        self._replace(replaced)
        return None

    def truncate(self, seq_ids: Sequence[int], seq_lens: Sequence[int]) -> str | None:
        named = _named(seq_ids, seq_lens)
        if cause := self._wrong_rows([i for i, _ in named]):
            return cause
        if any(n < 0 for _, n in named):
            return NEGATIVE
        if any(n > self.seq_lens[i] for i, n in named):
            return NOT_HELD
        if any(n > 0 and self._is_gone(i, n) for i, n in named):
            return GONE
        replaced = self._shared_tails(named)
        if not self._has_room([g for _, g, _ in replaced]):
            return NO_BLOCKS
        for i, n in named:
            del self.rows[i].tokens[n:]
            for blocks in self.rows[i].blocks:
                del blocks[self._num_blocks(n) :]
        self._replace(replaced)
        return None

    def write(self, row: int, position: int, token: int) -> None:
        self.rows[row].tokens[position] = token

    def check_blocks(self, pool: int, block_ids: Sequence[Sequence[int]]) -> None:
        """Asserts that a pool's rows share and have released real blocks exactly as they do here.

        The rows of the pool's first group come first, then those of the next.
        """
        pairs = set()
        groups = [g for g, group in enumerate(self.groups) if group.pool == pool]
        rows = [row.blocks[g] for g in groups for row in self.rows]
        for blocks, ids in zip(rows, block_ids, strict=True):
            padded = blocks + [None] * (len(ids) - len(blocks))
            assert [block is None for block in padded] == [block_id < 0 for block_id in ids]
            pairs |= {pair for pair in zip(padded, ids, strict=True) if pair[0]}
        assert len(pairs) == len({block for block, _ in pairs}) == len({i for _, i in pairs})

    def _free_row(self) -> Row:
        return Row([[] for _ in self.groups])

    def _exists(self, row: int) -> bool:
        return 0 <= row < len(self.rows)

    def _wrong_rows(self, rows: Sequence[int]) -> str | None:
        if not all(self._exists(row) for row in rows):
            return UNKNOWN_ROW
        return REPEATED_ROW if len(set(rows)) < len(rows) else None

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _needed(self, group: int, length: int) -> set[int]:
        """The positions that a query at `length` sees, and in any case the last token's."""
        window = self.groups[group].window or length + 1
        return {p for p in range(length + 1) if p > length - window or p == length - 1}

    def _is_gone(self, row: int, length: int) -> bool:
        """Whether a row, cut to `length`, could not go on."""
        return any(
            block is None and self._needed(g, length) & self._positions(index)
            for g, blocks in enumerate(self.rows[row].blocks)
            for index, block in enumerate(blocks)
        )

    def _passed(self, row: int) -> list[tuple[int, int]]:
        """The blocks that a row holds and no longer needs: group and logical index of each."""
        return [
            (g, index)
            for g, blocks in enumerate(self.rows[row].blocks)
            for index, block in enumerate(blocks)
            if block and not self._needed(g, self.seq_lens[row]) & self._positions(index)
        ]

    def _positions(self, logical_index: int) -> set[int]:
        first = logical_index * self.block_size
        return set(range(first, first + self.block_size))

    def _is_shared(self, block: Block) -> bool:
        return sum(block in blocks for row in self.rows for blocks in row.blocks) > 1

    def _shared_tails(self, named: Iterable[tuple[int, ...]]) -> list[tuple[int, int, int]]:
        """The blocks that other rows hold too and that end with the row's `n` tokens inside.

        Returns row, group and logical index of each.
        """
        tails = []
        for i, n in named:
            if n % self.block_size:
                index = n // self.block_size
                for g, blocks in enumerate(self.rows[i].blocks):
                    if blocks[index] and self._is_shared(blocks[index]):
                        tails.append((i, g, index))
        return tails

    def _replace(self, places: Iterable[tuple[int, int, int]]) -> None:
        for row, group, index in places:
            self.rows[row].blocks[group][index] = Block()

    def _has_room(self, taken: Iterable[int], freed: Iterable[int] = ()) -> bool:
        """Whether the pools have the blocks that are taken; of each block the group is given."""
        room = self.num_free
        for group in freed:
            room[self.groups[group].pool] += 1
        for group in taken:
            room[self.groups[group].pool] -= 1
        return min(room) >= 0

    def _grow(self, named: Sequence[tuple[int, ...]]) -> str | None:
        if any(n < 0 for _, n in named):
            return NEGATIVE
        new_lens = {i: self.seq_lens[i] + n for i, n in named}
        if any(n > self.max_blocks_per_seq * self.block_size for n in new_lens.values()):
            return TOO_LONG
        passed = [(i, *place) for i, n in named if n > 0 for place in self._passed(i)]
        freed = [g for i, g, index in passed if not self._is_shared(self.rows[i].blocks[g][index])]
        num_new = {
            (i, g): self._num_blocks(n) - len(self.rows[i].blocks[g])
            for i, n in new_lens.items()
            for g in range(len(self.groups))
        }
        if not self._has_room([g for (_, g), n in num_new.items() for _ in range(n)], freed):
            return NO_BLOCKS
        for i, g, index in passed:
            self.rows[i].blocks[g][index] = None
        for (i, g), n in num_new.items():
            self.rows[i].blocks[g] += [Block() for _ in range(n)]
        for i, n in named:
            self.rows[i].tokens += [None] * n
        return None


def _named(rows: Sequence[int], *others: Sequence[int]) -> list[tuple[int, ...]]:
    """Drops the pairs that are padding."""
    return [pair for pair in zip(rows, *others, strict=True) if pair[0] != NULL_SEQ]
