"""What is done in a random life of a manager of several devices: every operation, and faults.

An operation draws what it needs from whoever drives it: Hypothesis, or dice. It foretells the
outcome, makes the call, compares, and notes what was done.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.compression import CompressionMethod
from ferrum_jax.ops.indexing import token_slots
from ferrum_jax.types import TokenFormat
from tests.facade_life import (
    DEVICES,
    HEAD_DIM,
    LENGTHS,
    NUM_IDS,
    NUM_LAYERS,
    TTL_SECONDS,
    Draw,
    FacadeLife,
)
from tests.facade_model import Request
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

MAX_NEW = 4  # Tokens that a step may add to a row.
TOLERANCES = (0.0, 0.1, 0.25, 0.5)
RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)
METHODS = (
    CompressionMethod(num_sinks=1, num_recent=2),
    CompressionMethod(token_format=TokenFormat.Native, num_sinks=1, num_recent=2),
    CompressionMethod(scorer=None),
)


@functools.partial(jax.jit, donate_argnums=0)
def write_inside(state, seq_ids, positions, keys, values):
    """Writes tokens of one row, at places among those that it holds, in all layers."""
    tables, pool, row = state.tables, state.pool, seq_ids[0]
    token_format = tables.formats[row]
    slots = token_slots(
        tables.block_ids[row][None],
        positions[None],
        pool.num_blocks,
        jnp.asarray(tables.block_sizes, jnp.int32)[token_format][None, None],
        pool.slots_per_block,
    )[0]
    formats = jnp.full_like(slots, token_format)
    for layer in range(NUM_LAYERS):
        pool = fj.write(pool, layer, slots, keys[layer], values[layer], formats)
    return dataclasses.replace(state, pool=pool), None


@functools.partial(jax.jit, donate_argnums=0)
def extend_inside(state, seq_ids, num_tokens):
    """Lengthens rows without asking the host."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=MAX_NEW)


