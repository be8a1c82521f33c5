"""A simple model of a manager of several devices: which request holds which blocks and bytes.

A block is an object, and its cells say what was written into its slots. Requests and cached
prefixes that share a block share the object. The model does not ask the manager: the test tells
it what the manager has chosen (which cached blocks were evicted, which requests preempted).
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import ferrum_jax as fj
from ferrum_jax import Device, Priority, errors
from tests.support.manager_model_records import (
    Block,
    Kept,
    Name,
    Origin,
    Request,
    Tiers,
    Writes,
    follows,
    salt_of,
    version_of,
)
from tests.support.managers import BLOCK_SIZE
from tests.support.prefix_model import num_common
from tests.support.random_scenarios import DEVICES, KEEP_ALL, MAX_ROWS, Scenario


class ManagerModel:
    """What a manager should hold, and how it should answer.

    Args:
      scenario: How the manager is made.

    Attributes:
      config: Which prompts are cached; None for none.
      policy: How the preemption policy answers; None without one.
      tiers: What waits behind each device.
      now: Seconds of the clock.
      version: Version of the weights; None at first.
      max_blocks: Blocks of each device.
      preference: The devices in the order in which requests go to them.
      requests: All live requests.
      cached: The cached blocks of each device, by salt and tokens.
      pins: Ends of the pinned prefixes of each device.
      taken: Blocks of each device that no request holds and a caller has allocated.
      writes: What requests have written.
    """

    def __init__(self, scenario: Scenario):
        self.config, self.policy, self.now = scenario.config, scenario.request_policy, 0.0
        self.version: int | None = None
        self.max_blocks = scenario.max_blocks
        self.tiers = {d: Tiers(scenario.max_host_blocks, scenario.has_disk) for d in DEVICES}
        self.preference = list(DEVICES)
        self.requests: dict[Any, Request] = {}
        self.cached: dict[Device, dict[Name, Kept]] = {device: {} for device in DEVICES}
        self.pins: dict[Device, set[Name]] = {device: set() for device in DEVICES}
        self.taken: dict[Device, list[int]] = {device: [] for device in DEVICES}
        self.writes = Writes()
        self.num_allocated = self.num_refused = self.num_preempted = 0
        self.num_prompt_tokens = self.num_reused_tokens = 0

    # Blocks.

    def on(self, device: Device) -> dict[int, Request]:
        return {i: r for i, r in self.requests.items() if r.device == device and not r.is_away}

    def in_use(
        self, device: Device, exclude: Collection[int] = (), more: Iterable[Block] = ()
    ) -> set[Block]:
        """Blocks that cannot be evicted: of requests except `exclude`, pinned ones, and `more`."""
        held = {b for i, r in self.on(device).items() if i not in exclude for b in r.held}
        return held | {kept.block for kept in self.pinned(device)} | set(more)

    def pinned(self, device: Device) -> list[Kept]:
        cached = self.cached[device]
        return [cached[name] for pin in self.pins[device] for name in self.names(*pin)]

    def used(self, device: Device) -> int:
        """Number of blocks of a device that requests, callers or pins hold."""
        return len(self.in_use(device)) + len(self.taken[device])

    def num_holders(self, device: Device, block: Block) -> int:
        """References to a block, of requests and of the prefix cache."""
        return sum(block in r.held for r in self.on(device).values()) + block.is_kept

    def make_own(self, request: Request, row: list[Any], place: int) -> None:
        """Replaces a shared block in a row of a request by a copy."""
        if self.is_shared(request, row, place):
            row[place] = row[place].copy()

    def is_shared(self, request: Request, row: Sequence[Block | None], place: int) -> bool:
        """Whether others hold a block in a row of a request."""
        block = row[place] if place < len(row) else None
        return block is not None and self.num_holders(request.device, block) > 1

    def num_cut_through(self, request: Request, num_held: int, num_tokens: int) -> int:
        """Blocks that others hold too, among those in which a request's rows would end.

        Args:
          request: The request.
          num_held: Tokens that are left in the group that keeps all tokens.
          num_tokens: Tokens that are left of the sequence.
        """
        ends = [(request.blocks, *divmod(num_held, request.block_size))]
        if request.window is not None:
            ends.append((request.local, *divmod(num_tokens, BLOCK_SIZE)))
        return sum(bool(tail) and self.is_shared(request, row, i) for row, i, tail in ends)

    def num_to_extend(self, ids: Sequence[int], num_tokens: int) -> int:
        """Blocks that extending requests takes, besides those that their windows free for it."""
        requests = [self.requests[i] for i in ids]
        num_new = sum(request.num_new_for(num_tokens) for request in requests)
        passed = [(r, b) for r in requests for b in r.passed if num_tokens]
        return max(0, num_new - sum(self.num_holders(r.device, b) == 1 for r, b in passed))

    def spread(self) -> float:
        """Difference between the fullest and the emptiest preferred device, as a share."""
        shares = [self.used(device) / self.max_blocks for device in self.preference]
        return max(shares) - min(shares)

    def shares_blocks(self) -> bool:
        """Whether requests on preferred devices share blocks."""
        blocks = [b for d in self.preference for r in self.on(d).values() for b in r.held]
        return len(set(blocks)) < len(blocks)

    def pressure(self) -> fj.MemoryPressure:
        share = sum(map(self.used, DEVICES)) / (self.max_blocks * len(DEVICES))
        return fj.MemoryPressure(sum(share >= threshold for threshold in (0.6, 0.8, 0.95)))

    # Prefix caching.

    def names(self, salt: str | None, tokens: Sequence[int]) -> list[Name]:
        """The names that the full blocks of a sequence have in the cache."""
        ends = range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def key_of(self, salt: str | None) -> Any:
        """What names of cached blocks begin with: a salt, or a salt and the version if any."""
        return salt if self.version is None else (salt, self.version)

    def shares(self, salt: str | None) -> bool:
        """Whether prompts of a salt are cached at present."""
        config = self.config
        return config is not None and (salt is not None or config.enable_cross_request_sharing)

    def is_alive(self, device: Device, kept: Kept) -> bool:
        """Whether a cached block has not expired."""
        if self.now < kept.expires_at:
            return True
        held = {x for r in self.on(device).values() for x in r.lease}
        return kept in held or kept in self.pinned(device)

    def found(self, device: Device, salt: str | None, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that a full search finds; one at least is left to compute."""
        cached = self.cached[device].values() if self.shares(salt) else []
        key = self.key_of(salt)
        alive = [kept for kept in cached if kept.salt == key and self.is_alive(device, kept)]
        most = max((num_common(kept.tokens, prompt[:-1]) for kept in alive), default=0)
        return most if self.config and most >= self.config.min_prefix_length else 0

    def has_idle_outdated(self, device: Device) -> bool:
        """Whether a cached block of another version of the weights could be evicted."""
        in_use, cached = self.in_use(device), self.cached[device]
        return any(version_of(n) != self.version and cached[n].block not in in_use for n in cached)

    def retain(self, keeps: Iterable[Kept]) -> None:
        """Restarts the time to live of cached blocks."""
        for kept in keeps:
            kept.expires_at = max(kept.expires_at, self.now + KEEP_ALL.prefix_ttl_seconds)

    def uncache(self, device: Device, keeps: Iterable[Kept]) -> None:
        """Uncaches blocks and all blocks that continue them, also those that requests hold."""
        for first in keeps:
            for name in list(self.cached[device]):
                if name == (first.salt, first.tokens) or follows(name, (first.salt, first.tokens)):
                    self.uncache_one(device, name)

    def uncache_one(self, device: Device, name: Name) -> None:
        """Uncaches one block."""
        self.cached[device].pop(name).block.kept = None
        self.pins[device].discard(name)

    def reset(self, salt: str | None) -> None:
        """Uncaches all blocks of a salt, or of all salts, for good."""
        self.writes.count_reset(salt)
        for device in DEVICES:
            for name in list(self.cached[device]):
                if salt in (None, salt_of(name)):
                    self.uncache_one(device, name)
        for request in self.requests.values():
            if salt in (None, request.salt):
                request.may_be_cached, request.kept_away = False, []

    def change_weights(self, version: int) -> None:
        """Sets the version of the weights: live requests cache no more, and old pins end."""
        if version == self.version:
            return
        self.version = self.writes.weights = version
        for pins in self.pins.values():
            pins.intersection_update([name for name in pins if version_of(name) == version])
        for request in self.requests.values():
            request.may_be_cached = False

    def may_cache(self, request: Request) -> bool:
        return self.shares(request.salt) and request.may_be_cached and request.adopted is None

    def num_computed(self, request: Request, num_tokens: int) -> tuple[int, int]:
        """Tokens that a commit of `num_tokens` takes as computed, and those that are verified.

        The manager reads blocks only if some of them could be cached.
        """
        known = min(num_tokens, request.num_computed)
        bound = max(min(num_tokens, request.max_computed), known)
        if bound // BLOCK_SIZE <= len(request.lease) or not self.may_cache(request):
            return bound, min(bound, len(request.lease) * BLOCK_SIZE)
        cells = request.cells[known:bound]
        num_written = known + next((i for i, cell in enumerate(cells) if not cell), len(cells))
        return num_written, num_written

    def commit(self, request: Request, num_told: int, num_claimed: int, is_pinned: Any) -> int:
        """Commits tokens of a request; returns how many of them are cached."""
        _, num_sure = self.num_computed(request, min(num_claimed, num_told))
        request.num_told = num_told
        request.num_computed = max(request.num_computed, num_sure)
        self.mark_known(request, num_told)
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
        """Caches the computed blocks of a request, up to the first one that it shares uncached.

        Equal cached blocks replace its own; if `own` is given, only those.
        """
        if not self.may_cache(request):
            return
        device, num_leased = request.device, len(request.lease)
        names = self.names(request.key, request.tokens[: request.num_computed])
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
        """Whether more blocks may be cached after the first `num_found`."""
        cached = self.cached[device]
        leaves = [n for n in cached if not any(follows(other, n) for other in cached)]
        is_longer = num_found and names[num_found - 1] in leaves  # It stays one prefix.
        return bool(is_longer) or len(leaves) < self.config.max_prefixes

    def mark_known(self, request: Request, num_tokens: int) -> None:
        """Makes the first tokens of a request known."""
        for origin in request.origins[:num_tokens]:
            origin.root.is_known = True

    # Predicted errors, or None.

    def fits(
        self,
        device: Device,
        num_new: int,
        priority: Priority = Priority.Low,
        *,
        exclude: Collection[int] = (),
        more: Sequence[Block] = (),
        num_rows: int = 0,
    ) -> bool:
        """Whether `num_new` blocks and `num_rows` rows are available, with preemption if needed."""
        residents, num_taken = self.on(device), len(self.taken[device])
        num_left = self.max_blocks - num_taken - len(self.in_use(device, more=more))
        num_rows_left = MAX_ROWS - len(residents)
        if num_new <= num_left and num_rows <= num_rows_left:
            return True
        victims = [i for i, r in residents.items() if r.priority < priority and i not in exclude]
        if self.policy == "lru":
            victims = [i for i in victims if residents[i].blocks]
        elif self.policy not in ("all", "last", "repeated"):
            victims = []
        num_left = self.max_blocks - num_taken - len(self.in_use(device, victims, more))
        return bool(victims) and num_new <= num_left and num_rows <= num_rows_left + len(victims)

    def shortage(self, device: Device, num_new: int, priority: Priority = Priority.Low, **more):
        """The error for a row of `num_new` new blocks on a device."""
        if self.fits(device, num_new, priority, num_rows=1, **more):
            return None
        is_crowded = len(self.on(device)) == MAX_ROWS
        return errors.OutOfRowsError if is_crowded else errors.OutOfBlocksError

    def home_for(self, request: Request, first: Device, prompt: Sequence[int]):
        """The device that takes a request, and the error if there is none."""
        refusals = {}
        for priority in (Priority.Low, request.priority):
            for device in dict.fromkeys([first, *self.preference]):
                num_found = self.found(device, request.salt, prompt)
                names = self.names(self.key_of(request.salt), prompt[:num_found])
                blocks = [self.cached[device][name].block for name in names]
                num_new = request.num_blocks - len(blocks)
                refusals[device] = self.shortage(device, num_new, priority, more=blocks)
                if refusals[device] is None:
                    return device, None
        return None, refusals[first]

    def refusal_to_wait(self, i: int, device: Device, disk_is_full: bool):
        """The error of the tiers of a device for the blocks of a request."""
        is_full = self.tiers[device].refuses(self.requests[i].num_blocks, disk_is_full)
        return errors.OutOfHostMemoryError if is_full else None

    def refusal_to_move(self, i: int, target: Device, disk_is_full: bool = False):
        if target not in DEVICES:
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

    # Changes.

    def begin(self, i: int, request: Request, prompt: Sequence[int], num_found: int) -> None:
        """Starts a request; the first `num_found` tokens of its prompt are cached."""
        names = self.names(request.key, prompt[:num_found])
        request.blocks = [self.cached[request.device][name].block for name in names]
        request.blocks += [Block() for _ in range(request.num_full - len(names))]
        request.local = [Block(group=1) for _ in range(request.num_local)]
        request.origins = [Origin() for _ in request.tokens]
        request.num_told = len(prompt)
        self.mark_known(request, len(prompt))
        request.num_computed = request.max_computed = num_found
        self.requests[i] = request
        self.num_allocated += 1
        if prompt and self.config:
            self.num_prompt_tokens += len(prompt)
            self.num_reused_tokens += num_found

    def swap_out(self, i: int) -> None:
        """Swaps a request out."""
        request = self.requests[i]
        self.retain(request.lease)
        self.tiers[request.device].put(i, request.num_blocks)
        request.kept_away = request.lease
        request.leave()
        request.is_away = True

    def swap_in(self, i: int) -> None:
        """Restores a request on its device with its own bytes, whatever is cached there."""
        request = self.requests[i]
        self.tiers[request.device].drop(i)
        request.is_away = False
        request.arrive()
        num_retained = min(request.num_retained, request.num_computed) // BLOCK_SIZE
        names = self.names(request.key, request.tokens[: num_retained * BLOCK_SIZE])
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
        request.leave()
        request.device, request.kept_away = target, []
        self.swap_in(i)

    def end(self, i: int) -> Request:
        request = self.requests.pop(i)
        self.retain(request.lease)
        self.tiers[request.device].drop(i)
        return request
