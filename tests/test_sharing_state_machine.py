"""Random lives of requests that share blocks, every byte of the pool compared after every step.

Prompts are made of two tokens, so that most of them have something in common; what is written
tells the salt and all tokens up to a place, so that nobody's blocks can be taken for another's.
"""

import functools

import jax
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ferrum_jax as fj
from ferrum_jax import Priority, errors
from ferrum_jax.policies.blocks import Retention
from tests.bad_policies import BadBlockPolicy, BadRequestPolicy
from tests.managers import BLOCK_SIZE, MAX_TOKENS, refused, rows_of, tokens_of, whole
from tests.prefix_model import num_common
from tests.sharing_life import MAX_SEQS, SCENARIOS, TTL_SECONDS, SharingLife
from tests.sharing_model import Request, num_blocks_for

MAX_NEW = 4  # Tokens that a step may add to a row.
BASES = ([1] * 15, [1, 1, 1, 1, 2] * 3)
TOKENS = st.lists(st.integers(1, 2), max_size=4)
PROMPTS = st.builds(
    lambda base, length, tail: (base[:length] + tail)[:MAX_TOKENS],
    st.sampled_from(BASES),
    st.sampled_from([9, 15, 6, 12, 4, 8, 3, 10, 1, 0]),
    TOKENS,
)
SALTS = st.sampled_from([None, None, None, "a"])
PRIORITIES = st.sampled_from(Priority)


