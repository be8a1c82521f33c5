"""Random programs against the oracle, with every invariant checked after every step.

They run on caches of one group of layers, and of several groups with windows and pools.

Each token that is written is unique, so a byte that lands in the wrong place is seen, and
the operations must meet every cause of refusal that there is, or the programs prove too little.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import ferrum_jax as fj
from ferrum_jax.types import NULL_SEQ
from tests.support.caches import payload, put, same_bits, snapshot, tiny_spec
from tests.support.layer_groups import (
    num_free,
    one_pool_spec,
    oracle_of,
    places_of,
    two_pools_spec,
    windows_spec,
)
from tests.support.oracle import OUTCOMES, WINDOW_OUTCOMES

pytestmark = pytest.mark.state_machine

MAX_ROWS, MAX_NEW_TOKENS = 3, 7  # Rows of a batch; tokens of an extension.
STRANGE_ROWS = (NULL_SEQ, NULL_SEQ, 5, -2, 2**31 - 1, -(2**31))
STRANGE_COUNTS = (-1, 16, 2**31 - 1, -(2**31))


@functools.partial(jax.jit, static_argnums=(1, 2))
def gather_layers(
    state: fj.CacheState, layers: tuple[int, ...], num_rows: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Every row of each of these layers, keys and values: [S, M * B, H, D] each."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return [jax.vmap(fj.gather, in_axes=(None, None, 0))(state, layer, rows) for layer in layers]


class CacheMachine(RuleBasedStateMachine):
    """Pure operations, in any order, with arguments that are often wrong."""

    def __init__(self, spec: fj.CacheSpec, met: set[tuple[str, str | None]]):
        super().__init__()
        self.met = met
        self.spec = spec
        self.capacity = spec.max_blocks_per_seq * spec.block_size
        self.next_token = 1

    @initialize()
    def start(self):
        self.state = fj.init(self.spec)
        self.oracle = oracle_of(self.spec)

    @rule(data=st.data())
    def allocate(self, data):
        rows = self._rows(data, self.oracle.free_rows())
        counts = self._counts(data, len(rows), self.capacity)
        cause = self.oracle.allocate(rows, counts)
        self._run("allocate", cause, lambda: fj.allocate(self.state, _pad(rows), _pad(counts)))
        self._write_new(cause, rows, counts)

    @rule(data=st.data())
    def extend(self, data):
        rows = self._rows(data, self.oracle.used_rows())
        self._extend(rows, self._counts(data, len(rows), MAX_NEW_TOKENS))

    def _extend(self, rows, counts):
        cause = self.oracle.extend(rows, counts, MAX_NEW_TOKENS)
        op = functools.partial(fj.extend, max_new_tokens=MAX_NEW_TOKENS)
        self._run("extend", cause, lambda: op(self.state, _pad(rows), _pad(counts)))
        self._write_new(cause, rows, counts)
        if cause is None:
            self._check_windows({row: n for row, n in zip(rows, counts, strict=True) if row >= 0})

    @precondition(lambda self: self.oracle.used_rows())
    @rule(data=st.data(), num_steps=st.integers(1, 4))
    def decode(self, data, num_steps):
        """Extends a row by one token at a time: windows move on."""
        row = data.draw(st.sampled_from(self.oracle.used_rows()))
        for _ in range(num_steps):
            self._extend([row], [1])

    @precondition(lambda self: self.oracle.most_blocks and self.oracle.free_rows())
    @rule()
    def fill(self):
        """Takes what blocks are left, so that copies find none."""
        rows = self.oracle.free_rows()[:1]
        counts = [self.oracle.most_blocks * self.spec.block_size]
        cause = self.oracle.allocate(rows, counts)
        self._run("allocate", cause, lambda: fj.allocate(self.state, _pad(rows), _pad(counts)))
        self._write_new(cause, rows, counts)

    @rule(data=st.data())
    def free(self, data):
        choice = st.sampled_from((*range(5), *STRANGE_ROWS))
        rows = data.draw(st.lists(choice, max_size=MAX_ROWS))
        self.oracle.free(rows)
        self.state = fj.free(self.state, _pad(rows))

    @rule(data=st.data())
    def fork(self, data):
        children = self._rows(data, self.oracle.free_rows())
        parents = [self._row(data, self.oracle.used_rows()) for _ in children]
        self._fork(parents, children)

    @rule(data=st.data())
    def share(self, data):
        targets = self._rows(data, self.oracle.used_rows())
        others = [row for row in self.oracle.used_rows() if row not in targets]
        sources = [self._row(data, others) for _ in targets]
        counts = self._counts(data, len(targets), self._longest([*targets, *sources]))
        self._share(sources, targets, counts)

    @precondition(lambda self: len(self.oracle.used_rows()) > 1)
    @rule(data=st.data(), op=st.sampled_from(["fork", "share", "truncate"]))
    def change_one_row(self, data, op):
        """Copies or cuts one row: its beginning may be gone, and the pool may be full."""
        used, free = self.oracle.used_rows(), self.oracle.free_rows()
        source, target = data.draw(st.permutations(used))[:2]
        if op == "fork" and free:
            self._fork([source], free[:1])
        elif op == "truncate":
            self._truncate([target], [data.draw(st.integers(1, self.oracle.seq_lens[target]))])
        else:
            count = data.draw(st.integers(1, self._longest([source, target])))
            self._share([source], [target], [count])

    def _fork(self, parents, children):
        cause = self.oracle.fork(parents, children)
        self._run("fork", cause, lambda: fj.fork(self.state, _pad(parents), _pad(children)))

    def _share(self, sources, targets, counts):
        cause = self.oracle.share(sources, targets, counts)
        args = (_pad(sources), _pad(targets), _pad(counts))
        self._run("share", cause, lambda: fj.share(self.state, *args))

    @rule(data=st.data(), is_rejection=st.booleans())
    def truncate(self, data, is_rejection):
        """Cuts rows to any length, or takes off the newest tokens as rejected speculation does."""
        rows = self._rows(data, self.oracle.used_rows())
        counts = self._counts(data, len(rows), self._longest(rows))
        if is_rejection:
            lens = [self.oracle.seq_lens[row] if row in range(5) else 0 for row in rows]
            counts = [max(n - data.draw(st.integers(0, 3)), 0) for n in lens]
        self._truncate(rows, counts)

    def _truncate(self, rows, counts):
        cause = self.oracle.truncate(rows, counts)
        self._run("truncate", cause, lambda: fj.truncate(self.state, _pad(rows), _pad(counts)))

    @rule(data=st.data())
    def rewrite(self, data):
        """Overwrites a token in a block that no other row may be reading."""
        row = self._row(data, self.oracle.used_rows())
        length = self.oracle.seq_lens[row] if 0 <= row < self.spec.max_seqs else 0
        if length % self.spec.block_size:
            self._write([(row, length - 1)])

    @invariant()
    def agrees_with_the_oracle(self):
        fj.check_state(self.state)
        assert num_free(self.state) == self.oracle.num_free
        for pool, tables in enumerate(jax.device_get(self.state.page_tables)):
            assert tables.seq_lens.tolist() == self.oracle.seq_lens
            self.oracle.check_blocks(pool, tables.block_ids.tolist())
        for group, place in enumerate(places_of(self.spec)):
            # Token 0 stands for none: zero, as what a row has released or does not have.
            tokens = np.zeros((self.spec.max_seqs, self.capacity), int)
            for row, length in enumerate(self.oracle.seq_lens):
                tokens[row, :length] = self.oracle.held(row, group)
            layers = gather_layers(self.state, tuple(place.layers), self.spec.max_seqs)
            for number, got in zip(place.layers.values(), jax.device_get(layers), strict=True):
                wanted = payload(self.state.pools[place.pool], number, tokens.ravel())
                for have, want in zip(got, wanted, strict=True):
                    assert (have.astype(np.float32).reshape(want.shape) == want).all()

    def _check_windows(self, new_tokens):
        """After an extend, a row holds the blocks of its window and of its new tokens."""
        for place in places_of(self.spec):
            held = np.asarray(self.state.page_tables[place.pool].num_blocks_held)
            for row, n in new_tokens.items():
                if place.group.sliding_window and n > 0:
                    most = -(-(place.group.sliding_window + n) // self.spec.block_size) + 1
                    assert held[place.part * self.spec.max_seqs + row] <= most

    def _run(self, name, cause, call):
        """Calls an operation, which must succeed or change nothing, as the oracle said."""
        self.met.add((name, cause))
        before = snapshot(self.state)
        self.state, ok = call()
        assert bool(ok) == (cause is None), f"{name}: oracle says {cause or 'ok'}, got ok={ok}"
        assert cause is None or same_bits(self.state, before), f"{name} was not atomic"

    def _write_new(self, cause, rows, counts):
        if cause is None:
            named = [(row, n) for row, n in zip(rows, counts, strict=True) if row != NULL_SEQ]
            ends = self.oracle.seq_lens
            self._write([(row, p) for row, n in named for p in range(ends[row] - n, ends[row])])

    def _write(self, places):
        tokens = range(self.next_token, self.next_token + len(places))
        self.next_token += len(places)
        for (row, position), token in zip(places, tokens, strict=True):
            self.oracle.write(row, position, token)
        writes = dict(zip(places, tokens, strict=True))
        self.state = put(self.state, writes, num_slots=MAX_ROWS * self.capacity)

    def _longest(self, rows):
        lens = [self.oracle.seq_lens[row] for row in rows if 0 <= row < self.spec.max_seqs]
        return min((n for n in lens if n), default=1)

    def _row(self, data, likely):
        return data.draw(_mostly(likely or [0], (*range(5), *STRANGE_ROWS)))

    def _rows(self, data, likely):
        kind = data.draw(_mostly(["valid"], ["any", "repeated"])) if likely else "any"
        if kind != "any":
            is_unique = kind == "valid"
            rows = st.lists(st.sampled_from(likely), max_size=MAX_ROWS, unique=is_unique)
            return data.draw(rows)
        choice = st.sampled_from((*range(5), *STRANGE_ROWS))
        return data.draw(st.lists(choice, max_size=MAX_ROWS))

    def _counts(self, data, size, largest):
        count = _mostly(range(largest + 1), STRANGE_COUNTS)
        return data.draw(st.lists(count, min_size=size, max_size=size))


def _mostly(likely, unlikely):
    """Draws from `likely` four times out of five."""
    likely, unlikely = tuple(likely), tuple(unlikely)
    common = 4 * len(unlikely) // len(likely) + 1
    return st.sampled_from(likely * common + unlikely)


def _pad(values):
    return np.asarray([*values, *[NULL_SEQ] * (MAX_ROWS - len(values))], np.int32)


def is_full() -> bool:
    """Whether the profile draws many programs, so that they meet every cause."""
    return settings.default.max_examples >= 1000


def run_programs(spec: fj.CacheSpec, portion: float) -> set[tuple[str, str | None]]:
    """Runs a portion of the profile's examples; returns the outcomes that they met."""
    met = set()
    examples = max(2, int(settings.default.max_examples * portion))  # The first one draws little.
    chosen = settings(settings.default, max_examples=examples)
    run_state_machine_as_test(lambda: CacheMachine(spec, met), settings=chosen)
    return met


@pytest.mark.parametrize("make_spec", [one_pool_spec, windows_spec, two_pools_spec])
def test_random_programs_on_several_groups_agree_with_the_oracle(
    make_spec: Callable[..., fj.CacheSpec],
):
    met = run_programs(make_spec(), 0.15)
    if is_full():  # Fewer programs need not meet each cause.
        assert met >= WINDOW_OUTCOMES, f"never met: {WINDOW_OUTCOMES - met}"


def test_random_programs_agree_with_the_oracle():
    met = run_programs(tiny_spec(dtype="bfloat16"), 0.2 if is_full() else 0.5)
    if is_full():
        assert met >= OUTCOMES, f"never met: {OUTCOMES - met}"


def test_random_programs_agree_with_the_oracle_in_a_pool_without_bits():
    run_programs(tiny_spec(), 0.08 if is_full() else 0.2)


@pytest.mark.parametrize("spec", [tiny_spec(dtype="bfloat16"), one_pool_spec()], ids=["one", "two"])
def test_random_programs_agree_with_the_oracle_when_not_compiled(spec: fj.CacheSpec):
    with jax.disable_jit():
        run_programs(spec, 0.003)
