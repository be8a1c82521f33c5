"""A dull model of a manager of several devices: who holds which blocks, where, with what in them.

A cached block is named by what is in it, every other one by a number: so blocks are the same here
exactly where they are the same there. A token that is written is known by what its request read
up to it, so that equal beginnings have equal bytes, and all else is told apart. Nothing here asks
the manager but `learn`, `adopt`, and who has chosen how much of a prompt is still cached.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

import ferrum_jax as fj
from ferrum_jax import Device, errors
from tests.managers import BLOCK_SIZE
from tests.prefix_model import num_common

Block = Hashable
"""A block's name: `(salt, tokens up to its end)` if it is cached, or else a number."""


@dataclasses.dataclass
class Request:
    """What one request should hold.

    Attributes:
      handle: None once nobody holds one.
      device: Where it is, or to where it returns.
      salt: Whose it is.
      tokens: The truth, told to the manager or not.
      cells: What is written for each token, as `FacadeModel.cells_for` has it; 0 for nothing yet.
      blocks: Where its tokens are; none while it is away.
      num_cached: The first blocks, which it holds as cached ones.
      num_known: Tokens that the manager was told.
      num_computed: Those of them that it may take as computed.
      is_away: Whether it is swapped out.
      is_damaged: Whether its file is not what was written.
      adopted: Keys and values of each layer as they were read once, if from then on nobody knows
        better: what was changed at a loss. `cells` do not count then.
      block_size: Tokens that one of its blocks holds.
      num_pruned: Tokens that were dropped from it.
    """

    handle: Any
    device: Device
    salt: str | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    cells: list[int] = dataclasses.field(default_factory=list)
    blocks: list[Block] = dataclasses.field(default_factory=list)
    num_cached: int = 0
    num_known: int = 0
    num_computed: int = 0
    is_away: bool = False
    is_damaged: bool = False
    adopted: list[tuple[np.ndarray, np.ndarray]] | None = None
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
    def num_written(self) -> int:
        """Tokens, the first ones, that are written."""
        return next((i for i, cell in enumerate(self.cells) if not cell), len(self.cells))


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


