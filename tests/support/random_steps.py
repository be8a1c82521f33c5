"""Steps of a random program: they write tokens, and change the tables of their rows.

A step that changes tables consists of single changes. The model predicts whether each one fits,
applies it, and then applies what the manager does after the step.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax import Device, errors
from ferrum_jax.ops.indexing import token_slots
from ferrum_jax.types import NULL_SEQ
from tests.support.manager_model_records import Block, Kept, Origin, Request, merge
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS
from tests.support.prefix_model import num_common
from tests.support.random_manager import ManagerBesideModel
from tests.support.random_scenarios import HEAD_DIM, NUM_LAYERS, Draw

MAX_NEW = 4  # Tokens that a step may add to a row.


@functools.partial(jax.jit, donate_argnums=0)
def write_inside(state, seq_ids, positions, keys, values):
    """Writes tokens of one row in all layers, at positions among the tokens that it holds.

    The positions are those in each layer group: i32[G, T], -1 for no token.
    """
    tables, pool = state.tables, state.pool
    for group, places in enumerate(positions):
        row = seq_ids[0] + group * tables.max_seqs
        token_format = tables.token_formats[row]
        slots = token_slots(
            tables.block_ids[row][None],
            places[None],
            pool.num_blocks,
            jnp.asarray(tables.block_sizes, jnp.int32)[token_format][None, None],
            pool.slots_per_block,
        )[0]
        formats = jnp.full_like(slots, token_format)
        for index in range(pool.num_layers):
            layer = group * pool.num_layers + index
            pool = fj.write(pool, index, slots, keys[layer], values[layer], formats)
    return state.with_pools([pool]), None


@dataclasses.dataclass
class Change:
    """One change of the tables inside a step.

    Attributes:
      kind: "extend", "cut", "free", "fork" or "share".
      target: The request whose row changes.
      source: The request that it forks or shares, if any.
      num_tokens: Tokens to add, to keep or to share.
    """

    kind: str
    target: int
    source: int | None = None
    num_tokens: int = 0

    def apply(self, state, rows: dict[int | None, Any]):
        """Makes the change, always with the same shapes, so that each kind compiles once."""
        target, source = (np.asarray([rows[i], NULL_SEQ]) for i in (self.target, self.source))
        counts = np.asarray([self.num_tokens, 0], np.int32)
        if self.kind == "extend":
            return fj.extend(state, target, counts, max_new_tokens=MAX_NEW)
        if self.kind == "cut":
            return fj.truncate(state, target, counts)
        if self.kind == "fork":
            return fj.fork(state, source, target)
        if self.kind == "share":
            return fj.share(state, source, target, counts)
        return fj.free(state, target), True


class StepOperations(ManagerBesideModel):
    """Operations that run steps."""

    # Steps that change tables.

    def change_in_a_step(self, draw: Draw) -> None:
        """Runs a step with several changes of different rows."""
        device, ids = self.some_rows(draw, most=3)
        if not ids:
            return
        reserve = draw.one_of([0, MAX_NEW])
        before = {i: (self.requests[i].lease, len(self.requests[i].tokens)) for i in ids}
        self.attempt(
            "change in a step", None, lambda: self.run_changes(draw, ids, 3, True, reserve)
        )
        self.follow(device, before)
        for i in ids:
            self.requests[i].max_computed = len(self.requests[i].tokens)
        self.settle()
        self.read_after_a_step(before)

    def change_lengths_without_extends(self, draw: Draw) -> None:
        """Runs a step that changes lengths without `extends`: the next call raises."""
        device, ids = self.some_rows(draw, most=2)
        if not ids:
            return
        residents = self.model.on(device)
        before = {i: (r.lease, len(r.tokens)) for i, r in residents.items()}
        held = [(i, len(r.tokens)) for i, r in residents.items()]
        self.run_changes(draw, ids, 1, False, 0)
        has_changed = held != [(i, len(r.tokens)) for i, r in residents.items()]
        for i in ids:
            self.requests[i].max_computed = before[i][1]
        if has_changed:
            self.require_notice(draw, ids[0])
            self.faults["a step changes lengths without extends"] += 1
            self.follow(device, before)
        self.settle()
        self.read_after_a_step(before)

    def read_after_a_step(self, before: dict[int, tuple[list[Kept], int]]) -> None:
        for i, (_, length) in before.items():
            if 0 < length < len(self.requests[i].tokens):
                self.adopt_after(i, length)
            self.read(i)

    def require_notice(self, draw: Draw, i: int) -> None:
        calls = [
            lambda: self.manager.extend(self.handle(i), 0),
            lambda: self.manager.swap_out(i),
            lambda: self.manager.commit(self.handle(i)),
            lambda: self.manager.deallocate(i),
            lambda: self.manager.run(lambda state, _: (state, None), [self.handle(i)]),
        ]
        try:
            draw.one_of(calls)()
        except errors.UncountedTokensError:
            self.refusals["UncountedTokensError"] += 1
        else:
            raise AssertionError("a step has changed lengths, and the next call does not raise")

    def some_rows(self, draw: Draw, most: int) -> tuple[Device, list[int]]:
        """Draws a device and some of its requests."""
        device = draw.one_of(list(self.manager.supported_devices()))
        left, ids = sorted(self.model.on(device)), []
        while left and len(ids) < most:
            ids.append(draw.one_of(left))
            left.remove(ids[-1])
        return device, ids

    def run_changes(self, draw: Draw, ids: Sequence[int], most: int, extends: bool, reserve: int):
        """Runs a step that makes changes, and applies each to the model."""
        done: list[Change] = []

        def step(state, seq_ids):
            rows: dict[int | None, Any] = dict(zip(ids, np.asarray(seq_ids), strict=True))
            rows[None], has_freed = NULL_SEQ, False
            for _ in range(draw.number(1, most)):
                change = self.draw_change(draw, ids, done, extends)
                if change is None:
                    continue
                device = self.requests[ids[0]].device
                num_new, held = self.num_new_for(change), self.held_on(device)
                if (num_new and has_freed) or self.takes_what_it_frees(change):
                    continue  # A block that is freed and taken in one step keeps its bytes.
                is_ok = num_new is not None and num_new <= int(state.tables.num_free)
                state, ok = change.apply(state, rows)
                assert bool(ok) == is_ok, f"{change}: {ok}"
                self.note(f"{change.kind} in a step", "ok" if is_ok else "no room")
                if is_ok:
                    self.follow_change(change)
                    has_freed |= not held <= self.held_on(device)
                done.append(change)
            return jax.block_until_ready(state), None

        handles = [self.handle(i) for i in ids]
        self.manager.run(step, handles, extends=extends, reserve_tokens=reserve)

    def draw_change(
        self, draw: Draw, ids: Sequence[int], done: Sequence[Change], shares: bool
    ) -> Change | None:
        """Draws a change of a row that no other change names."""
        named = {i for change in done for i in (change.target, change.source)}
        changed = {change.target for change in done}
        targets = [i for i in ids if i not in named]
        if not targets:
            return None
        i = draw.one_of(targets)
        request = self.requests[i]
        kinds = ["extend", "cut", "cut", "share", "share", "fork", "free"]
        kind = draw.one_of(kinds if request.tokens else ["fork", "fork", "extend"])
        if kind == "extend":
            most = MAX_NEW
            if request.adopted is not None:  # Its blocks hold more than `MAX_TOKENS`.
                most = min(MAX_NEW, MAX_TOKENS - len(request.tokens))
            return Change(kind, i, num_tokens=draw.number(0, most))
        if kind == "cut":
            return Change(kind, i, num_tokens=draw.number(0, len(request.tokens)))
        if kind == "free":
            return Change(kind, i)
        sources = [j for j in ids if j not in changed and j != i]
        if not sources:
            return None
        j = draw.one_of(sources)
        source = self.requests[j]
        if kind == "fork":
            # What is not written yet would be written by both, in the same blocks.
            is_whole = source.num_written == len(source.tokens)
            return Change(kind, i, j) if is_whole else None
        most = min(num_common(source.tokens, request.tokens), source.num_written)
        num_tokens = draw.number(0, most)
        if request.may_be_cached and not source.may_be_cached:
            num_tokens -= num_tokens % BLOCK_SIZE  # A copied tail would not be known.
        is_native = request.adopted is None and source.adopted is None
        return Change(kind, i, j, num_tokens) if shares and is_native else None

    def takes_what_it_frees(self, change: Change) -> bool:
        """Whether an extension takes blocks that the request's own window releases."""
        request, n = self.requests[change.target], change.num_tokens
        return bool(change.kind == "extend" and n and request.passed and request.num_new_for(n))

    def num_new_for(self, change: Change) -> int | None:
        """Blocks that a change needs; None if it is impossible."""
        request, n = self.requests[change.target], change.num_tokens
        if change.kind == "free":
            return 0
        if change.kind == "extend":
            num_pruned = request.num_pruned if request.window is None else 0
            is_long = len(request.tokens) - num_pruned + n > MAX_TOKENS
            return None if is_long else self.model.num_to_extend([change.target], n)
        if change.kind == "fork":
            source = self.requests[change.source]
            num_held = len(source.tokens) - source.num_pruned
            num_tails = int(num_held % source.block_size > 0)
            if source.window is not None:
                num_tails += int(len(source.tokens) % BLOCK_SIZE > 0)
            return num_tails if source.tokens and not request.tokens else None
        cut = self.requests[change.source] if change.kind == "share" else request
        if n and cut.num_released > cut.first_needed(n):
            return None
        num_held = n
        if change.kind == "cut" and n:
            num_held -= request.num_pruned
            if num_held <= 0:
                return None
        return self.model.num_cut_through(request, num_held, n)

    def follow_change(self, change: Change) -> None:
        """Applies a change to the model."""
        request, n = self.requests[change.target], change.num_tokens
        if change.kind == "extend":
            self.lengthen(change.target, n)
        elif change.kind in ("cut", "free"):
            self.cut(request, n)
        else:
            source = self.requests[change.source]
            if change.kind == "fork":
                n = len(source.tokens)
                request.tokens, request.blocks = list(source.tokens), [Block()] * source.num_full
                request.origins = [Origin() for _ in range(n)]
                for name in ("adopted", "num_adopted_written", "block_size", "num_pruned"):
                    setattr(request, name, getattr(source, name))
                request.blocks[-1:] = [source.blocks[-1].copy()]
                request.local = [block and block.copy() for block in source.local]
            self.share_local(source, request, n)
            num_full, num_tail = divmod(n - request.num_pruned, request.block_size)
            if change.kind == "share" and num_tail:
                self.model.make_own(request, request.blocks, num_full)
                tail = source.blocks[num_full].cells[:num_tail]
                request.blocks[num_full].cells[:num_tail] = tail
            request.blocks[:num_full] = source.blocks[:num_full]

    def share_local(self, source: Request, target: Request, n: int) -> None:
        """Makes a request share the first `n` tokens of another one in the window's group."""
        num_full, num_tail = divmod(n, BLOCK_SIZE)
        if target.window is None or not n:
            return
        if num_tail and num_full < len(target.local) and target.local[num_full]:
            self.model.make_own(target, target.local, num_full)
            own, its = target.local[num_full], source.local[num_full]
            assert own is not None and its is not None
            own.cells[:num_tail] = its.cells[:num_tail]
        num_released = max(source.num_released, target.num_released)
        target.local[:num_full] = source.local[:num_full]
        target.local[:num_released] = [None] * num_released

    def cut(self, request: Request, n: int) -> None:
        """Truncates a request to `n` tokens; later slots of its last block are zeroed."""
        is_shorter = n < len(request.tokens)
        del request.tokens[n:], request.origins[n:]
        if not n:
            request.adopted, request.num_pruned, request.block_size = None, 0, BLOCK_SIZE
        num_full, num_tail = divmod(n - request.num_pruned, request.block_size)
        if num_tail:
            self.model.make_own(request, request.blocks, num_full)
        self.cut_local(request, n, is_shorter)
        del request.blocks[request.num_full :]
        if request.adopted is not None:
            request.num_adopted_written = min(request.num_adopted_written, n)
            num_kept = n - request.num_pruned
            request.adopted = [(k[:num_kept], v[:num_kept]) for k, v in request.adopted]
        elif num_tail and is_shorter:
            request.blocks[-1].cells[num_tail:] = [0] * (BLOCK_SIZE - num_tail)

    def cut_local(self, request: Request, n: int, is_shorter: bool) -> None:
        """Truncates a request to `n` tokens in the window's group."""
        num_full, num_tail = divmod(n, BLOCK_SIZE)
        if request.window is None:
            return
        if num_tail:
            self.model.make_own(request, request.local, num_full)
        del request.local[request.num_local :]
        if num_tail and is_shorter:
            last = request.local[-1]
            assert last is not None
            last.cells[num_tail:] = [0] * (BLOCK_SIZE - num_tail)

    def lengthen(self, i: int, count: int) -> None:
        """Adds `count` tokens to a request, which are not written yet."""
        request = self.requests[i]
        if count:
            first = request.first_needed(len(request.tokens))
            request.local[:first] = [None] * first
        is_native = request.adopted is None
        request.tokens += self.tokens_after(request.tokens, count)
        num_full = request.num_full - len(request.blocks)
        request.blocks += [Block(is_native=is_native) for _ in range(num_full)]
        num_local = request.num_local - len(request.local)
        request.local += [Block(group=1) for _ in range(num_local)]
        request.origins += [Origin() for _ in range(count)]

    def follow(self, device: Device, before: dict[int, tuple[list[Kept], int]]) -> None:
        """Does what the manager does after a step: uncaches blocks that no lease covers.

        Args:
          device: The device of the step.
          before: The cached blocks and the length of each request before the step.
        """
        model, loose = self.model, list[Kept]()
        for i, (lease, _) in before.items():
            request, length = self.requests[i], len(self.requests[i].tokens)
            for bound in ("num_told", "max_computed"):
                setattr(request, bound, min(getattr(request, bound), length))
            for bound in ("num_computed", "num_retained"):
                setattr(request, bound, min(getattr(request, bound), request.num_told))
            if length // BLOCK_SIZE < len(lease):
                model.retain(lease)
            keeps = [block.kept for block in request.blocks if block.kept]
            covered = request.lease
            names = model.names(request.key, request.tokens)[: len(covered)]
            if [(kept.salt, kept.tokens) for kept in covered] != names:
                covered = []
            model.mark_known(request, len(covered) * BLOCK_SIZE)
            loose += keeps[len(covered) :]
        model.uncache(device, loose)
        is_tainted = any(not self.requests[i].may_be_cached for i in before)
        for i, (_, length) in before.items():
            request = self.requests[i]
            if is_tainted and request.tokens and not length:
                request.may_be_cached = False
        for i in before:
            for j, other in model.on(device).items():
                if i != j:
                    self.follow_sharing(self.requests[i], other)

    def follow_sharing(self, one: Request, other: Request) -> None:
        """Merges what is known of two requests that hold the same blocks."""
        pairs = zip(one.blocks, other.blocks, strict=False)
        same = [first is second for first, second in pairs]
        num_same = same.index(False) if False in same else len(same)
        merge(one, other, num_same * BLOCK_SIZE)
        if num_same > len(one.lease) and not (one.may_be_cached and other.may_be_cached):
            one.may_be_cached = other.may_be_cached = False

    # Steps that write.

    def grow(self, draw: Draw, i: int, count: int) -> None:
        """Adds tokens to a request, and writes some of them."""
        num_before = len(self.requests[i].tokens)
        self.lengthen(i, count)
        self.adopt_after(i, num_before)
        self.write_some(draw, i)

    def write_some(self, draw: Draw, i: int) -> None:
        """Writes the next tokens of a request; mostly all of them."""
        request = self.requests[i]
        begin, end = request.num_written, len(request.tokens)
        if draw.number(0, 3) == 0:
            end = draw.number(begin, end)
        if begin == end:
            return
        cells = self.model.writes.cells_for(request, begin, end, noise=draw.one_of([0, 0, 1]))
        keys, values = np.zeros((2, NUM_LAYERS, MAX_TOKENS, 1, HEAD_DIM), np.float32)
        for layer, (k, v) in enumerate(self.contents(cells)):
            keys[layer, : len(k)], values[layer, : len(v)] = k, v
        positions = np.full((self.scenario.num_groups, MAX_TOKENS), -1, np.int32)
        positions[:, : len(cells)] = np.arange(begin, end)
        positions[0, : len(cells)] -= request.num_pruned
        args = positions, keys, values
        self.call("write", None, lambda: self.manager.run(write_inside, [self.handle(i)], *args))
        request.max_computed = len(request.tokens)
        if request.adopted is not None:
            request.num_adopted_written = end
            self.adopt_after(i, begin)
        else:
            for position, cell in enumerate(cells, begin):
                block = request.blocks[position // BLOCK_SIZE]
                block.cells[position % BLOCK_SIZE] = cell
        for position, cell in enumerate(cells, begin):
            block = request.local[position // BLOCK_SIZE] if request.local else None
            if block is not None:
                block.cells[position % BLOCK_SIZE] = cell
        self.read(i)
