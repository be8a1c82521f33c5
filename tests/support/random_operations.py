"""Operations of a random program on a manager of several devices, and the faults in them.

An operation draws its arguments, predicts the outcome by the model, makes the call, compares, and
counts what was done.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ferrum_jax import errors
from ferrum_jax.compression import CompressionMethod
from ferrum_jax.manager.moves import move_request
from ferrum_jax.ops import transfer
from ferrum_jax.types import TokenFormat
from tests.support.managers import BLOCK_SIZE, refused
from tests.support.multi_device import (
    CPU,
    DAMAGES,
    BrokenCopyError,
    all_of,
    break_arrival,
    break_export,
    break_import,
    damage,
    fill_disk,
)
from tests.support.random_requests import RequestOperations
from tests.support.random_scenarios import DEVICES, Draw

TOLERANCES = (0.0, 0.1, 0.25, 0.5)
RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)
METHODS = (
    CompressionMethod(num_sinks=1, num_recent=2),
    CompressionMethod(token_format=TokenFormat.Native, num_sinks=1, num_recent=2),
    CompressionMethod(scorer=None),
)


class Operations(RequestOperations):
    """A manager beside its model, and every operation."""

    # Faults.

    @contextlib.contextmanager
    def full_disk(self, draw: Draw) -> Iterator[bool]:
        """Makes the disk full inside, sometimes; yields whether it is."""
        is_full = self.scenario.has_disk and draw.number(0, 3) == 0
        with pytest.MonkeyPatch.context() as monkeypatch:
            if is_full:
                fill_disk(monkeypatch)
                self.faults["the disk is full"] += 1
            yield is_full

    @contextlib.contextmanager
    def broken_copies(self, draw: Draw, what: str, breaks: Sequence[Any], num_chunks: int = 1):
        """Makes the copy of the call inside fail, perhaps after some chunks; nothing is lost."""
        break_it, was_broken = draw.one_of(breaks), False
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(transfer, "CHUNK_BYTES", self.block_bytes)
            break_it(monkeypatch, draw.number(0, num_chunks - 1))
            try:
                yield
            except BrokenCopyError:
                was_broken = True
        assert was_broken, f"{what} has ignored a fault"
        self.faults[f"{what}: {break_it.__name__}"] += 1
        self.note_choices()  # Room may have been made.
        self.check()

    # Devices.

    def prefer(self, draw: Draw) -> None:
        """Sets another order of devices; devices that are left out keep their requests."""
        left, devices = list(DEVICES), []
        for _ in range(draw.number(1, len(DEVICES))):
            devices.append(draw.one_of(left))
            left.remove(devices[-1])
        call = functools.partial(self.manager.set_device_preference, devices)
        self.call("set_device_preference", None, call)
        self.model.preference = devices
        if any(request.device in left for request in self.requests.values()):
            self.faults["a device with requests is left out"] += 1

    def move(self, draw: Draw) -> None:
        i, device = self.id_of(draw, self.requests), draw.one_of([*DEVICES, *DEVICES, CPU[3]])
        with self.full_disk(draw) as is_full:
            want = self.model.refusal_to_move(i, device, is_full)
            if is_full and want is errors.CorruptFileError:
                return  # Either error may be raised.
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
        """Applies each move inside to the model at once: the next move may evict what was moved."""

        def followed(i, source, target, **how) -> None:
            move_request(i, source, target, **how)
            self.note_choices()
            self.model.move(i, target.pool.device)
            self.settle()

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("ferrum_jax.manager.multi_device.move_request", followed)
            yield

    # Compression.

    def compress(self, draw: Draw) -> None:
        """Compresses a request: a refusal has no effect, a success meets the ratio."""
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
            return  # A dropped token could not be written.
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
        self.note_choices()
        self.settle()
        num_native = -(-len(request.tokens) // BLOCK_SIZE)
        num_local = len(request.held) - len(request.blocks)
        assert handle.stats().blocks_allocated - num_local <= ratio * num_native + 1e-9
        self.read(i)

    # Swapping.

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
            self.model.swap_out(i)
            self.settle()
            self.read(i)

    def swap_in(self, draw: Draw) -> None:
        i = self.id_of(draw, self.requests.keys() - self.usable_ids())
        want, is_away = self.model.refusal_to_return(i), self.is_away(i)
        self.call("swap_in", want, lambda: self.manager.swap_in(i))
        if want is None and is_away:
            self.model.swap_in(i)
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
            num_chunks = request.num_blocks.bit_count()  # At least so many.
            with self.broken_copies(draw, "swap in", [break_import], num_chunks):
                self.manager.swap_in(i)

    def damage_a_file(self, draw: Draw) -> None:
        """Damages a file on disk; then repairs it, deallocates its request, or leaves it."""
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
    Operations.allocate: 6,
    Operations.allocate_and_share: 2,
    Operations.fork: 2,
    Operations.share: 2,
    Operations.extend: 4,
    Operations.decode: 2,
    Operations.change_in_a_step: 5,
    Operations.change_lengths_without_extends: 1,
    Operations.write: 5,
    Operations.deallocate: 3,
    Operations.gc: 1,
    Operations.defragment: 1,
    Operations.reset: 1,
    Operations.change_weights: 1,
    Operations.configure: 1,
    Operations.change_policies: 1,
    Operations.take_blocks: 1,
    Operations.prefer: 1,
    Operations.move: 4,
    Operations.move_by_a_copy_that_fails: 1,
    Operations.rebalance: 2,
    Operations.compress: 3,
    Operations.swap_out: 3,
    Operations.swap_in: 3,
    Operations.swap_by_a_copy_that_fails: 1,
    Operations.damage_a_file: 2,
}
"""Relative frequency of each operation."""
