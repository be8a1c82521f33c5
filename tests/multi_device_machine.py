"""Random lives of a manager of three devices against a dull model of it, checked at every step.

Each token that is written is unique, so a byte that lands in the wrong place is seen. Run by
`test_multi_device_state_machine.py`, on four CPU devices.
"""

import contextlib
import dataclasses
import functools

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import ferrum_jax as fj
from ferrum_jax import Device, errors
from ferrum_jax.ops import transfer
from tests.managers import BLOCK_BYTES, BLOCK_SIZE, MAX_TOKENS, refused, tokens_of, write_tokens
from tests.multi_device import (
    CPU,
    BrokenCopyError,
    all_of,
    break_arrival,
    break_export,
    break_import,
    make_multi,
)

DEVICES, MAX_BLOCKS, MAX_ROWS, NUM_IDS = CPU[:3], 6, 3, 9
LENGTHS = (12, 9, 15, 7, 3, 0, 2)


@dataclasses.dataclass
class Request:
    """What one request should hold, and where."""

    handle: fj.KvCacheHandle
    device: Device
    tokens: list[int] = dataclasses.field(default_factory=list)
    is_away: bool = False

    @property
    def num_blocks(self) -> int:
        return -(-len(self.tokens) // BLOCK_SIZE)


class MultiDeviceMachine(RuleBasedStateMachine):
    """Every method, in any order, on devices whose copies sometimes fail."""

    def __init__(self, caches_prefixes: bool):
        super().__init__()
        self.caches_prefixes = caches_prefixes
        self.next_token = 1

    @initialize(
        lengths=st.lists(st.sampled_from(LENGTHS), min_size=2, max_size=7), grows=st.booleans()
    )
    def begin(self, lengths, grows):
        prefixes = fj.PrefixCacheConfig(
            max_prefixes=99,
            min_prefix_length=1,
            prefix_ttl_seconds=1e6,
            enable_cross_request_sharing=True,
        )
        self.manager = make_multi(
            geometry={"max_seqs": MAX_ROWS},
            max_blocks=MAX_BLOCKS,
            initial_blocks=2 if grows else MAX_BLOCKS,
            enable_prefix_caching=self.caches_prefixes,
            prefix_cache_config=prefixes,
        )
        self.preference = list(DEVICES)
        self.requests: dict[int, Request] = {}
        self.num_refused = self.num_allocated = 0
        for i, length in enumerate(lengths):
            self.allocate_one(i, length, None)

    # The model.

    def on(self, device) -> list[Request]:
        return [r for r in self.requests.values() if r.device == device and not r.is_away]

    def used(self, device) -> int:
        return sum(request.num_blocks for request in self.on(device))

    def kept(self, device) -> int:
        """Blocks that wait in host memory."""
        away = [r for r in self.requests.values() if r.device == device and r.is_away]
        return sum(request.num_blocks for request in away)

    def shortage(self, device, num_blocks):
        """How a request of so many blocks would be refused there."""
        if len(self.on(device)) == MAX_ROWS:
            return errors.OutOfRowsError
        too_few = self.used(device) + num_blocks > MAX_BLOCKS
        return errors.OutOfBlocksError if too_few else None

    def spread(self) -> float:
        shares = [self.used(device) / MAX_BLOCKS for device in self.preference]
        return max(shares) - min(shares)

    # What is done.

    @rule(data=st.data(), length=st.sampled_from(LENGTHS), device=st.sampled_from([None, *CPU]))
    def allocate(self, data, length, device):
        i = self.id_of(data, set(range(NUM_IDS)) - self.requests.keys())
        self.allocate_one(i, length, device)

    def allocate_one(self, i, length, device):
        prompt = self.new_tokens(length)
        known = {"prompt_token_ids": prompt} if self.caches_prefixes else {}
        if device not in (None, *DEVICES):
            with pytest.raises(errors.GeometryMismatchError, match=str(device)):
                self.manager.new_request(i, length, device=device, **known)
            return
        request = self.manager.new_request(i, length, device=device, **known)
        first = device or self.preference[0]
        tried = [first, *[other for other in self.preference if other != first]]
        num_blocks = -(-length // BLOCK_SIZE)
        fitting = [d for d in tried if self.shortage(d, num_blocks) is None]
        want = None if fitting else self.shortage(first, num_blocks)
        if i in self.requests:
            want = errors.DuplicateRequestError
        assert self.manager.can_allocate(request) == (want is None)
        handles = []
        self.call("allocate", want, lambda: handles.append(self.manager.allocate(request)))
        if want:
            self.num_refused += 1
            return
        self.num_allocated += 1
        self.requests[i] = Request(handles.pop(), fitting[0])
        assert self.manager.get_cache_device(i) == fitting[0]
        self.write(i, prompt)

    @rule(data=st.data(), count=st.sampled_from([0, 1, 2, 4, 8]))
    def extend(self, data, count):
        i = self.id_of(data, self.requests)
        if i not in self.requests:
            return
        request = self.requests[i]
        num_new = -(-(len(request.tokens) + count) // BLOCK_SIZE) - request.num_blocks
        if request.is_away:
            want = errors.SwappedOutError
        elif len(request.tokens) + count > MAX_TOKENS:
            want = errors.SequenceTooLongError
        else:
            is_short = self.used(request.device) + num_new > MAX_BLOCKS
            want = errors.OutOfBlocksError if is_short else None
        self.call("extend", want, lambda: self.manager.extend(request.handle, count))
        if want is None:
            self.write(i, self.new_tokens(count))

    @rule(data=st.data())
    def deallocate(self, data):
        i = self.id_of(data, self.requests)
        want = None if i in self.requests else errors.UnknownRequestError
        self.call("deallocate", want, lambda: self.manager.deallocate(i))
        if want is None:
            handle = self.requests.pop(i).handle
            assert refused(handle.num_tokens) is errors.InvalidHandleError

    @rule(data=st.data(), device=st.sampled_from([*DEVICES, *DEVICES, CPU[3]]))
    def move(self, data, device):
        i = self.id_of(data, self.requests)
        want = self.refusal_to_move(i, device)
        self.call("move_cache", want, lambda: self.manager.move_cache(i, device))
        if want is None:
            self.requests[i].device = device

    def refusal_to_move(self, i, target):
        if target not in DEVICES:
            return errors.GeometryMismatchError
        if i not in self.requests:
            return errors.UnknownRequestError
        request = self.requests[i]
        if request.device == target:
            return None
        if request.is_away:
            is_short = self.kept(target) + request.num_blocks > MAX_BLOCKS
            return errors.OutOfHostMemoryError if is_short else None
        return self.shortage(target, request.num_blocks)

    @rule(data=st.data(), device=st.sampled_from(DEVICES))
    def move_by_a_copy_that_fails(self, data, device):
        i = self.id_of(data, self.requests)
        if i not in self.requests or self.refusal_to_move(i, device):
            return
        request = self.requests[i]
        if request.is_away or request.device == device:
            return
        with self.broken_copies(data, request.num_blocks):
            with pytest.raises(BrokenCopyError):
                self.manager.move_cache(i, device)
        event("a copy fails")

    @rule(data=st.data(), tolerance=st.sampled_from([0.0, 0.1, 0.25, 0.5]), fails=st.booleans())
    def rebalance(self, data, tolerance, fails):
        before = self.spread()
        plan = self.manager.plan_rebalance(tolerance)
        if fails and plan:
            with self.broken_copies(data, 1), pytest.raises(BrokenCopyError):
                self.manager.rebalance_devices(tolerance)
        else:
            self.manager.rebalance_devices(tolerance)
            assert list(self.manager.last_rebalance) == plan
        for move in self.manager.last_rebalance:
            request = self.requests[move.request_id]
            assert request.device == move.source
            assert move.num_bytes == request.num_blocks * BLOCK_BYTES
            assert move.target in self.preference
            request.device = move.target
        if not fails:
            assert self.spread() <= before
            event(f"rebalanced by {len(plan)} moves, {self.spread() <= tolerance}")
        if before <= tolerance:
            assert not plan

    @rule(data=st.data())
    def swap_out(self, data):
        i = self.id_of(data, self.requests)
        request = self.requests.get(i)
        if request is None:
            want = errors.UnknownRequestError
        else:
            is_full = self.kept(request.device) + request.num_blocks > MAX_BLOCKS
            want = errors.OutOfHostMemoryError if is_full and not request.is_away else None
        self.call("swap_out", want, lambda: self.manager.swap_out(i))
        if want is None:
            self.requests[i].is_away = True

    @rule(data=st.data())
    def swap_in(self, data):
        i = self.id_of(data, self.requests)
        request = self.requests.get(i)
        if request is None:
            want = errors.UnknownRequestError
        else:
            is_away = request.is_away
            want = self.shortage(request.device, request.num_blocks) if is_away else None
        self.call("swap_in", want, lambda: self.manager.swap_in(i))
        if want is None:
            self.requests[i].is_away = False

    @rule(devices=st.lists(st.sampled_from(DEVICES), min_size=1, unique=True))
    def prefer(self, devices):
        self.manager.set_device_preference(devices)
        self.preference = devices

    @rule()
    def gc(self):
        assert self.manager.gc().caches_freed == 0

    # What must be true.

    @invariant()
    def agrees_with_the_model(self):
        self.manager.check()
        handles = dict(self.manager.list_handles())
        assert handles.keys() == self.requests.keys()
        for i, request in self.requests.items():
            assert self.manager.get_cache_device(i) == request.device
            assert request.handle.num_tokens() == len(request.tokens)
            if request.is_away:
                assert request.handle.key_cache(0) is None
            else:
                assert request.handle.device() == handles[i].device() == request.device
                assert tokens_of(request.handle) == request.tokens
        whole = self.manager.stats()
        assert whole.active_caches == len(self.requests)
        assert whole.allocation_count == self.num_allocated
        assert whole.allocation_failures == self.num_refused
        for device, part in self.manager.device_stats().items():
            in_use = part.total_blocks - part.free_blocks - part.evictable_blocks
            assert in_use == self.used(device)
            assert part.host_bytes == self.kept(device) * BLOCK_BYTES

    # How it is done.

    def id_of(self, data, likely) -> int:
        """Draws one of the likely ids, and sometimes any."""
        is_likely = likely and data.draw(st.integers(0, 9)) < 9
        return data.draw(st.sampled_from(sorted(likely) if is_likely else range(NUM_IDS)))

    @contextlib.contextmanager
    def broken_copies(self, data, num_blocks):
        """A time in which copies of so many blocks fail, some of them half done."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(transfer, "CHUNK_BYTES", BLOCK_BYTES)
            break_it = data.draw(st.sampled_from([break_export, break_import, break_arrival]))
            if break_it is break_import and not num_blocks:
                break_it = break_export  # There is nothing to write.
            break_it(monkeypatch, data.draw(st.integers(0, max(0, num_blocks - 1))))
            yield

    def call(self, name, want, call):
        """Makes a call, which must be refused as foretold, without any effect."""
        event(f"{name}: {want.__name__ if want else 'ok'}")
        before = all_of(self.manager) if want else None
        assert refused(call) is want
        assert want is None or all_of(self.manager) == before, f"{name} changed something"

    def new_tokens(self, count) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def write(self, i, tokens):
        """Writes new tokens at the end of a request, and lets them be cached."""
        request = self.requests[i]
        write_tokens(self.manager, request.handle, tokens, begin=len(request.tokens))
        first = not request.tokens
        request.tokens += tokens
        if self.caches_prefixes:
            self.manager.commit(request.handle, () if first else tokens)


@pytest.mark.parametrize("caches_prefixes", [False, True], ids=["plain", "prefixes"])
def test_random_lives_agree_with_the_model(caches_prefixes):
    examples = max(1, settings.default.max_examples // 25)
    run_state_machine_as_test(
        functools.partial(MultiDeviceMachine, caches_prefixes),
        settings=settings(settings.default, max_examples=examples, stateful_step_count=30),
    )