class FacadeModel:
    """What a manager should hold, and how it should answer.

    Args:
      devices: Those with a pool.
      max_blocks: Blocks of each.
      max_rows: Requests on each.
      caches_prefixes: Whether prompts are cached.
      tiers: What waits behind each.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        max_blocks: int,
        max_rows: int,
        caches_prefixes: bool,
        tiers: dict[Device, Tiers],
    ):
        self.devices, self.max_blocks, self.max_rows = devices, max_blocks, max_rows
        self.caches_prefixes, self.tiers = caches_prefixes, tiers
        self.preference = list(devices)
        self.requests: dict[Any, Request] = {}
        self.num_allocated = self.num_refused = 0
        self._numbers = itertools.count()
        self._cells: dict[tuple, int] = {}

    # What is where.

    def on(self, device: Device) -> list[Request]:
        return [r for r in self.requests.values() if r.device == device and not r.is_away]

    def used(self, device: Device) -> int:
        """Blocks of a device that requests hold."""
        return len({block for request in self.on(device) for block in request.blocks})

    def num_holders(self, device: Device, block: Block) -> int:
        return sum(block in request.blocks for request in self.on(device))

    def spread(self) -> float:
        """By how much the preferred devices are differently full."""
        shares = [self.used(device) / self.max_blocks for device in self.preference]
        return max(shares) - min(shares)

    def shares_blocks(self) -> bool:
        """Whether requests on preferred devices share blocks, or could where they are moved."""
        blocks = [b for d in self.preference for r in self.on(d) for b in r.blocks]
        return len(set(blocks)) < len(blocks)

    def pressure(self) -> fj.MemoryPressure:
        share = sum(map(self.used, self.devices)) / (self.max_blocks * len(self.devices))
        return fj.MemoryPressure(sum(share >= threshold for threshold in (0.6, 0.8, 0.95)))

    def cells_for(self, salt: str | None, tokens: Sequence[int]) -> list[int]:
        """What is written for each token: another number wherever something before it differs."""
        names = [(salt, tuple(tokens[: i + 1])) for i in range(len(tokens))]
        return [self._cells.setdefault(name, len(self._cells) + 1) for name in names]

    def names(self, salt: str | None, tokens: Sequence[int]) -> list[Block]:
        """The names of a sequence's full blocks, were they cached."""
        ends = range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)
        return [(salt, tuple(tokens[:end])) for end in ends]

    # How it answers: the error, or None.

    def shortage(self, device: Device, num_blocks: int, held: int = 0):
        """How a request of so many blocks is refused there, some of which are held anyway."""
        if len(self.on(device)) == self.max_rows:
            return errors.OutOfRowsError
        return self.shortage_of_blocks(device, num_blocks - held)

    def shortage_of_blocks(self, device: Device, num_blocks: int):
        is_short = self.used(device) + num_blocks > self.max_blocks
        return errors.OutOfBlocksError if is_short else None

    def num_in_use(self, device: Device, salt: str | None, prompt: Sequence[int]) -> int:
        """Tokens of a prompt in full blocks that are surely cached there: somebody holds them.

        Of a block that matches in part, another that matches as far may be chosen, and go.
        """
        sure = [
            num_common(request.tokens[: request.num_cached * BLOCK_SIZE], prompt[:-1])
            for request in self.on(device)
            if request.salt == salt
        ]
        return max(sure, default=0) // BLOCK_SIZE * BLOCK_SIZE

    def home_for(self, num_tokens: int, first: Device, salt: str | None, prompt: Sequence[int]):
        """The device that takes a request, and how it is refused if there is none."""
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        refusals = {}
        for device in dict.fromkeys([first, *self.preference]):
            held = self.num_in_use(device, salt, prompt) // BLOCK_SIZE
            refusals[device] = self.shortage(device, num_blocks, held)
        fitting = [device for device, refusal in refusals.items() if refusal is None]
        return (fitting[0], None) if fitting else (None, refusals[first])

    def refusal_to_wait(self, i: int, device: Device, disk_is_full: bool):
        """How tiers of a device refuse a request's blocks."""
        tiers, num_blocks = self.tiers[device], self.requests[i].num_blocks
        if tiers.writes(num_blocks) and (disk_is_full or not tiers.has_disk):
            return errors.OutOfHostMemoryError
        return None

    def refusal_to_move(self, i: int, target: Device, disk_is_full: bool = False):
        if target not in self.devices:
            return errors.GeometryMismatchError
        if i not in self.requests:
            return errors.UnknownRequestError
        request = self.requests[i]
        if request.device == target:
            return None
        if not request.is_away:
            return self.shortage(target, request.num_blocks)
        if request.is_damaged:
            return errors.CorruptFileError
        return self.refusal_to_wait(i, target, disk_is_full)

    def refusal_to_return(self, i: int):
        if i not in self.requests:
            return errors.UnknownRequestError
        request = self.requests[i]
        if not request.is_away:
            return None
        refusal = self.shortage(request.device, request.num_blocks)
        return refusal or (errors.CorruptFileError if request.is_damaged else None)

    def num_new_to_share(self, target: Request, num_tokens: int) -> int:
        """Blocks that a request takes to hold so many tokens of another: for a shared tail."""
        num_full, num_tail = divmod(num_tokens, BLOCK_SIZE)
        if not num_tail or num_full < target.num_cached:
            return 0
        return int(self.num_holders(target.device, target.blocks[num_full]) > 1)

    # What changes.

    def fresh(self, num_blocks: int) -> list[Block]:
        return [next(self._numbers) for _ in range(num_blocks)]

    def begin(self, i: int, request: Request, num_found: int) -> None:
        """A request begins with so many tokens of its prompt that were cached."""
        names = self.names(request.salt, request.tokens)[: num_found // BLOCK_SIZE]
        request.num_cached, request.num_computed = len(names), num_found
        request.blocks = [*names, *self.fresh(request.num_blocks - len(names))]
        request.cells = [0] * len(request.tokens)
        request.cells[:num_found] = self.cells_for(request.salt, request.tokens[:num_found])
        self.requests[i] = request
        self.num_allocated += 1

    def grow(self, i: int, tokens: Sequence[int]) -> None:
        request = self.requests[i]
        request.blocks += self.fresh(request.num_blocks_with(len(tokens)) - request.num_blocks)
        request.tokens += tokens
        request.cells += [0] * len(tokens)

    def commit(self, i: int, num_tokens: int) -> int:
        """Tokens of a request are known and computed; returns how many of them are cached."""
        request = self.requests[i]
        request.num_known = request.num_computed = num_tokens
        self.cache(request)
        return request.num_cached * BLOCK_SIZE

    def cache(self, request: Request) -> None:
        """Caches what is computed of a request, up to the first block that it shares uncached."""
        if not self.caches_prefixes or request.adopted is not None:
            return
        names = self.names(request.salt, request.tokens[: request.num_computed])
        for place in range(request.num_cached, len(names)):
            if self.num_holders(request.device, request.blocks[place]) > 1:
                break
            request.blocks[place] = names[place]
            request.num_cached = place + 1

    def share(self, source: Request, target: Request, num_tokens: int) -> None:
        num_full, num_tail = divmod(num_tokens, BLOCK_SIZE)
        num_leased = target.num_cached
        if num_tokens <= num_leased * BLOCK_SIZE:
            return  # It holds cached blocks with these tokens.
        if num_tail and self.num_new_to_share(target, num_tokens):
            target.blocks[num_full] = self.fresh(1)[0]
        kept = target.blocks[:num_leased]
        target.blocks[:num_full] = source.blocks[:num_full]
        num_shared = min(source.num_cached, num_full)
        target.blocks[num_shared:num_leased] = kept[num_shared:]
        target.num_cached = max(num_shared, num_leased)
        target.cells[:num_tokens] = source.cells[:num_tokens]
        if source.num_computed < num_tokens:
            num_computed = max(source.num_computed, num_leased * BLOCK_SIZE)
            target.num_computed = min(target.num_computed, num_computed)

    def leave(self, i: int) -> None:
        """A request is swapped out."""
        request = self.requests[i]
        self.tiers[request.device].put(i, request.num_blocks)
        request.blocks, request.num_cached, request.is_away = [], 0, True

    def come(self, i: int) -> None:
        """A request's bytes arrive on its device, in blocks of their own."""
        request = self.requests[i]
        self.tiers[request.device].drop(i)
        request.is_away, request.num_cached = False, 0
        request.blocks = self.fresh(request.num_blocks)
        self.cache(request)

    def move(self, i: int, target: Device) -> None:
        request = self.requests[i]
        if request.device == target:
            return
        self.tiers[request.device].drop(i)
        request.device = target
        if request.is_away:
            self.tiers[target].put(i, request.num_blocks)
        else:
            self.come(i)

    def end(self, i: int) -> Request:
        request = self.requests.pop(i)
        self.tiers[request.device].drop(i)
        return request

    def adopt(self, i: int, read: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Takes what a request reads as the truth, and how many blocks it has for it.

        It is for what changes bytes at a loss, so that no oracle knows them beforehand: they
        must stay as they are from now on, wherever they go.
        """
        request = self.requests[i]
        request.adopted, request.num_cached = read, 0
        request.num_pruned = len(request.tokens) - len(read[0][0])
        request.block_size = request.handle.entry().block_size
        request.blocks = self.fresh(request.handle.stats().blocks_allocated)