@functools.partial(jax.jit, donate_argnums=0)
def extend_inside(state, seq_ids, num_tokens):
    """Lengthens rows without asking the host."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=MAX_NEW)


@functools.partial(jax.jit, donate_argnums=0)
def cut_inside(state, seq_ids, seq_lens):
    """Takes tokens back, as speculative decoding does."""
    return fj.truncate(state, seq_ids, seq_lens)


class SharingMachine(SharingLife):
    """A manager with all that makes requests share, and part, and wait elsewhere."""

    @initialize(
        prompts=st.lists(st.tuples(PROMPTS, SALTS, PRIORITIES), min_size=1, max_size=4),
        num_ended=st.integers(0, 3),
    )
    def begin(self, prompts, num_ended):
        self.make()
        for prompt, salt, priority in prompts:
            self.serve(prompt, salt, priority)
        for i in range(min(num_ended, len(prompts))):
            self.end(i)

    # What is done.

    @rule(prompt=PROMPTS, salt=SALTS, priority=PRIORITIES)
    def serve(self, prompt, salt, priority):
        """Does what a server does first: allocates, computes what is not cached, commits."""
        i = min(set(range(8)) - self.requests.keys(), default=0)
        self.allocate_one(i, prompt, salt, priority)
        if self.is_usable(i):
            self.write(i, MAX_TOKENS)
            if self.requests[i].num_known <= self.model.num_written(i):
                self.commit_one(i, self.model.num_written(i))

    @rule(
        data=st.data(),
        prompt=PROMPTS,
        more=st.one_of(st.just([]), TOKENS),
        is_known=st.sampled_from([True, True, True, False]),
        salt=SALTS,
        priority=PRIORITIES,
        num_written=st.sampled_from([MAX_TOKENS, 5, 0]),
    )
    def allocate(self, data, prompt, more, is_known, salt, priority, num_written):
        i = self.id_of(data, set(range(8)) - self.requests.keys())
        known = prompt if is_known else None
        self.allocate_one(i, known, salt, priority, (prompt + more)[:MAX_TOKENS])
        if self.is_usable(i):
            self.write(i, num_written)

    def allocate_one(self, i, prompt, salt, priority, tokens=None):
        """Allocates a request of which a prompt is told, and of which all tokens are given."""
        known = prompt or []
        tokens = known if tokens is None else tokens
        request = self.manager.new_request(
            i, len(tokens), priority=priority, prompt_token_ids=prompt, cache_salt=salt
        )
        found = self.model.found(salt, known)
        want = self.refusal_of(i, tokens, salt, known, found, priority)
        assert self.manager.can_allocate(request) == (want is None)
        report = self.manager.explain_lookup(known, salt)
        assert report.num_cached_tokens == found and str(report)
        num_gone = self.num_gone()
        handles = []
        self.call("allocate", want, lambda: handles.append(self.manager.allocate(request)))
        if want:
            self.num_refused += 1
            return
        handle = handles.pop()
        got = handle.num_cached_tokens
        if self.num_gone() == num_gone:
            assert got == found, "all that was cached is used"
        assert got in (found, found - found % BLOCK_SIZE), "at most a copy is missed"
        event(f"cached: {'nothing' if not got else 'tail' if got % BLOCK_SIZE else 'blocks'}")
        if self.model.config is not None:
            self.num_prompt_tokens += len(known)
            self.num_reused_tokens += got
        new = Request(salt, priority, handle, [], len(known), got)
        new.grow(tokens)
        new.cells[:got] = self.model.payloads_of(salt, tokens[:got])
        self.requests[i] = new
        self.after_a_call()
        assert tokens_of(handle) == new.cells[: len(tokens)]
        self.pressure_was_told_when_it_changed()

    def refusal_of(self, i, tokens, salt, known, found, priority):
        if i in self.requests:
            return errors.DuplicateRequestError
        held = self.model.names(salt, known)[: found // BLOCK_SIZE]
        blocks = [self.model.block_of(name) for name in held]
        num_new = num_blocks_for(len(tokens)) - len(blocks)
        if self.model.fits(num_new, priority, self.policy, more=blocks, rows=1):
            return None
        is_crowded = len(self.model.residents()) == MAX_SEQS
        return errors.OutOfRowsError if is_crowded else errors.OutOfBlocksError

    @rule(
        data=st.data(),
        num_written=st.sampled_from([MAX_TOKENS, 2, 0]),
        pin=st.sampled_from([None, None, None, True, False]),
    )
    def compute_and_commit(self, data, num_written, pin):
        if (i := self.some_id(data)) is None:
            return
        self.write(i, num_written)
        if data.draw(st.sampled_from([False] * 5 + [True])):
            self.commit_too_much(i)
        known, most = self.requests[i].num_known, self.model.num_written(i)
        if known <= most:  # Else it would say that more is computed than is.
            num_tokens = data.draw(st.one_of(st.just(most), st.integers(known, most)))
            self.commit_one(i, num_tokens, pin)

    def commit_one(self, i, num_tokens, pin=None):
        request, model = self.requests[i], self.model
        more = request.tokens[request.num_known : num_tokens]
        retention = None if pin is None else Retention(is_pinned=pin)
        wanted, before = model.to_keep(i, num_tokens), model.lease_of(i)
        got = self.manager.commit(request.handle, more, retention=retention)
        request.num_known = request.num_computed = num_tokens
        is_full = model.config is not None and model.config.max_prefixes < 100
        assert got == BLOCK_SIZE * model.lease_of(i)
        if not is_full:
            assert model.lease_of(i) == max(before, len(wanted))
        model.learn(wanted[: model.lease_of(i)])
        if len(wanted) >= max(1, before):
            covered = model.covered(i)
            if retention is not None and not pin:
                model.pins -= set(covered)
            elif retention is not None and covered:
                model.pins.add(covered[-1])
            model.retain(i)
        event(f"committed {'some' if got else 'nothing'}")
        self.pressure_was_told_when_it_changed()

    def commit_too_much(self, i):
        request, before = self.requests[i], whole(self.manager)
        too_many = [1] * (len(request.tokens) - request.num_known + 1)
        with pytest.raises(ValueError, match="Extend it first"):
            self.manager.commit(request.handle, too_many)
        assert whole(self.manager) == before

    @rule(data=st.data(), num_tokens=st.sampled_from([0, 1, 1, 2, 4, 7]))
    def extend(self, data, num_tokens):
        ids = self.some_ids(data, 2)
        requests = [self.requests[i] for i in ids]
        if any(len(r.tokens) + num_tokens > MAX_TOKENS for r in requests) or not ids:
            return
        num_new = sum(r.num_new(num_tokens) for r in requests)
        priority = max(request.priority for request in requests)
        is_ok = self.model.fits(num_new, priority, self.policy, but=ids)
        handles = [request.handle for request in requests]
        want = None if is_ok else errors.OutOfBlocksError
        self.call("extend", want, lambda: self.manager.extend_all(handles, num_tokens))
        if want is None:
            for request in requests:
                request.grow(self.some_tokens(data, num_tokens))
            self.after_a_call()

    @rule(data=st.data(), reserve=st.booleans())
    def extend_in_a_step(self, data, reserve):
        counts = {i: data.draw(st.integers(0, MAX_NEW)) for i in self.some_ids(data, 2)}
        requests = {i: self.requests[i] for i in counts}
        if any(len(r.tokens) + counts[i] > MAX_TOKENS for i, r in requests.items()):
            return
        num_new = sum(r.num_new(counts[i]) for i, r in requests.items())
        free = self.manager.free_block_count()
        num_there = self.model.num_available() if reserve else free
        args = self.padded([r.handle for r in requests.values()], list(counts.values()))
        ok = self.manager.run(
            extend_inside, *args, extends=True, reserve_tokens=MAX_NEW if reserve else 0
        )
        assert bool(ok) == (num_new <= num_there)
        event(f"extend in a step: {'ok' if ok else 'no room'}")
        if ok:
            for i, request in requests.items():
                request.grow(self.some_tokens(data, counts[i]))
        self.after_a_call()

    @rule(data=st.data())
    def cut_in_a_step(self, data):
        lens = {
            i: data.draw(st.integers(0, len(self.requests[i].tokens)))
            for i in self.some_ids(data, 2)
        }
        handles = [self.requests[i].handle for i in lens]
        num_copies = self.model.num_shared_tails(lens)
        is_ok = num_copies <= self.manager.free_block_count()
        leases = {i: self.model.covered(i) for i in lens}
        ok = self.manager.run(cut_inside, *self.padded(handles, list(lens.values())), extends=True)
        assert bool(ok) == is_ok
        event(f"cut in a step: {'a copy' if ok and num_copies else 'ok' if ok else 'no room'}")
        for i, num_tokens in lens.items() if ok else ():
            if num_tokens // BLOCK_SIZE < len(leases[i]):
                self.model.retain_names(leases[i])
            self.requests[i].cut(num_tokens)
        self.after_a_call()

    @precondition(lambda self: len(self.model.residents()) > 1)
    @rule(data=st.data(), is_fair=st.sampled_from([True, True, False]))
    def share_prefix(self, data, is_fair):
        ids, model = data.draw(st.permutations(sorted(self.model.residents())))[:2], self.model
        source, target = (self.requests[i] for i in ids)
        num_common_tokens = min(num_common(source.tokens, target.tokens), model.num_written(ids[0]))
        num_tokens = data.draw(st.integers(0, num_common_tokens if is_fair else MAX_TOKENS))
        if num_tokens > min(len(source.tokens), len(target.tokens)):
            with pytest.raises(ValueError, match="must not exceed"):
                self.manager.share_prefix(*ids, num_tokens)
            return
        known = min(num_tokens, *map(model.num_known, ids))
        if source.salt != target.salt or source.tokens[:known] != target.tokens[:known]:
            want = errors.PrefixMismatchError
        elif num_tokens > num_common_tokens:
            return  # It would be told what is not true.
        else:
            is_held = num_tokens <= BLOCK_SIZE * model.lease_of(ids[1])
            num_new = 0 if is_held else model.num_shared_tails({ids[1]: num_tokens})
            is_ok = model.fits(num_new, target.priority, self.policy, but=ids)
            want = None if is_ok else errors.OutOfBlocksError
        num_leased = model.lease_of(ids[1]) * BLOCK_SIZE
        self.call("share_prefix", want, lambda: self.manager.share_prefix(*ids, num_tokens))
        if want is None:
            target.cells[:num_tokens] = source.cells[:num_tokens]
            if num_leased < num_tokens and source.num_computed < num_tokens:
                most = max(source.num_computed, num_leased)
                target.num_computed = min(target.num_computed, most)
            self.after_a_call()

    @rule(data=st.data())
    def deallocate(self, data):
        i = self.id_of(data, self.requests)
        if i in self.requests:
            self.end(i)
        else:
            assert refused(self.manager.deallocate, i) is errors.UnknownRequestError

    def end(self, i):
        self.read(i)
        self.model.end([i])
        self.manager.deallocate(i)
        del self.requests[i]
        self.after_a_call()
        self.pressure_was_told_when_it_changed()

    @rule(data=st.data(), what=st.sampled_from(["gc", "drop", "defragment", "wait", "wait long"]))
    def tidy(self, data, what):
        if what == "defragment":
            self.manager.defragment()
        elif what in ("wait", "wait long"):
            self.clock.now += TTL_SECONDS / (1 if what == "wait long" else 3)
        else:
            self.gc(data, what == "drop")

    def gc(self, data, drops):
        if drops and (i := self.some_id(data)) is not None:
            self.requests[i].handle = None
        gone = [i for i, request in self.requests.items() if request.handle is None]
        self.model.end(gone)
        for i in gone:
            del self.requests[i]
        assert self.manager.gc().caches_freed == len(gone)
        self.after_a_call()
        assert all(self.model.is_alive(name) for name in self.model.kept)

    @rule(data=st.data())
    def swap_out(self, data):
        i = self.id_of(data, self.model.residents())
        if i in self.requests:
            if not self.requests[i].is_away:
                self.model.end([i])
            self.manager.swap_out(i)
            self.requests[i].is_away = True
            assert self.manager.get_handle(i).key_cache(0) is None
            self.after_a_call()

    @rule(data=st.data())
    def swap_in(self, data):
        away = self.requests.keys() - self.model.residents().keys()
        i = self.id_of(data, away)
        if i not in away:
            return
        request = self.requests[i]
        is_ok = self.model.fits(request.num_blocks, request.priority, self.policy, rows=1)
        is_crowded = len(self.model.residents()) == MAX_SEQS
        want = errors.OutOfRowsError if is_crowded else errors.OutOfBlocksError
        self.call("swap_in", None if is_ok else want, lambda: self.manager.swap_in(i))
        if is_ok:
            self.note_preempted()
            request.is_away = False
            self.model.learn(self.model.to_keep(i, request.num_computed))
            self.model.retain(i)
            self.read(i)

    @rule(data=st.data(), num_blocks=st.sampled_from([1, 3, 0]))
    def take_blocks(self, data, num_blocks):
        """Takes blocks for no request; or for 0, gives some back."""
        if self.model.taken and not num_blocks:
            self.free_blocks(data)
        else:
            self.allocate_blocks(num_blocks)

    def allocate_blocks(self, num_blocks):
        want = None
        if not self.model.fits(num_blocks, Priority.Normal, self.policy):
            want = errors.OutOfBlocksError
        blocks = []
        self.call(
            "allocate_blocks", want, lambda: blocks.extend(self.manager.allocate_blocks(num_blocks))
        )
        assert not set(blocks) & self.model.in_use()
        self.model.taken += blocks
        self.after_a_call()

    def free_blocks(self, data):
        held = {b for blocks in rows_of(self.manager).values() for b in blocks}
        for block in held | {self.model.block_of(name) for name in self.model.kept}:
            want = errors.ForeignBlockError
            assert refused(self.manager.free_blocks, [block]) is want, "who holds a block frees it"
        blocks = data.draw(st.lists(st.sampled_from(self.model.taken), min_size=1, unique=True))
        self.model.taken = [block for block in self.model.taken if block not in blocks]
        self.manager.free_blocks(blocks)

    @precondition(lambda self: self.model.config != self.scenario.later)
    @rule(is_meant=st.sampled_from([False, False, True]))
    def enable_prefix_caching(self, is_meant):
        if is_meant:
            self.manager.enable_prefix_caching(self.scenario.later)
            self.model.config = self.scenario.later

    @precondition(lambda self: "bad" in (self.scenario.block_policy, self.scenario.request_policy))
    @rule(
        block_mode=st.sampled_from(BadBlockPolicy.MODES),
        request_mode=st.sampled_from(BadRequestPolicy.MODES),
        callback_raises=st.booleans(),
    )
    def misbehave(self, block_mode, request_mode, callback_raises):
        self.block_policy.mode, self.callback_raises = block_mode, callback_raises
        if isinstance(self.request_policy, BadRequestPolicy):
            self.request_policy.mode = request_mode


@pytest.mark.parametrize("name", SCENARIOS)
def test_random_lives_agree_with_the_model(name):
    examples = max(1, settings.default.max_examples // 40)
    run_state_machine_as_test(
        functools.partial(SharingMachine, SCENARIOS[name]),
        settings=settings(settings.default, max_examples=examples, stateful_step_count=40),
    )