class FacadeOperations(FacadeLife):
    """A life, and what may happen in it."""

    # Requests come, grow and go.

    def allocate(self, draw: Draw) -> None:
        i = self.id_of(draw, set(range(NUM_IDS)) - self.requests.keys())
        old = draw.one_of(self.prompts)
        prompt = old[: draw.number(0, len(old))]
        prompt = (prompt + self.new_tokens(draw.one_of(LENGTHS)))[:MAX_TOKENS]
        self.prompts.append(prompt)
        salt, is_told = draw.one_of([None, None, None, "a"]), draw.number(0, 3) > 0
        if self.allocate_one(i, prompt, is_told, salt, draw.one_of([None, *DEVICES])):
            self.write_some(draw, i)
            self.commit_some(draw, i)

    def allocate_one(self, i, tokens, is_told, salt, device) -> bool:
        """Allocates a request, of which the prompt is told, or just the length."""
        known = tokens if is_told else None
        asked = self.manager.new_request(
            i, len(tokens), device=device, prompt_token_ids=known, cache_salt=salt
        )
        first = device or self.model.preference[0]
        home, want = self.model.home_for(len(tokens), first, salt, known or [])
        if i in self.requests:
            want = errors.DuplicateRequestError
        assert self.manager.can_allocate(asked) == (want is None)
        found = self.manager.explain_lookup(known or [], salt)
        handles: list[Any] = []
        self.call("allocate", want, lambda: handles.append(self.manager.allocate(asked)))
        if want or home is None:
            self.model.num_refused += 1
            return False
        handle = handles.pop()
        num_found, num_seen = handle.num_cached_tokens, found[home].num_cached_tokens
        assert num_found in (num_seen, num_seen - num_seen % BLOCK_SIZE), "a copy may be missed"
        assert num_found >= self.model.num_in_use(home, salt, known or [])
        self.note("cached", "some" if num_found else "nothing")
        new = Request(handle, home, salt, list(tokens), num_known=len(known or []))
        self.model.begin(i, new, num_found)
        self.read(i)
        return True

    def fork(self, draw: Draw) -> None:
        """A new request begins with all that is written of another one."""
        parent = self.id_of(draw, self.usable_ids())
        child = self.id_of(draw, set(range(NUM_IDS)) - self.requests.keys())
        if parent not in self.usable_ids() or child in self.requests:
            return
        source = self.requests[parent]
        tokens = source.tokens[: source.num_written]
        if self.allocate_one(child, tokens, False, source.salt, source.device):
            self.share_one(parent, child, len(tokens))

    def share(self, draw: Draw) -> None:
        ids = self.usable_ids()
        if len(ids) < 2:
            return
        source = draw.one_of(ids)
        target = draw.one_of([i for i in ids if i != source])
        num_tokens = num_common(self.requests[source].tokens, self.requests[target].tokens)
        # What is not written yet would be written by both, in the same blocks.
        num_tokens = min(num_tokens, self.requests[source].num_written)
        self.share_one(source, target, draw.number(0, num_tokens))

    def share_one(self, source: int, target: int, num_tokens: int) -> None:
        giver, taker = self.requests[source], self.requests[target]
        if giver.device != taker.device:
            want = errors.GeometryMismatchError
        elif giver.adopted is not None or taker.adopted is not None:
            want = errors.CompressionError
        elif giver.salt != taker.salt:
            want = errors.PrefixMismatchError
        else:
            num_new = self.model.num_new_to_share(taker, num_tokens)
            want = self.model.shortage_of_blocks(taker.device, num_new)
        self.call(
            "share_prefix", want, lambda: self.manager.share_prefix(source, target, num_tokens)
        )
        if want is None:
            self.model.share(giver, taker, num_tokens)
            self.read(target)

    def extend(self, draw: Draw) -> None:
        i, count = self.id_of(draw, self.requests), draw.one_of([0, 1, 2, 4, 8])
        if i not in self.requests:
            return
        request = self.requests[i]
        num_new = request.num_blocks_with(count) - request.num_blocks
        if request.is_away:
            want = errors.SwappedOutError
        elif len(request.tokens) + count > MAX_TOKENS:
            want = errors.SequenceTooLongError
        else:
            want = self.model.shortage_of_blocks(request.device, num_new)
        self.call("extend", want, lambda: self.manager.extend(self.handle(i), count))
        if want is None:
            self.grow(draw, i, count)

    def extend_in_a_step(self, draw: Draw) -> None:
        i, count = self.id_of(draw, self.usable_ids()), draw.number(0, MAX_NEW)
        if i not in self.usable_ids() or len(self.requests[i].tokens) + count > MAX_TOKENS:
            return
        request = self.requests[i]
        num_new = request.num_blocks_with(count) - request.num_blocks
        is_ok = self.model.shortage_of_blocks(request.device, num_new) is None
        counts = np.asarray([count], np.int32)
        ok = self.manager.run(
            extend_inside, [self.handle(i)], counts, extends=True, reserve_tokens=MAX_NEW
        )
        assert bool(ok) == is_ok
        self.note("extend in a step", "ok" if is_ok else "no room")
        if is_ok:
            self.grow(draw, i, count)

    def grow(self, draw: Draw, i: int, count: int) -> None:
        """Takes note that a request is longer, and writes some of it."""
        num_before = len(self.requests[i].tokens)
        self.model.grow(i, self.new_tokens(count))
        self.adopt_what_follows(i, num_before)
        self.write_some(draw, i)

    def write(self, draw: Draw) -> None:
        """Computes what a request lacks, and keeps it for others."""
        i = self.id_of(draw, self.usable_ids())
        if i in self.usable_ids():
            self.write_some(draw, i)
            self.commit_some(draw, i)

    def write_some(self, draw: Draw, i: int) -> None:
        """Writes a request's next tokens; mostly all of them."""
        request = self.requests[i]
        begin, end = request.num_written, len(request.tokens)
        if draw.number(0, 3) == 0:
            end = draw.number(begin, end)
        if begin == end:
            return
        cells = self.model.cells_for(request.salt, request.tokens[:end])[begin:]
        keys, values = np.zeros((2, NUM_LAYERS, MAX_TOKENS, 1, HEAD_DIM), np.float32)
        for layer, (k, v) in enumerate(self.contents(cells)):
            keys[layer, : len(k)], values[layer, : len(v)] = k, v
        positions = np.full(MAX_TOKENS, -1, np.int32)
        positions[: len(cells)] = np.arange(begin, end) - request.num_pruned
        self.manager.run(write_inside, [self.handle(i)], positions, keys, values)
        self.note("write", "ok")
        request.cells[begin:end] = cells
        self.adopt_what_follows(i, begin)
        self.read(i)

    def commit_some(self, draw: Draw, i: int) -> None:
        request = self.requests[i]
        if request.num_known > request.num_written or draw.number(0, 3) == 0:
            return  # It would say that more is computed than is; or it just waits.
        num_tokens = draw.number(request.num_known, request.num_written)
        more = request.tokens[request.num_known : num_tokens]
        got = self.manager.commit(self.handle(i), more)
        assert got == self.model.commit(i, num_tokens)
        self.note("commit", "some kept" if got else "nothing kept")

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
        i = self.id_of(draw, self.requests)
        if i in self.requests and draw.number(0, 1):
            self.requests[i].handle = None
        dropped = [i for i, request in self.requests.items() if request.handle is None]
        for i in dropped:
            self.model.end(i)
        assert self.manager.gc().caches_freed == len(dropped)
        self.note("gc", "some freed" if dropped else "ok")

    def defragment(self, draw: Draw) -> None:
        self.manager.defragment()
        self.note("defragment", "ok")

    # Devices.

    def prefer(self, draw: Draw) -> None:
        """Another order; devices that vanish from it keep what they have."""
        left, devices = list(DEVICES), []
        for _ in range(draw.number(1, len(DEVICES))):
            devices.append(draw.one_of(left))
            left.remove(devices[-1])
        self.manager.set_device_preference(devices)
        self.model.preference = devices
        self.note("set_device_preference", f"{len(devices)} devices")
        if any(request.device in left for request in self.requests.values()):
            self.faults["a device vanishes that has requests"] += 1

    def move(self, draw: Draw) -> None:
        i, device = self.id_of(draw, self.requests), draw.one_of([*DEVICES, *DEVICES, CPU[3]])
        with self.full_disk(draw) as is_full:
            want = self.model.refusal_to_move(i, device, is_full)
            self.call("move_cache", want, lambda: self.manager.move_cache(i, device))
        if want is None:
            self.model.move(i, device)
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
        plan = self.manager.plan_rebalance(tolerance)
        if fails and plan:
            breaks = [break_export, break_import, break_arrival]
            with self.broken_copies(draw, "rebalance", breaks):
                self.manager.rebalance_devices(tolerance)
        else:
            self.manager.rebalance_devices(tolerance)
            assert list(self.manager.last_rebalance) == plan
        for move in self.manager.last_rebalance:
            i: Any = move.request_id
            request = self.requests[i]
            assert request.device == move.source and move.target in self.model.preference
            assert move.num_bytes == request.num_blocks * self.block_bytes
            self.model.move(i, move.target)
            self.read(i)
        if before <= tolerance:
            assert not plan
        if not (fails or shares):
            assert self.model.spread() <= before
        self.note("rebalance", f"{len(self.manager.last_rebalance)} moves")

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
        num_native = -(-len(request.tokens) // BLOCK_SIZE)
        assert handle.stats().blocks_allocated <= ratio * num_native + 1e-9
        if handle.compression is not report:
            self.note("compress to", handle.compression.token_format.name)
            request.handle = handle
            self.adopt(i)
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
            self.call("swap_out", want, lambda: self.manager.swap_out(i))
        if want is None and not self.requests[i].is_away:
            self.model.leave(i)
            self.read(i)

    def swap_in(self, draw: Draw) -> None:
        i = self.id_of(draw, self.requests.keys() - self.usable_ids())
        want, is_away = self.model.refusal_to_return(i), self.is_away(i)
        self.call("swap_in", want, lambda: self.manager.swap_in(i))
        if want is None and is_away:
            self.model.come(i)
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
            self.manager.deallocate(i)
            self.model.end(i)


OPERATIONS = {
    FacadeOperations.allocate: 6,
    FacadeOperations.fork: 2,
    FacadeOperations.share: 2,
    FacadeOperations.extend: 4,
    FacadeOperations.extend_in_a_step: 2,
    FacadeOperations.write: 3,
    FacadeOperations.deallocate: 3,
    FacadeOperations.gc: 1,
    FacadeOperations.defragment: 1,
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
