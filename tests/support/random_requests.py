"""Operations on requests: allocate, share, extend, commit, deallocate, and on single blocks."""

import functools

import numpy as np

from ferrum_jax import Priority, errors
from ferrum_jax.policies.blocks import Retention
from tests.support.bad_policies import BadBlockPolicy, BadRequestPolicy
from tests.support.internals import pool_of, row_blocks, state_of
from tests.support.manager_model_records import Request, merge
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, refused
from tests.support.prefix_model import num_common
from tests.support.random_scenarios import DEVICES, LENGTHS, MAX_ROWS, NUM_IDS, TTL_SECONDS, Draw
from tests.support.random_steps import StepOperations

MAX_TAKEN = 2  # Blocks of a device that `allocate_blocks` takes at most.


class RequestOperations(StepOperations):
    """Operations on requests, their prompts, and single blocks."""

    # Requests.

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
        """Allocates a request, and passes `num_told` tokens of its prompt."""
        known, model, new.window = new.tokens[:num_told], self.model, self.scenario.window
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
        assert all(map(str, reports.values()))
        before = self.num_gone()
        handle = self.call("allocate", want, lambda: self.manager.allocate(asked))
        if want or home is None:
            model.num_refused += 1
            return False
        num_found, num_seen = handle.num_cached_tokens, found[home]
        is_missed = num_found == num_seen - num_seen % BLOCK_SIZE and self.num_gone() > before
        assert num_found == num_seen or is_missed, (
            "more than a copied tail is missed, whose source may be evicted"
        )
        self.note("cached", "some" if num_found else "nothing")
        new.handle, new.device, new.tokens = handle, home, list(new.tokens)
        new.version = model.version
        model.begin(i, new, known, num_found)
        self.note_tail(i, known, num_found)
        self.settle()
        self.read(i)
        return True

    def allocate_and_share(self, draw: Draw) -> None:
        """Allocates a request that shares all written tokens of another one."""
        parent = self.id_of(draw, self.usable_ids())
        child = self.id_of(draw, set(range(NUM_IDS)) - self.requests.keys())
        if parent not in self.usable_ids() or child in self.requests:
            return
        source = self.requests[parent]
        tokens = source.tokens[: draw.one_of([0, source.num_written, source.num_written])]
        new = Request(None, source.device, source.salt, source.priority, tokens)
        if self.allocate_one(child, new, 0) and not self.is_away(parent):
            self.share_one(parent, child, len(tokens))

    def fork(self, draw: Draw) -> None:
        """Starts one or two requests with all tokens of another one."""
        i, spare = self.id_of(draw, self.requests), set(range(NUM_IDS)) - self.requests.keys()
        new_ids = [self.id_of(draw, spare) for _ in range(draw.number(0, 2))]
        source, want = self.requests.get(i), self.refusal_to_fork(i, new_ids)
        if source is not None and want is None and source.num_written < source.num_in_full_blocks:
            return  # Both would write tokens in the same blocks.
        if want in (errors.RefusedError, errors.OutOfBlocksError, errors.OutOfRowsError):
            self.model.num_refused += len(new_ids)
        handles = self.call("fork", want, lambda: self.manager.fork(i, new_ids))
        for new_id, handle in zip(new_ids, handles or (), strict=False):
            assert source is not None and handle.num_cached_tokens == source.max_computed
            self.requests[new_id] = source.fork(handle)
            self.model.num_allocated += 1
        self.settle()
        for new_id in new_ids:
            self.read(new_id)

    def refusal_to_fork(self, i: int, new_ids: list[int]):
        """The error for a fork of a request."""
        if i not in self.requests:
            return errors.UnknownRequestError
        if self.requests.keys() & set(new_ids) or len(set(new_ids)) < len(new_ids):
            return errors.DuplicateRequestError
        source, num_rows = self.requests[i], len(new_ids)
        if source.is_away:
            return errors.SwappedOutError
        if source.num_in_full_blocks > source.max_computed:
            return errors.RefusedError
        num_new = num_rows * source.num_tails
        if self.model.fits(source.device, num_new, source.priority, exclude=[i], num_rows=num_rows):
            return None
        is_crowded = len(self.model.on(source.device)) + num_rows > MAX_ROWS
        return errors.OutOfRowsError if is_crowded else errors.OutOfBlocksError

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
        # Tokens that are not written yet would be written by both, in the same blocks.
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
        elif giver.key != taker.key or num_same < min(num_known, num_tokens):
            want = errors.PrefixMismatchError
        elif num_tokens > min(num_same, giver.num_written):
            return  # The call would claim what is not true.
        elif num_tokens and giver.num_released > giver.first_needed(num_tokens):
            want = errors.RefusedError
        else:
            num_new = self.num_new_to_share(taker, num_tokens)
            is_ok = self.model.fits(taker.device, num_new, taker.priority, exclude=(source, target))
            want = None if is_ok else errors.OutOfBlocksError
        self.call(
            "share_prefix", want, lambda: self.manager.share_prefix(source, target, num_tokens)
        )
        if want is None and num_tokens > num_leased * BLOCK_SIZE:
            self.follow_share(giver, taker, num_tokens)
        self.settle()
        self.read(target)

    def num_new_to_share(self, target: Request, num_tokens: int) -> int:
        """Blocks that a request needs to share `num_tokens` of another: those of shared tails."""
        if num_tokens // BLOCK_SIZE < len(target.lease):
            return 0
        return self.model.num_cut_through(target, num_tokens, num_tokens)

    def follow_share(self, source: Request, target: Request, num_tokens: int) -> None:
        """Applies `share_prefix` to the model; the target keeps its equal cached blocks."""
        num_full, num_tail = divmod(num_tokens, BLOCK_SIZE)
        num_shared, num_leased = min(len(source.lease), num_full), len(target.lease)
        if num_tail:
            if num_full >= len(target.lease):
                self.model.make_own(target, target.blocks, num_full)
            tail = source.blocks[num_full].cells[:num_tail]
            target.blocks[num_full].cells[:num_tail] = tail
        self.share_local(source, target, num_tokens)
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
        """Extends one request, or two in one call."""
        i, count = self.id_of(draw, self.requests), draw.one_of([0, 1, 2, 4, 8])
        if i not in self.requests:
            return
        others = [j for j in self.usable_ids() if j != i]
        is_pair = others and draw.number(0, 2) == 0
        self.extend_all(draw, [i, draw.one_of(others)] if is_pair else [i], count)

    def decode(self, draw: Draw) -> None:
        """Extends a request token by token, as a decoding loop does."""
        i = self.id_of(draw, self.usable_ids())
        for _ in range(draw.number(1, 6) if i in self.requests else 0):
            self.extend_all(draw, [i], 1)

    def extend_all(self, draw: Draw, ids: list[int], count: int) -> None:
        """Extends requests in one call by `count` tokens each, and writes some of these."""
        requests = [self.requests[j] for j in ids]
        device, priority = requests[0].device, max(r.priority for r in requests)
        if len({request.device for request in requests}) > 1:
            want = errors.GeometryMismatchError
        elif requests[0].is_away:
            want = errors.SwappedOutError
        elif any(len(request.tokens) + count > request.limit for request in requests):
            want = errors.SequenceTooLongError
        else:
            num_new = self.model.num_to_extend(ids, count)
            is_ok = self.model.fits(device, num_new, priority, exclude=ids)
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
        """Collects requests without handles, and prefixes that have expired."""
        self.clock.now += draw.one_of([0.0, 0.0, TTL_SECONDS / 3, TTL_SECONDS])
        self.model.now = self.clock.now
        i = self.id_of(draw, self.requests)
        if i in self.requests and draw.number(0, 1):
            self.requests[i].handle = None
        elif i in self.requests:
            self.requests[i].handle = self.handle(i).clone_handle()  # One handle is enough.
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
                most = self.scenario.max_blocks
                want = most // 2 if least <= most // 2 else most
            assert self.manager.device_stats()[device].total_blocks == min(before[device], want)

    def defragment(self, draw: Draw) -> None:
        """Moves all blocks to the lowest ids, except those of `allocate_blocks`."""
        self.call("defragment", None, self.manager.defragment)
        for device, manager in self.pools.items():
            rows = row_blocks(manager).values()
            held = {block_id for row in rows for block_id in row}
            held |= {block.block_id for block in self.cached_on(device).values()}
            ids = range(pool_of(manager).counts.num_blocks[0])
            homes = [block_id for block_id in ids if block_id not in self.model.taken[device]]
            assert held == set(homes[: len(held)])

    # Writes and commits.

    def write(self, draw: Draw) -> None:
        """Writes the next tokens of a request, and commits them."""
        i = self.id_of(draw, self.usable_ids())
        if i in self.usable_ids():
            self.write_some(draw, i)
            self.commit_some(draw, i)

    def commit_some(self, draw: Draw, i: int) -> None:
        """Commits what is computed, more, less, or wrong tokens."""
        request = self.requests[i]
        told, written, length = request.num_told, request.num_written, len(request.tokens)
        pin = draw.one_of([None, None, None, None, True, False])
        how = draw.one_of(["just", "just", "just", "just", "early", "partial", "lie", "no"])
        if how == "just" and told <= written:
            self.commit_one(i, draw.number(told, written), None, pin)
        elif how == "early":
            self.commit_one(i, draw.number(told, length), None, pin)
        elif how == "partial":
            total = draw.number(told, length)
            self.commit_one(i, total, draw.number(0, total + 1), pin)
        elif how == "lie" and request.num_known > told:
            wrong = draw.number(told, request.num_known - 1)
            more = [*request.tokens[told:wrong], request.tokens[wrong] + 1]
            call = functools.partial(self.manager.commit, self.handle(i), more)
            self.call("commit", errors.PrefixMismatchError, call)
        elif how == "lie":
            more = [*request.tokens[told:], 1]
            self.call("commit", ValueError, lambda: self.manager.commit(self.handle(i), more))

    def commit_one(self, i: int, total: int, num_tokens: int | None, pin: bool | None) -> None:
        """Commits tokens up to `total`, `num_tokens` of them as computed."""
        request, want = self.requests[i], None
        if num_tokens is not None:
            num_computed, _ = self.model.num_computed(request, min(num_tokens, total))
            want = ValueError if num_tokens > min(total, num_computed) else None
        more = request.tokens[request.num_told : total]
        retention = None if pin is None else Retention(is_pinned=pin)
        got = self.call(
            "commit",
            want,
            lambda: self.manager.commit(
                self.handle(i), more, num_tokens=num_tokens, retention=retention
            ),
        )
        if want is not None:
            return
        num_claimed = total if num_tokens is None else num_tokens
        assert got == self.model.commit(request, total, num_claimed, pin)
        self.note("keep", "some" if got else "nothing")
        self.settle()
        self.read(i)

    # Prefix caching.

    def reset(self, draw: Draw) -> None:
        """Resets all prefixes, or those of a salt: none of them is found again."""
        salt = draw.one_of([None, "a", "a"])
        self.attempt("reset_prefixes", None, lambda: self.manager.reset_prefixes(salt))
        self.model.reset(salt)
        self.settle()
        if any(request.is_away for request in self.requests.values()):
            self.faults["a reset while requests are swapped out"] += 1

    def change_weights(self, draw: Draw) -> None:
        """Sets the version of the weights, perhaps an earlier or the present one."""
        version = draw.one_of([1, 2, 3])
        call = functools.partial(self.manager.set_weights_version, version)
        self.attempt("set_weights_version", None, call)
        self.model.change_weights(version)
        self.settle()

    def configure(self, draw: Draw) -> None:
        """Enables prefix caching, or replaces its configuration."""
        config = draw.one_of(self.scenario.configs)
        if config is not self.model.config:
            call = functools.partial(self.manager.enable_prefix_caching, config)
            self.call("enable_prefix_caching", None, call)
            self.model.config = config

    def change_policies(self, draw: Draw) -> None:
        """Makes the policies and the callback of the caller behave in another way, or fail."""
        self.callback_raises = draw.one_of([False, True])
        for policy in self.block_policies:
            policy.mode = draw.one_of(BadBlockPolicy.MODES)
        if self.scenario.request_policy == "bad":
            self.model.policy = draw.one_of(BadRequestPolicy.MODES)
            self.bad_policy.mode = self.model.policy
            self.faults[f"preemption policy: {self.model.policy}"] += 1

    # Single blocks.

    def take_blocks(self, draw: Draw) -> None:
        """Allocates single blocks, frees some, or tries to free others, which is refused."""
        device = draw.one_of(DEVICES)
        manager, taken = self.pools[device], self.model.taken[device]
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
            block = draw.number(-1, self.scenario.max_blocks)
            is_free = (
                0 <= block < pool_of(manager).counts.num_blocks[0]
                and not (np.asarray(state_of(manager).tables.ref_counts)[block])
            )
            want = errors.DoubleFreeError if is_free else errors.ForeignBlockError
            if block in taken:
                want, blocks = errors.DoubleFreeError, [block, block]
            else:
                blocks = [block]
            self.call("free_blocks", want, lambda: manager.free_blocks(blocks))
        self.manager.device_stats()  # Calls the pressure callback; the pool's manager has none.
