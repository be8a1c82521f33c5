"""What the model of a manager of several devices is made of: requests, blocks, what is cached."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from ferrum_jax import Device, Priority
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS

Name = tuple[str | None, tuple[int, ...]]
"""What is in a cached block: its salt, and all tokens up to its end."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What the keys and values of a token tell.

    Attributes:
      tokens: All tokens up to it, itself included.
      salt: Of the request that computed it.
      version: The weights: resets of all prefixes, and of those of the salt.
      noise: Tells apart what was computed twice.
    """

    tokens: tuple[int, ...]
    salt: str | None
    version: tuple[int, int]
    noise: int


@dataclasses.dataclass(eq=False)
class Block:
    """A block of a pool.

    Attributes:
      cells: What is written in each slot, an index of `FacadeModel.written`; 0 for nothing yet.
      is_native: Whether it is; else nobody knows what is in it, and its cells do not count.
      kept: What it is cached as, if it is.
    """

    cells: list[int] = dataclasses.field(default_factory=lambda: [0] * BLOCK_SIZE)
    is_native: bool = True
    kept: "Kept | None" = None

    @property
    def is_kept(self) -> bool:
        return self.kept is not None

    def copy(self) -> "Block":
        """Another block with the same bytes."""
        return Block(list(self.cells), self.is_native)


@dataclasses.dataclass(eq=False)
class Kept:
    """A cached block.

    Attributes:
      salt: Under which it is cached.
      tokens: All tokens up to its end.
      block: Where they are.
      expires_at: When it has gone unused for too long, if nobody uses it.
      real: What the manager has for it, once that was seen.
    """

    salt: str | None
    tokens: tuple[int, ...]
    block: Block
    expires_at: float = -math.inf
    real: Any = None


class Origin:
    """One token as it came into a request, and into those that share it; known to all or none."""

    def __init__(self, is_known: bool = False):
        self.is_known, self._parent = is_known, None

    @property
    def root(self) -> "Origin":
        return self if self._parent is None else self._parent.root

    def join(self, other: "Origin") -> None:
        """Both are one token from now on."""
        one, two = self.root, other.root
        if one is not two:
            one._parent, two.is_known = two, one.is_known or two.is_known


def merge(one: "Request", other: "Request", num_tokens: int) -> None:
    """The first tokens of two requests are the same from now on."""
    for first, second in zip(one.origins[:num_tokens], other.origins[:num_tokens], strict=True):
        first.join(second)


@dataclasses.dataclass(eq=False)
class Request:
    """What one request should hold.

    Attributes:
      handle: None once nobody holds one.
      device: Where it is, or to where it returns.
      salt: Whose it is.
      priority: How urgent.
      tokens: The truth, told to the manager or not.
      limit: Tokens that it may be extended to.
      origins: Where each token is from.
      blocks: Where its tokens are; none while it is away.
      num_told: Tokens that the manager was told of this request.
      num_computed: Those of them that it takes as computed.
      max_computed: Tokens that can be computed: its length when a step last had it.
      may_be_cached: Whether it was computed since the last reset.
      is_pinned: What its last commit that spoke of retention said; None for nothing.
      num_retained: Tokens that this was about.
      is_away: Whether it is swapped out.
      blocks_away: Its bytes, while it is.
      kept_away: The cached blocks that it held when it left.
      is_damaged: Whether its file is not what was written.
      adopted: Keys and values of each layer as they were read once, if from then on nobody knows
        better: what was changed at a loss. Its blocks' cells do not count then.
      num_adopted_written: Tokens that are written of it then.
      block_size: Tokens that one of its blocks holds.
      num_pruned: Tokens that were dropped from it.
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

    @property
    def num_blocks(self) -> int:
        """Blocks that it takes on a device."""
        return self.num_blocks_with(0)

    def num_blocks_with(self, num_tokens: int) -> int:
        """Blocks that it takes with so many more tokens."""
        return -(-(len(self.tokens) - self.num_pruned + num_tokens) // self.block_size)

    @property
    def cells(self) -> list[int]:
        """What is written for each token."""
        blocks = self.blocks_away if self.is_away else self.blocks
        return [cell for block in blocks for cell in block.cells][: len(self.tokens)]

    @property
    def num_written(self) -> int:
        """Tokens, the first ones, that are written."""
        if self.adopted is not None:
            return self.num_adopted_written
        cells = self.cells
        return next((i for i, cell in enumerate(cells) if not cell), len(cells))

    @property
    def num_known(self) -> int:
        """Tokens, the first ones, that are known: of itself, or of one that shares them."""
        known = [origin.root.is_known for origin in self.origins]
        return known.index(False) if False in known else len(known)

    @property
    def lease(self) -> list[Kept]:
        """The cached blocks that it holds, its first ones."""
        blocks = itertools.takewhile(lambda block: block.is_kept, self.blocks)
        return [block.kept for block in blocks if block.kept]


@dataclasses.dataclass
class Tiers:
    """What waits behind one device: the least recently used go from host memory to disk.

    Attributes:
      max_host_blocks: Room in host memory.
      has_disk: Whether there is a disk; it has room until it is said to be full.
      host: Blocks of who waits in host memory, the least recently used first.
      disk: Blocks of who waits on disk.
    """

    max_host_blocks: int
    has_disk: bool
    host: dict[int, int] = dataclasses.field(default_factory=dict)
    disk: dict[int, int] = dataclasses.field(default_factory=dict)

    def displaced_by(self, num_blocks: int) -> list[int]:
        """Who has to leave host memory for so many blocks."""
        displaced, missing = [], sum(self.host.values()) + num_blocks - self.max_host_blocks
        for i, size in self.host.items():
            if missing > 0 and size:
                displaced.append(i)
                missing -= size
        return displaced

    def writes(self, num_blocks: int) -> bool:
        """Whether so many blocks more need the disk."""
        return num_blocks > self.max_host_blocks or bool(self.displaced_by(num_blocks))

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
