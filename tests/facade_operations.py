"""What is done in a random life of a manager of several devices: every operation, and faults.

An operation draws what it needs from whoever drives it: Hypothesis, or dice. It foretells the
outcome, makes the call, compares, and notes what was done.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest

from ferrum_jax import PagedKvCacheManager, Priority, errors
from ferrum_jax.compression import CompressionMethod
from ferrum_jax.types import TokenFormat
from tests.facade_life import (
    DEVICES,
    LENGTHS,
    MAX_BLOCKS,
    NUM_IDS,
    PREFIXES,
    TTL_SECONDS,
    Draw,
)
from tests.facade_records import Request, merge
from tests.facade_steps import FacadeSteps
from tests.managers import BLOCK_SIZE, MAX_TOKENS, refused
from tests.multi_device import (
    CPU,
    DAMAGES,
    all_of,
    break_arrival,
    break_export,
    break_import,
    damage,
)
from tests.prefix_model import num_common

MAX_TAKEN = 2  # Blocks of a device that are taken for no request.
TOLERANCES = (0.0, 0.1, 0.25, 0.5)
RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)
METHODS = (
    CompressionMethod(num_sinks=1, num_recent=2),
    CompressionMethod(token_format=TokenFormat.Native, num_sinks=1, num_recent=2),
    CompressionMethod(scorer=None),
)


class FacadeOperations(FacadeSteps):
    """A life, and what may happen in it."""

    # Requests come, grow and go.

    def allocate(self, draw: Draw) -> None:
        i = self.id_of(draw, set(range(NUM_IDS)) - self.requests.keys())
        old = draw.one_of(self.prompts)
        prompt = old[: draw.one_of([len(old), len(old), draw.number(0, len(old))])]
        prompt = (prompt + self.new_tokens(draw.one_of(LENGTHS)))[:MAX_TOKENS]
        if draw.number(0, 5) == 0:
            prompt = []  # A row for a step to fill.
        else:
            self.prompts.append(prompt)
        num_told = draw.one_of([len(prompt), len(prompt), draw.number(0, len(prompt)), 0])
        salt, priority = draw.one_of([None, None, None, "a"]), draw.one_of(list(Priority))
        most = max(DEVICES, key=lambda d: self.model.found(d, salt, prompt[:num_told]))
        device = draw.one_of([None, most, most, *DEVICES])
        limit = draw.one_of([MAX_TOKENS, MAX_TOKENS, MAX_TOKENS, max(8, len(prompt)), 16])
        new = Request(None, device, salt, priority, prompt, limit)
        if self.allocate_one(i, new, num_told):
            self.write_some(draw, i)
            self.commit_some(draw, i)

    def allocate_one(self, i: int, new: Request, num_told: int) -> bool:
        """Allocates a request, of which so much of the prompt is told."""
        known, model = new.tokens[:num_told], self.model
        asked = self.manager.new_request(
            i,
            len(new.tokens),
            new.limit,
            device=new.device,
            priority=new.priority,
            prompt_token_ids=known or None,
            cache_salt=new.salt,
        )
        found = {device: model.found(device, new.salt, known) for device in DEVICES}
        home, want = model.home_for(new, new.device or model.preference[0], known)
        if i in self.requests:
            want = errors.DuplicateRequestError
        elif new.limit > MAX_TOKENS:
            want = errors.SequenceTooLongError
        assert self.manager.can_allocate(asked) == (want is None)
        reports = self.manager.explain_lookup(known, new.salt)
        assert {d: report.num_cached_tokens for d, report in reports.items()} == found
        before = self.num_gone()
        handle = self.call("allocate", want, lambda: self.manager.allocate(asked))
        if want or home is None:
            model.num_refused += 1
            return False
        num_found, num_seen = handle.num_cached_tokens, found[home]
        is_missed = num_found == num_seen - num_seen % BLOCK_SIZE and self.num_gone() > before
        assert num_found == num_seen or is_missed, "at most a copy is missed, if its source goes"
        self.note("cached", "some" if num_found else "nothing")
        new.handle, new.device, new.tokens = handle, home, list(new.tokens)
        model.begin(i, new, known, num_found)
        self.learn_tail(i, known, num_found)
        self.settle()
        self.read(i)
        return True

    def fork(self, draw: Draw) -> None:
        """A new request begins with all that is written of another one."""
        parent = self.id_of(draw, self.usable_ids())
        child = self.id_of(draw, set(range(NUM_IDS)) - self.requests.keys())
        if parent not in self.usable_ids() or child in self.requests:
            return
        source = self.requests[parent]
        tokens = source.tokens[: draw.one_of([0, source.num_written, source.num_written])]
        new = Request(None, source.device, source.salt, source.priority, tokens)
        if self.allocate_one(child, new, 0) and not self.is_away(parent):
            self.share_one(parent, child, len(tokens))

    def share(self, draw: Draw) -> None:
        ids = self.usable_ids()
        if len(ids) < 2:
            return
        source = draw.one_of(ids)
        device = self.requests[source].device
        near = [i for i in ids if i != source and self.requests[i].device == device]
        others = [i for i in ids if i != source]
        target = draw.one_of(near if near and draw.number(0, 3) else others)
        num_tokens = num_common(self.requests[source].tokens, self.requests[target].tokens)
        # What is not written yet would be written by both, in the same blocks.
        most = min(num_tokens, self.requests[source].num_written)
        is_fair = draw.number(0, 3) > 0
        self.share_one(source, target, draw.number(0, most if is_fair else MAX_TOKENS))

    def share_one(self, source: int, target: int, num_tokens: int) -> None:
        giver, taker = self.requests[source], self.requests[target]
        num_same = num_common(giver.tokens, taker.tokens)
        num_known = min(giver.num_known, taker.num_known)
        num_leased = len(taker.lease)
        if giver.device != taker.device:
            want = errors.GeometryMismatchError
        elif num_tokens > min(len(giver.tokens), len(taker.tokens)):
            want = ValueError
        elif giver.adopted is not None or taker.adopted is not None:
            want = errors.CompressionError
        elif giver.salt != taker.salt or num_same < min(num_known, num_tokens):
            want = errors.PrefixMismatchError
        elif num_tokens > min(num_same, giver.num_written):
            return  # It would be told what is not true.
        else:
            num_new = self.num_new_to_share(taker, num_tokens)
            is_ok = self.model.fits(taker.device, num_new, taker.priority, but=(source, target))
            want = None if is_ok else errors.OutOfBlocksError
        self.call(
            "share_prefix", want, lambda: self.manager.share_prefix(source, target, num_tokens)
        )
        if want is None and num_tokens > num_leased * BLOCK_SIZE:
            self.follow_share(giver, taker, num_tokens)
        self.settle()
        self.read(target)

    def num_new_to_share(self, target: Request, num_tokens: int) -> int:
        """Blocks that a request takes to hold so many tokens of another: for a shared tail."""
        num_full, num_tail = divmod(num_tokens, BLOCK_SIZE)
        if not num_tail or num_full < len(target.lease):
            return 0
        return int(self.model.num_holders(target.device, target.blocks[num_full]) > 1)

    def follow_share(self, source: Request, target: Request, num_tokens: int) -> None:
        """A request holds the first tokens of another, but keeps its cached blocks with these."""
        num_full, num_tail = divmod(num_tokens, BLOCK_SIZE)
        num_shared, num_leased = min(len(source.lease), num_full), len(target.lease)
        if num_tail:
            if self.num_new_to_share(target, num_tokens):
                target.blocks[num_full] = target.blocks[num_full].copy()
            tail = source.blocks[num_full].cells[:num_tail]
            target.blocks[num_full].cells[:num_tail] = tail
        kept = target.blocks[:num_leased]
        target.blocks[:num_full] = source.blocks[:num_full]
        target.blocks[num_shared:num_leased] = kept[num_shared:]
        for bound in ("num_computed", "max_computed"):
            given, had = getattr(source, bound), getattr(target, bound)
            if given < num_tokens:
                setattr(target, bound, min(had, max(given, num_leased * BLOCK_SIZE)))
        if source.max_computed >= num_tokens:
            target.max_computed = max(target.max_computed, num_tokens)
        merge(source, target, num_tokens)
        target.may_be_cached &= source.may_be_cached

    def extend(self, draw: Draw) -> None:
        """Makes room in one request, or in two at once."""
        i, count = self.id_of(draw, self.requests), draw.one_of([0, 1, 2, 4, 8])
        if i not in self.requests:
            return
        others = [j for j in self.usable_ids() if j != i]
        ids = [i, draw.one_of(others)] if others and draw.number(0, 2) == 0 else [i]
        requests = [self.requests[j] for j in ids]
        device, priority = requests[0].device, max(r.priority for r in requests)
        num_new = sum(r.num_blocks_with(count) - r.num_blocks for r in requests)
        if requests[0].is_away:
            want = errors.SwappedOutError
        elif len({request.device for request in requests}) > 1:
            want = errors.GeometryMismatchError
        elif any(len(request.tokens) + count > request.limit for request in requests):
            want = errors.SequenceTooLongError
        else:
            is_ok = self.model.fits(device, num_new, priority, but=ids)
            want = None if is_ok else errors.OutOfBlocksError
        handles = [self.handle(j) for j in ids]
        self.call("extend", want, lambda: self.manager.extend_all(handles, count))
        for j in ids if want is None else ():
            self.grow(draw, j, count)
        self.settle()

    def deallocate(self, draw: Draw) -> None:
        i = self.id_of(draw, self.requests)
        self.read(i)
        want = None if i in self.requests else errors.UnknownRequestError
        self.call("deallocate", want, lambda: self.manager.deallocate(i))
        if want is None:
            handle = self.model.end(i).handle
            if handle is not None:
                assert refused(handle.num_tokens) is errors.InvalidHandleError

    def gc(self, draw: Draw) -> None:
        """Frees requests of which the caller has dropped the handles, and what has expired."""
        self.clock.now += draw.one_of([0.0, 0.0, TTL_SECONDS / 3, TTL_SECONDS])
        self.model.now = self.clock.now
        i = self.id_of(draw, self.requests)
        if i in self.requests and draw.number(0, 1):
            self.requests[i].handle = None
        elif i in self.requests:
            self.requests[i].handle = self.handle(i).clone_handle()  # One is enough.
        num_held = sum(map(len, map(self.held_on, DEVICES)))
        dropped = [i for i, request in self.requests.items() if request.handle is None]
        for i in dropped:
            self.model.end(i)
        before = {d: part.total_blocks for d, part in self.manager.device_stats().items()}
        got = self.call("gc", None, self.manager.gc)
        assert got.caches_freed == len(dropped)
        self.settle()
        num_freed = num_held - sum(map(len, map(self.held_on, DEVICES)))
        assert got.memory_freed == num_freed * self.block_bytes
        for device, cached in self.model.cached.items():
            assert all(self.model.is_alive(device, kept) for kept in cached.values())
            want = before[device]
            if self.scenario.grows:
                taken = self.model.taken[device]
                least = max(len(self.held_on(device)) + len(taken), max(taken, default=-1) + 1)
                want = MAX_BLOCKS // 2 if least <= MAX_BLOCKS // 2 else MAX_BLOCKS
            assert self.manager.device_stats()[device].total_blocks == min(before[device], want)

    def defragment(self, draw: Draw) -> None:
        """Brings all blocks to the lowest ids, but for those that callers know."""
        self.call("defragment", None, self.manager.defragment)
        for device, manager in self.manager._managers.items():
            rows = manager._cache.all_row_blocks().values()
            held = {block_id for row in rows for block_id in row}
            held |= {block.block_id for block in self.cached_on(device).values()}
            ids = range(manager.total_block_count())
            homes = [block_id for block_id in ids if block_id not in self.model.taken[device]]
            assert held == set(homes[: len(held)])

    # Prompts.

    def reset(self, draw: Draw) -> None:
        """The weights change, or a tenant leaves: nothing from before is found again."""
        salt = draw.one_of([None, "a", "a"])
        self.attempt("reset_prefixes", None, lambda: self.manager.reset_prefixes(salt))
        self.model.reset(salt)
        self.settle()
        if any(request.is_away for request in self.requests.values()):
            self.faults["a reset while requests are away"] += 1

    def enable_caching(self, draw: Draw) -> None:
        """Prompts are cached from now on, if they were not."""
        if not self.model.caches_prefixes:
            call = lambda: self.manager.enable_prefix_caching(PREFIXES)  # noqa: E731
            self.call("enable_prefix_caching", None, call)
            self.model.caches_prefixes = True

    # Blocks of no request.

    def take_blocks(self, draw: Draw) -> None:
        """Takes blocks for no request, or gives some back, or others, which is refused."""
        device = draw.one_of(DEVICES)
        manager, taken = self.manager._managers[device], self.model.taken[device]
        how = draw.one_of(["take", "give", "give any"])
        if how == "take":
            count = draw.number(0, MAX_TAKEN - len(taken))
            is_ok = self.model.fits(device, count, Priority.Normal)
            want = None if is_ok else errors.OutOfBlocksError
            taken += (
                self.call("allocate_blocks", want, lambda: manager.allocate_blocks(count)) or []
            )
        elif how == "give":
            blocks = taken[: draw.number(0, len(taken))]
            self.call("free_blocks", None, lambda: manager.free_blocks(blocks))
            del taken[: len(blocks)]
        else:
            block = draw.number(-1, MAX_BLOCKS)
            is_in_pool = 0 <= block < manager.total_block_count()
            is_free = is_in_pool and manager._cache.is_free(block)
            want = errors.DoubleFreeError if is_free else errors.ForeignBlockError
            if block in taken:
                want, blocks = errors.DoubleFreeError, [block, block]
            else:
                blocks = [block]
            self.call("free_blocks", want, lambda: manager.free_blocks(blocks))
        self.manager.device_stats()  # This manager tells of pressure alone, not that one.

    # Devices.

    def prefer(self, draw: Draw) -> None:
        """Another order; devices that vanish from it keep what they have."""
        left, devices = list(DEVICES), []
        for _ in range(draw.number(1, len(DEVICES))):
            devices.append(draw.one_of(left))
            left.remove(devices[-1])
        call = functools.partial(self.manager.set_device_preference, devices)
        self.call("set_device_preference", None, call)
        self.model.preference = devices
        if any(request.device in left for request in self.requests.values()):
            self.faults["a device vanishes that has requests"] += 1

    def move(self, draw: Draw) -> None:
        i, device = self.id_of(draw, self.requests), draw.one_of([*DEVICES, *DEVICES, CPU[3]])
        with self.full_disk(draw) as is_full:
            want = self.model.refusal_to_move(i, device, is_full)
            if is_full and want is errors.CorruptFileError:
                return  # Which of both is met first is nobody's business.
            self.call("move_cache", want, lambda: self.manager.move_cache(i, device))
        if want is None:
            self.model.move(i, device)
            self.settle()
            self.read(i)

    def move_by_a_copy_that_fails(self, draw: Draw) -> None:
        i, device = self.id_of(draw, self.usable_ids()), draw.one_of(DEVICES)
        if i not in self.usable_ids() or self.requests[i].device == device:
            return
        if self.model.refusal_to_move(i, device) is None:
            num_blocks = self.requests[i].num_blocks
            breaks = [break_export, break_import, break_arrival] if num_blocks else [break_export]
            with self.broken_copies(draw, "move", breaks, max(1, num_blocks)):
                self.manager.move_cache(i, device)

    def rebalance(self, draw: Draw) -> None:
        tolerance, fails = draw.one_of(TOLERANCES), draw.number(0, 3) == 0
        before, shares = self.model.spread(), self.model.shares_blocks()
        plan = self.call("plan_rebalance", None, lambda: self.manager.plan_rebalance(tolerance))
        if fails and plan:
            breaks = [break_export, break_import, break_arrival]
            with self.broken_copies(draw, "rebalance", breaks):
                self.manager.rebalance_devices(tolerance)
        else:
            with self.followed_moves():
                self.attempt("rebalance", None, lambda: self.manager.rebalance_devices(tolerance))
            assert list(self.manager.last_rebalance) == plan
        for move in self.manager.last_rebalance:
            i: Any = move.request_id
            assert self.requests[i].device == move.target and move.target in self.model.preference
            assert move.num_bytes == self.requests[i].num_blocks * self.block_bytes
            self.read(i)
        if before <= tolerance:
            assert not plan
        if not (fails or shares):
            assert self.model.spread() <= before
        self.note("rebalance to", f"{len(self.manager.last_rebalance)} moves")

    @contextlib.contextmanager
    def followed_moves(self) -> Iterator[None]:
        """A time in which the model follows each move at once: the next one may evict what came."""
        move_to = PagedKvCacheManager.move_to

        def followed(source, i, target, **how) -> None:
            move_to(source, i, target, **how)
            self.learn()
            self.model.move(i, target._cache.device)
            self.settle()

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(PagedKvCacheManager, "move_to", followed)
            yield

    # In fewer bytes.

    def compress(self, draw: Draw) -> None:
        """Any refusal must be without effect; what is done must meet the ratio, and stay."""
        if not self.scenario.compresses:
            return
        i, ratio = self.id_of(draw, self.usable_ids()), draw.one_of(RATIOS)
        if i not in self.requests or self.requests[i].is_away:
            is_here = i in self.requests
            want = errors.SwappedOutError if is_here else errors.UnknownRequestError
            self.call("compress", want, lambda: self.manager.compress_cache(i, ratio))
            return
        request, handle = self.requests[i], self.handle(i)
        if request.num_written < len(request.tokens):
            return  # A slot that is dropped cannot be written any more.
        method, before, report = draw.one_of(METHODS), all_of(self.manager), handle.compression
        got = refused(lambda: self.manager.compress_cache(i, ratio, method))
        self.note("compress", got.__name__ if got else "ok")
        if got is not None:
            assert got in (errors.CompressionError, errors.OutOfBlocksError)
            self.refusals[got.__name__] += 1
            assert all_of(self.manager) == before, "compress changed something"
            return
        if handle.compression is not report:
            self.model.retain(request.lease)
            request.handle, request.num_adopted_written = handle, len(request.tokens)
            self.note("compress to", handle.compression.token_format.name)
            self.adopt(i)
        self.learn()
        self.settle()
        num_native = -(-len(request.tokens) // BLOCK_SIZE)
        assert handle.stats().blocks_allocated <= ratio * num_native + 1e-9
        self.read(i)

    # Elsewhere for a while.

    def swap_out(self, draw: Draw) -> None:
        i = self.id_of(draw, self.usable_ids())
        with self.full_disk(draw) as is_full:
            if i not in self.requests:
                want = errors.UnknownRequestError
            elif self.requests[i].is_away:
                want = None
            else:
                want = self.model.refusal_to_wait(i, self.requests[i].device, is_full)
            self.attempt("swap_out", want, lambda: self.manager.swap_out(i))
        if want is None and not self.requests[i].is_away:
            self.model.leave(i)
            self.settle()
            self.read(i)

    def swap_in(self, draw: Draw) -> None:
        i = self.id_of(draw, self.requests.keys() - self.usable_ids())
        want, is_away = self.model.refusal_to_return(i), self.is_away(i)
        self.call("swap_in", want, lambda: self.manager.swap_in(i))
        if want is None and is_away:
            self.model.come(i)
            self.settle()
            self.read(i)

    def swap_by_a_copy_that_fails(self, draw: Draw) -> None:
        i = self.id_of(draw, self.requests)
        if i not in self.requests:
            return
        request = self.requests[i]
        if not request.is_away:
            with self.broken_copies(draw, "swap out", [break_export]):
                self.manager.swap_out(i)
        elif self.model.refusal_to_return(i) is None and request.num_blocks:
            num_chunks = request.num_blocks.bit_count()  # At least: it was cut up as it left.
            with self.broken_copies(draw, "swap in", [break_import], num_chunks):
                self.manager.swap_in(i)

    def damage_a_file(self, draw: Draw) -> None:
        """A file on disk is no more what it was; then perhaps it is again, or is given up."""
        ids = [
            i
            for i, request in self.requests.items()
            if i in self.model.tiers[request.device].disk and not request.is_damaged
        ]
        if not ids:
            return
        i = draw.one_of(ids)
        request, how = self.requests[i], draw.one_of(list(DAMAGES))
        path = self.file_of(i)
        good = damage(path, how)
        request.is_damaged = True
        self.faults[f"file: {how}"] += 1
        self.call("swap_in", self.model.refusal_to_return(i), lambda: self.manager.swap_in(i))
        what_next = draw.one_of(["repair", "give up", "leave", "leave"])
        if what_next == "repair":
            path.write_bytes(good)
            request.is_damaged = False
        elif what_next == "give up":
            self.call("deallocate", None, lambda: self.manager.deallocate(i))
            self.model.end(i)


OPERATIONS = {
    FacadeOperations.allocate: 6,
    FacadeOperations.fork: 2,
    FacadeOperations.share: 2,
    FacadeOperations.extend: 4,
    FacadeOperations.change_in_a_step: 5,
    FacadeOperations.forget_to_say_so: 1,
    FacadeOperations.write: 5,
    FacadeOperations.deallocate: 3,
    FacadeOperations.gc: 1,
    FacadeOperations.defragment: 1,
    FacadeOperations.reset: 1,
    FacadeOperations.enable_caching: 1,
    FacadeOperations.take_blocks: 1,
    FacadeOperations.prefer: 1,
    FacadeOperations.move: 4,
    FacadeOperations.move_by_a_copy_that_fails: 1,
    FacadeOperations.rebalance: 2,
    FacadeOperations.compress: 3,
    FacadeOperations.swap_out: 3,
    FacadeOperations.swap_in: 3,
    FacadeOperations.swap_by_a_copy_that_fails: 1,
    FacadeOperations.damage_a_file: 2,
}
"""How often dice choose each operation."""
