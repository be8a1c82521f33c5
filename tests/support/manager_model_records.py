"""Records of the model of a manager: requests, blocks, cached blocks, tiers."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from ferrum_jax import Device, Priority
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS

Name = tuple[Any, tuple[int, ...]]
"""Identity of a cached block: its salt, or salt and version, and all tokens up to its end."""


def salt_of(name: Name) -> str | None:
    """The salt of a cached block."""
    return name[0][0] if isinstance(name[0], tuple) else name[0]


def version_of(name: Name) -> int | None:
    """The version of the weights of a cached block."""
    return name[0][1] if isinstance(name[0], tuple) else None


def follows(name: Name, other: Name) -> bool:
    """Whether a cached block continues the sequence of another one."""
    return name[0] == other[0] and name != other and name[1][: len(other[1])] == other[1]


@dataclasses.dataclass(frozen=True)
class Written:
    """What the keys and values of a token depend on.

    Attributes:
      tokens: All tokens of the sequence up to this one.
      salt: Salt of the request that computed them.
      version: Resets of all prefixes, resets of those of the salt, and version of the weights.
      noise: Distinguishes two computations of the same tokens.
    """

    tokens: tuple[int, ...]
    salt: str | None
    version: tuple[int, int, int | None]
    noise: int


@dataclasses.dataclass(eq=False)
class Block:
    """A block of a pool.

    Attributes:
      cells: What is written in each slot, an index of `Writes.written`; 0 for nothing.
      is_native: Whether its tokens are native; else the model does not know its bytes.
      group: Its layer group: 1 for that of a window.
      kept: The cached block that it is, if any.
    """

    cells: list[int] = dataclasses.field(default_factory=lambda: [0] * BLOCK_SIZE)
    is_native: bool = True
    kept: "Kept | None" = None
    group: int = 0

    @property
    def is_kept(self) -> bool:
        return self.kept is not None

    def copy(self) -> "Block":
        """Another block with the same bytes."""
        return Block(list(self.cells), self.is_native, group=self.group)


@dataclasses.dataclass(eq=False)
class Kept:
    """A cached block.

    Attributes:
      salt: Salt of the tokens, or salt and version.
      tokens: All tokens up to its end.
      block: The block.
      expires_at: Clock time at which it expires unless a request uses it.
      real: The block that the manager has cached, once it was seen.
    """

    salt: Any
    tokens: tuple[int, ...]
    block: Block
    expires_at: float = -math.inf
    real: Any = None


class Origin:
    """One token of the requests that share it; the manager knows it for all of them or none."""

    def __init__(self, is_known: bool = False):
        self.is_known, self._parent = is_known, None

    @property
    def root(self) -> "Origin":
        return self if self._parent is None else self._parent.root

    def join(self, other: "Origin") -> None:
        """Makes both one token."""
        one, two = self.root, other.root
        if one is not two:
            one._parent, two.is_known = two, one.is_known or two.is_known


def merge(one: "Request", other: "Request", num_tokens: int) -> None:
    """Makes the first tokens of two requests the same tokens."""
    for first, second in zip(one.origins[:num_tokens], other.origins[:num_tokens], strict=True):
        first.join(second)


@dataclasses.dataclass(eq=False)
class Request:
    """What one request should hold.

    Attributes:
      handle: Its handle; None once the caller has dropped it.
      device: Its device, or the device that it returns to.
      salt: Its salt.
      version: Version of the weights when it started.
      priority: Its priority.
      tokens: Its true tokens, known to the manager or not.
      limit: Maximum of tokens.
      origins: The shared identity of each token.
      blocks: Its blocks; empty while it is swapped out.
      num_told: Tokens that were passed to the manager for this request.
      num_computed: Those of them that the manager takes as computed.
      max_computed: Tokens that can be computed: its length at its last step.
      may_be_cached: Whether it was computed since the last reset.
      is_pinned: Retention of its last commit that named one; None for none.
      num_retained: Tokens of that commit.
      is_away: Whether it is swapped out.
      blocks_away: Its bytes while it is swapped out.
      kept_away: The cached blocks that it held when it was swapped out.
      is_damaged: Whether its file is damaged.
      adopted: Keys and values of each layer as they were read, if the model cannot predict them
        because a compression was lossy. The cells of its blocks do not count then.
      num_adopted_written: Tokens of it that are written then.
      block_size: Tokens per block.
      num_pruned: Tokens that a compression has dropped.
      window: Sliding window of its second layer group; None if there is none.
      local: Its blocks in that group; None for those that the window has passed.
      local_away: Their bytes while it is swapped out.
    """

    handle: Any
    device: Device
    salt: str | None = None
    priority: Priority = Priority.Normal
    tokens: list[int] = dataclasses.field(default_factory=list)
    limit: int = MAX_TOKENS
    origins: list[Origin] = dataclasses.field(default_factory=list)
    blocks: list[Block] = dataclasses.field(default_factory=list)
    num_told: int = 0
    num_computed: int = 0
    max_computed: int = 0
    may_be_cached: bool = True
    is_pinned: bool | None = None
    num_retained: int = 0
    is_away: bool = False
    blocks_away: list[Block] = dataclasses.field(default_factory=list)
    kept_away: list[Kept] = dataclasses.field(default_factory=list)
    is_damaged: bool = False
    adopted: list[tuple[np.ndarray, np.ndarray]] | None = None
    num_adopted_written: int = 0
    block_size: int = BLOCK_SIZE
    num_pruned: int = 0
    window: int | None = None
    local: list[Block | None] = dataclasses.field(default_factory=list)
    local_away: list[Block | None] = dataclasses.field(default_factory=list)
    version: int | None = None

    @property
    def key(self) -> Any:
        """What names of its cached blocks begin with."""
        return self.salt if self.version is None else (self.salt, self.version)

    @property
    def num_blocks(self) -> int:
        """Blocks that it needs on a device."""
        return self.num_full + self.num_local - self.num_released

    @property
    def num_full(self) -> int:
        """Blocks that it needs in the group that keeps all tokens."""
        return -(-(len(self.tokens) - self.num_pruned) // self.block_size)

    @property
    def num_local(self) -> int:
        """Blocks of its tokens in the group of the window, those that it has passed included."""
        return 0 if self.window is None else -(-len(self.tokens) // BLOCK_SIZE)

    @property
    def num_released(self) -> int:
        """Blocks that the window has passed."""
        return (self.local_away if self.is_away else self.local).count(None)

    @property
    def held(self) -> list[Block]:
        """Its blocks on the device, of both groups."""
        return [*self.blocks, *(block for block in self.local if block)]

    def num_new_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` more tokens take."""
        longer = len(self.tokens) + num_tokens
        num_full = -(-(longer - self.num_pruned) // self.block_size)
        num_local = 0 if self.window is None else -(-longer // BLOCK_SIZE)
        return num_full - self.num_full + num_local - self.num_local

    def first_needed(self, num_tokens: int) -> int:
        """The first block of the window's group that tokens after `num_tokens` need."""
        if self.window is None:
            return 0
        # The last token's block is kept, whatever the window.
        return max(0, min(num_tokens - self.window + 1, num_tokens - 1)) // BLOCK_SIZE

    @property
    def passed(self) -> list[Block]:
        """The blocks that the next extension releases."""
        return [b for b in self.local[: self.first_needed(len(self.tokens))] if b]

    @property
    def tails(self) -> list[int]:
        """Tokens in the partly filled last block of each group, 0 if it is full."""
        tails = [(len(self.tokens) - self.num_pruned) % self.block_size]
        return tails if self.window is None else [*tails, len(self.tokens) % BLOCK_SIZE]

    @property
    def num_tails(self) -> int:
        """Blocks that are partly filled."""
        return sum(tail > 0 for tail in self.tails)

    @property
    def num_in_full_blocks(self) -> int:
        """Tokens of which a group has the block that others would share."""
        return len(self.tokens) - min(self.tails)

    def fork(self, handle: Any) -> "Request":
        """Another request with the same tokens: it shares full blocks, and has copies of others."""
        num_full = (len(self.tokens) - self.num_pruned) // self.block_size
        num_local = len(self.tokens) // BLOCK_SIZE
        new = dataclasses.replace(
            self,
            handle=handle,
            tokens=list(self.tokens),
            origins=[Origin() for _ in self.tokens],
            blocks=[*self.blocks[:num_full], *(block.copy() for block in self.blocks[num_full:])],
            local=[*self.local[:num_local], *(b and b.copy() for b in self.local[num_local:])],
        )
        merge(self, new, len(self.tokens))
        return new

    @property
    def cells(self) -> list[int]:
        """What is written for each token, as indices."""
        blocks = self.blocks_away if self.is_away else self.blocks
        return [cell for block in blocks for cell in block.cells][: len(self.tokens)]

    @property
    def local_cells(self) -> list[int]:
        """The same in the window's group; 0 for tokens in released blocks."""
        blocks = [block.cells if block else [0] * BLOCK_SIZE for block in self.local]
        return [cell for cells in blocks for cell in cells][: len(self.tokens)]

    def leave(self) -> None:
        """Moves its bytes away from the device."""
        self.blocks_away = [block.copy() for block in self.blocks]
        self.local_away = [block and block.copy() for block in self.local]
        self.blocks, self.local = [], []

    def arrive(self) -> None:
        """Restores its bytes on a device."""
        self.blocks, self.local = self.blocks_away, self.local_away

    @property
    def num_written(self) -> int:
        """Number of first tokens that are written."""
        if self.adopted is not None:
            return self.num_adopted_written
        cells = self.cells
        return next((i for i, cell in enumerate(cells) if not cell), len(cells))

    @property
    def num_known(self) -> int:
        """Number of first tokens that the manager knows, of this request or a sharing one."""
        known = [origin.root.is_known for origin in self.origins]
        return known.index(False) if False in known else len(known)

    @property
    def lease(self) -> list[Kept]:
        """The cached blocks that it begins with."""
        blocks = itertools.takewhile(lambda block: block.is_kept, self.blocks)
        return [block.kept for block in blocks if block.kept]


@dataclasses.dataclass
class Tiers:
    """The requests of one device that are swapped out; old ones move from host memory to disk.

    Attributes:
      max_host_blocks: Blocks that host memory takes.
      has_disk: Whether there is a disk tier, with room for every request.
      host: Blocks per request in host memory, the least recently used request first.
      disk: Blocks per request on disk.
    """

    max_host_blocks: int
    has_disk: bool
    host: dict[int, int] = dataclasses.field(default_factory=dict)
    disk: dict[int, int] = dataclasses.field(default_factory=dict)

    def displaced_by(self, num_blocks: int) -> list[int]:
        """Requests that move to disk to make room for `num_blocks` in host memory."""
        displaced, missing = [], sum(self.host.values()) + num_blocks - self.max_host_blocks
        for i, size in self.host.items():
            if missing > 0 and size:
                displaced.append(i)
                missing -= size
        return displaced

    def writes(self, num_blocks: int) -> bool:
        """Whether `num_blocks` more need the disk."""
        return num_blocks > self.max_host_blocks or bool(self.displaced_by(num_blocks))

    def refuses(self, num_blocks: int, disk_is_full: bool) -> bool:
        """Whether there is no room for `num_blocks` more."""
        return self.writes(num_blocks) and (disk_is_full or not self.has_disk)

    def put(self, i: int, num_blocks: int) -> None:
        if num_blocks > self.max_host_blocks:
            self.disk[i] = num_blocks
            return
        for other in self.displaced_by(num_blocks):
            self.disk[other] = self.host.pop(other)
        self.host[i] = num_blocks

    def drop(self, i: int) -> None:
        self.host.pop(i, None)
        self.disk.pop(i, None)


class Writes:
    """What requests have written, and under which version of the weights.

    Attributes:
      written: What was written, by the index that a block's cell has; the first is nothing.
      weights: Present version of the weights.
      num_resets: Resets of each salt; of all salts under `EVERY`.
    """

    EVERY = "every salt"

    def __init__(self) -> None:
        self.written = [Written((), None, (0, 0, None), 0)]
        self.weights: int | None = None
        self.num_resets: dict[str | None, int] = {}
        self._cells: dict[Written, int] = {}

    def count_reset(self, salt: str | None) -> None:
        """Counts a reset of a salt, or of all salts."""
        scope = self.EVERY if salt is None else salt
        self.num_resets[scope] = self.num_resets.get(scope, 0) + 1

    def version(self, salt: str | None) -> tuple[int, int, int | None]:
        """What is written for a salt depends on: resets, and the version of the weights."""
        return self.num_resets.get(self.EVERY, 0), self.num_resets.get(salt, 0), self.weights

    def cells_for(self, request: Request, begin: int, end: int, noise: int) -> list[int]:
        """Indices of what a request writes for its tokens from `begin` to `end`."""
        cells = []
        for i in range(begin, end):
            salt, tokens = request.salt, tuple(request.tokens[: i + 1])
            fact = Written(tokens, salt, self.version(salt), noise)
            if fact not in self._cells:
                self._cells[fact] = len(self.written)
                self.written.append(fact)
            cells.append(self._cells[fact])
        return cells

    def is_sound(self, kept: Kept) -> bool:
        """Whether a cached block holds what its version computed for its tokens since a reset."""
        begin, name = len(kept.tokens) - BLOCK_SIZE, (kept.salt, kept.tokens)
        for place, cell in enumerate(kept.block.cells):
            fact, (every, own, _) = self.written[cell], self.version(salt_of(name))
            is_own = fact.salt == salt_of(name)
            if fact.tokens != kept.tokens[: begin + place + 1] or fact.version[0] != every:
                return False
            if fact.version[2] != version_of(name):
                return False
            if is_own and fact.version[1] != own:
                return False
        return True
