"""A dull model of a manager of several devices: who holds which blocks, where, with what in them.

A block is an object here, and its cells say what was written into its slots: so all that requests
and cached prefixes hold has one truth for its bytes, and whatever is shared is the same object.
Nothing here asks the manager; what it has chosen (which cached blocks went, who was swapped out)
is told by whoever drives both.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import ferrum_jax as fj
from ferrum_jax import Device, PrefixCacheConfig, Priority, errors
from tests.support.facade_records import Block, Kept, Name, Origin, Request, Tiers, Written
from tests.support.facade_scenarios import KEEP_ALL
from tests.support.managers import BLOCK_SIZE
from tests.support.prefix_model import num_common


class FacadeModel:
    """What a manager should hold, and how it should answer.

    Args:
      devices: Those with a pool.
      max_blocks: Blocks of each.
      max_rows: Requests on each.
      config: Which prompts are cached; None for none.
      policy: How whoever chooses requests to swap out answers, the host having room; None if
        none are.
      tiers: What waits behind each.

    Attributes:
      now: Seconds of the clock.
      requests: All that are live.
      cached: What is cached on each device, by salt and tokens.
      pins: Ends of the pinned prefixes of each device.
      taken: Blocks that were taken for no request, on each device.
      num_resets: Resets of each salt; of all of them under `EVERY`.
    """

    EVERY = "every salt"

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        max_blocks: int,
        max_rows: int,
        config: PrefixCacheConfig | None,
        policy: str | None,
        tiers: dict[Device, Tiers],
    ):
        self.devices, self.max_blocks, self.max_rows = devices, max_blocks, max_rows
        self.config, self.policy, self.tiers, self.now = config, policy, tiers, 0.0
        self.preference = list(devices)
        self.requests: dict[Any, Request] = {}
        self.cached: dict[Device, dict[Name, Kept]] = {device: {} for device in devices}
        self.pins: dict[Device, set[Name]] = {device: set() for device in devices}
        self.taken: dict[Device, list[int]] = {device: [] for device in devices}
        self.num_resets: dict[str | None, int] = {}
        self.num_allocated = self.num_refused = self.num_preempted = 0
        self.num_prompt_tokens = self.num_reused_tokens = 0
        self.written = [Written((), None, (0, 0), 0)]
        self._cells: dict[Written, int] = {}

    # What is where.

    def on(self, device: Device) -> dict[int, Request]:
        return {i: r for i, r in self.requests.items() if r.device == device and not r.is_away}

    def in_use(
        self, device: Device, but: Collection[int] = (), more: Iterable[Block] = ()
    ) -> set[Block]:
        """Blocks that cannot go: of requests (but some), and pinned, and some more."""
        held = {b for i, r in self.on(device).items() if i not in but for b in r.blocks}
        return held | {kept.block for kept in self.pinned(device)} | set(more)

    def pinned(self, device: Device) -> list[Kept]:
        cached = self.cached[device]
        return [cached[name] for pin in self.pins[device] for name in self.names(*pin)]

    def used(self, device: Device) -> int:
        """Blocks of a device that requests hold, or callers, or pins."""
        return len(self.in_use(device)) + len(self.taken[device])

    def num_holders(self, device: Device, block: Block) -> int:
        """References of a block: requests, and the prefix cache."""
        return sum(block in r.blocks for r in self.on(device).values()) + block.is_kept

    def spread(self) -> float:
        """By how much the preferred devices are differently full."""
        shares = [self.used(device) / self.max_blocks for device in self.preference]
        return max(shares) - min(shares)

    def shares_blocks(self) -> bool:
        """Whether requests on preferred devices share blocks."""
        blocks = [b for d in self.preference for r in self.on(d).values() for b in r.blocks]
        return len(set(blocks)) < len(blocks)

    def pressure(self) -> fj.MemoryPressure:
        share = sum(map(self.used, self.devices)) / (self.max_blocks * len(self.devices))
        return fj.MemoryPressure(sum(share >= threshold for threshold in (0.6, 0.8, 0.95)))

    # What is written.

    def version(self, salt: str | None) -> tuple[int, int]:
        """The weights that are used for a salt: others after each reset."""
        return self.num_resets.get(self.EVERY, 0), self.num_resets.get(salt, 0)

    def cells_for(self, request: Request, begin: int, end: int, noise: int) -> list[int]:
        """What a request writes for its tokens: its salt, its weights, its noise, all tokens."""
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
        """Whether a cached block holds what a prefill of its tokens has written since a reset."""
        begin = len(kept.tokens) - BLOCK_SIZE
        for place, cell in enumerate(kept.block.cells):
            fact, (every, own) = self.written[cell], self.version(kept.salt)
            is_own = fact.salt == kept.salt
            if fact.tokens != kept.tokens[: begin + place + 1] or fact.version[0] != every:
                return False
            if is_own and fact.version[1] != own:
                return False
        return True

    # What is cached.

    def names(self, salt: str | None, tokens: Sequence[int]) -> list[Name]:
        """The names of a sequence's full blocks, were they cached."""
        ends = range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def shares(self, salt: str | None) -> bool:
        """Whether prompts of a salt are cached now."""
        config = self.config
        return config is not None and (salt is not None or config.enable_cross_request_sharing)

    def is_alive(self, device: Device, kept: Kept) -> bool:
        """Whether a cached block has not gone unused for too long."""
        if self.now < kept.expires_at:
            return True
        held = {x for r in self.on(device).values() for x in r.lease}
        return kept in held or kept in self.pinned(device)

    def alive(self, device: Device, salt: str | None) -> list[Kept]:
        cached = self.cached[device].values()
        return [kept for kept in cached if kept.salt == salt and self.is_alive(device, kept)]

    def found(self, device: Device, salt: str | None, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that a dull search finds, at least one being left to compute."""
        alive = self.alive(device, salt) if self.shares(salt) else []
        most = max((num_common(kept.tokens, prompt[:-1]) for kept in alive), default=0)
        return most if self.config and most >= self.config.min_prefix_length else 0

    def retain(self, keeps: Iterable[Kept]) -> None:
        """Counts the time to live of cached blocks from now."""
        for kept in keeps:
            kept.expires_at = max(kept.expires_at, self.now + KEEP_ALL.prefix_ttl_seconds)

    def uncache(self, device: Device, keeps: Iterable[Kept]) -> None:
        """Cached blocks go, with all that follows them, though requests may hold them."""
        for first in keeps:
            for name in list(self.cached[device]):
                if name == (first.salt, first.tokens) or _follows(name, (first.salt, first.tokens)):
                    self.forget(device, name)

    def forget(self, device: Device, name: Name) -> None:
        """A cached block is one no more."""
        self.cached[device].pop(name).block.kept = None
        self.pins[device].discard(name)

    def reset(self, salt: str | None) -> None:
        """Nothing of a salt, or of any, is found again."""
        scope = self.EVERY if salt is None else salt
        self.num_resets[scope] = self.num_resets.get(scope, 0) + 1
        for device in self.devices:
            for name in list(self.cached[device]):
                if salt in (None, name[0]):
                    self.forget(device, name)
        for request in self.requests.values():
            if salt in (None, request.salt):
                request.may_be_cached, request.kept_away = False, []

    def may_cache(self, request: Request) -> bool:
        return self.shares(request.salt) and request.may_be_cached and request.adopted is None

    def num_computed(self, request: Request, num_tokens: int) -> tuple[int, int]:
        """Tokens of a request that a commit of so many takes as computed, and those that stay so.

        Blocks are looked at only if some of them could be cached.
        """
        known = min(num_tokens, request.num_computed)
        bound = max(min(num_tokens, request.max_computed), known)
        if bound // BLOCK_SIZE <= len(request.lease) or not self.may_cache(request):
            return bound, min(bound, len(request.lease) * BLOCK_SIZE)
        cells = request.cells[known:bound]
        num_written = known + next((i for i, cell in enumerate(cells) if not cell), len(cells))
        return num_written, num_written

    def commit(self, request: Request, num_told: int, num_claimed: int, is_pinned: Any) -> int:
        """Tokens of a request are known and some computed; returns how many of it are cached."""
        _, num_sure = self.num_computed(request, min(num_claimed, num_told))
        request.num_told = num_told
        request.num_computed = max(request.num_computed, num_sure)
        self.tell(request, num_told)
        if request.num_computed // BLOCK_SIZE > len(request.lease) or is_pinned is not None:
            self.keep(request, is_pinned)
        if is_pinned is not None:
            request.is_pinned, request.num_retained = is_pinned, request.num_computed
        return len(request.lease) * BLOCK_SIZE

    def keep(
        self,
        request: Request,
        is_pinned: bool | None,
        own: Sequence[Kept] | None = None,
        num_retained: int = 99,
    ) -> None:
        """Caches what is computed of a request, up to the first block that it shares uncached.

        Equal blocks that are cached take the place of its own; if `own` are given, only these.
        """
        if not self.may_cache(request):
            return
        device, num_leased = request.device, len(request.lease)
        names = self.names(request.salt, request.tokens[: request.num_computed])
        for place in range(num_leased, len(names)):
            if self.num_holders(device, request.blocks[place]) > 1:
                del names[place:]
                break
        is_long = len(names) * BLOCK_SIZE >= self.config.min_prefix_length
        if len(names) < max(1, num_leased) or not is_long:
            return
        cached, place = self.cached[device], num_leased
        while place < len(names) and names[place] in cached:
            kept = cached[names[place]]
            if own is not None and (place >= len(own) or own[place] is not kept):
                break
            request.blocks[place] = kept.block
            place += 1
        is_known = place < len(names) and names[place] in cached
        if not is_known and self.has_room_for(device, names, place):
            for block, name in zip(request.blocks[place:], names[place:], strict=False):
                cached[name] = block.kept = Kept(*name, block)
        covered = names[: len(request.lease)]
        if is_pinned is not None:
            kept_names = covered[:num_retained]
            if is_pinned and kept_names:
                self.pins[device].add(kept_names[-1])
            elif not is_pinned:
                self.pins[device] -= set(kept_names)
        self.retain(request.lease)

    def has_room_for(self, device: Device, names: Sequence[Name], num_found: int) -> bool:
        """Whether blocks may be cached behind the first ones, which are."""
        cached = self.cached[device]
        leaves = [n for n in cached if not any(_follows(other, n) for other in cached)]
        is_longer = num_found and names[num_found - 1] in leaves  # It is one prefix still.
        return bool(is_longer) or len(leaves) < self.config.max_prefixes

    def tell(self, request: Request, num_tokens: int) -> None:
        """So many first tokens of a request are known."""
        for origin in request.origins[:num_tokens]:
            origin.root.is_known = True

    # How it answers: the error, or None.

    def fits(
        self,
        device: Device,
        num_new: int,
        priority: Priority = Priority.Low,
        *,
        but: Collection[int] = (),
        more: Sequence[Block] = (),
        num_rows: int = 0,
    ) -> bool:
        """Whether so many blocks and rows can be had, by swapping others out if need be."""
        residents, num_taken = self.on(device), len(self.taken[device])
        num_left = self.max_blocks - num_taken - len(self.in_use(device, more=more))
        num_rows_left = self.max_rows - len(residents)
        if num_new <= num_left and num_rows <= num_rows_left:
            return True
        victims = [i for i, r in residents.items() if r.priority < priority and i not in but]
        if self.policy == "lru":
            victims = [i for i in victims if residents[i].blocks]
        elif self.policy not in ("all", "last", "repeated"):
            victims = []
        num_left = self.max_blocks - num_taken - len(self.in_use(device, victims, more))
        return bool(victims) and num_new <= num_left and num_rows <= num_rows_left + len(victims)

    def shortage(self, device: Device, num_new: int, priority: Priority = Priority.Low, **more):
        """How a row of so many new blocks is refused there."""
        if self.fits(device, num_new, priority, num_rows=1, **more):
            return None
        is_crowded = len(self.on(device)) == self.max_rows
        return errors.OutOfRowsError if is_crowded else errors.OutOfBlocksError

    def home_for(self, request: Request, first: Device, prompt: Sequence[int]):
        """The device that takes a request, and how it is refused if there is none."""
        refusals = {}
        for priority in (Priority.Low, request.priority):
            for device in dict.fromkeys([first, *self.preference]):
                num_found = self.found(device, request.salt, prompt)
                names = self.names(request.salt, prompt[:num_found])
                blocks = [self.cached[device][name].block for name in names]
                num_new = request.num_blocks - len(blocks)
                refusals[device] = self.shortage(device, num_new, priority, more=blocks)
                if refusals[device] is None:
                    return device, None
        return None, refusals[first]

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
        refusal = self.shortage(request.device, request.num_blocks, request.priority)
        return refusal or (errors.CorruptFileError if request.is_damaged else None)

    # What changes.

    def begin(self, i: int, request: Request, prompt: Sequence[int], num_found: int) -> None:
        """A request begins with so many tokens of its prompt that were cached, in full blocks."""
        names = self.names(request.salt, prompt[:num_found])
        request.blocks = [self.cached[request.device][name].block for name in names]
        request.blocks += [Block() for _ in range(request.num_blocks - len(names))]
        request.origins = [Origin() for _ in request.tokens]
        request.num_told = len(prompt)
        self.tell(request, len(prompt))
        request.num_computed = request.max_computed = num_found
        self.requests[i] = request
        self.num_allocated += 1
        if prompt and self.config:
            self.num_prompt_tokens += len(prompt)
            self.num_reused_tokens += num_found

    def leave(self, i: int) -> None:
        """A request is swapped out."""
        request = self.requests[i]
        self.retain(request.lease)
        self.tiers[request.device].put(i, request.num_blocks)
        request.kept_away = request.lease
        request.blocks_away = [block.copy() for block in request.blocks]
        request.blocks, request.is_away = [], True

    def come(self, i: int) -> None:
        """A request's bytes arrive on its device; they stay its own, whatever is cached there."""
        request = self.requests[i]
        self.tiers[request.device].drop(i)
        request.is_away, request.blocks = False, request.blocks_away
        num_retained = min(request.num_retained, request.num_computed) // BLOCK_SIZE
        names = self.names(request.salt, request.tokens[: num_retained * BLOCK_SIZE])
        cached = self.cached[request.device]
        is_all = all(n in cached and self.is_alive(request.device, cached[n]) for n in names)
        is_pinned = None if is_all else request.is_pinned
        if request.num_computed >= BLOCK_SIZE:
            self.keep(request, is_pinned, request.kept_away, num_retained)
        request.kept_away = []

    def move(self, i: int, target: Device) -> None:
        request = self.requests[i]
        if request.device == target:
            return
        self.tiers[request.device].drop(i)
        request.origins = [Origin(origin.root.is_known) for origin in request.origins]
        if request.is_away:
            request.device, request.kept_away = target, []
            self.tiers[target].put(i, request.num_blocks)
            return
        self.retain(request.lease)
        request.blocks_away = [block.copy() for block in request.blocks]
        request.blocks, request.device, request.kept_away = [], target, []
        self.come(i)

    def end(self, i: int) -> Request:
        request = self.requests.pop(i)
        self.retain(request.lease)
        self.tiers[request.device].drop(i)
        return request


def _follows(name: Name, other: Name) -> bool:
    """Whether a prefix goes on with what follows another."""
    return name[0] == other[0] and name != other and name[1][: len(other[1])] == other[1]
