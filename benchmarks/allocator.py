"""Allocation alone: what an allocate, an extend and a free cost, whatever the pool's size.

A decode loop calls them under `jax.jit` with the state donated, and does not wait for each. So
they are timed in bursts of calls that each take or release blocks, waited for at the end; beside
them stand calls that are waited for one by one, and the operations called without donation, which
copy the tables. The yardstick is an empty program over the same state with the same arguments.
"""

import argparse
import ast
import dataclasses
import importlib.util
import pathlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import ferrum_jax as fj
from benchmarks.harness import make_parser, print_table, progress, run, say, time_interleaved

BLOCK_SIZE = 16
MAX_BLOCKS_PER_SEQ = 256
NUM_ROWS = 64  # Sequences that stay allocated.
NUM_TOKENS = 512  # Tokens of each of them, and of each that is allocated and freed.
BURST = 16  # Calls in a burst, waited for together.
OPERATIONS = ("allocate", "extend", "free")

_State = fj.CacheState


class Burst:
    """Calls one program several times on one donated state."""

    def __init__(self, num_blocks: int):
        spec = fj.CacheSpec(
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            dtype=np.dtype("int8"),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_seqs=NUM_ROWS + BURST,
            max_blocks_per_seq=MAX_BLOCKS_PER_SEQ,
        )
        self._rows = np.arange(NUM_ROWS, dtype=np.int32)
        self._state, ok = fj.allocate(fj.init(spec), self._rows, NUM_TOKENS)
        if not ok:
            raise ValueError(f"--blocks must leave room for the sequences, got {num_blocks}.")
        guests = [np.asarray([NUM_ROWS + i], np.int32) for i in range(BURST)]
        length, zero = np.asarray([NUM_TOKENS], np.int32), np.zeros(1, np.int32)
        self._block = np.full(NUM_ROWS, BLOCK_SIZE, np.int32)
        self._lengths = np.full(NUM_ROWS, NUM_TOKENS, np.int32)
        self._truncate = jax.jit(fj.truncate, donate_argnums=0)
        # Each program with the arguments of each call. Guests are allocated and freed one by one,
        # and all 64 rows are extended by a block at a time.
        self._bursts = {
            "empty": (_nothing, [(guest, length) for guest in guests]),
            "add_zero": (_add_zero, [(zero, length)] * BURST),
            "allocate": (fj.allocate, [(guest, length) for guest in guests]),
            "extend": (_extend_by_a_block, [(self._rows, self._block)] * BURST),
            "free": (_free, [(guest,) for guest in guests]),
        }
        self._programs = {
            name: jax.jit(program, donate_argnums=0) for name, (program, _) in self._bursts.items()
        }

    def run(self, name: str, is_waiting: bool = False) -> _State:
        """Makes the calls of one burst.

        Args:
          name: An operation, or "empty", or "add_zero".
          is_waiting: Whether to wait for each call.

        Returns:
          The state after the last call.
        """
        program = self._programs[name]
        for args in self._bursts[name][1]:
            self._state, _ = program(self._state, *args)
            if is_waiting:
                jax.block_until_ready(self._state)
        return self._state

    def restore(self) -> _State:
        """Cuts the rows back to 512 tokens; checks that every call before did its work."""
        lens = np.asarray(self._state.tables.held_lens)
        if not (lens[:NUM_ROWS] == NUM_TOKENS + BURST * BLOCK_SIZE).all() or lens[NUM_ROWS:].any():
            raise RuntimeError(f"A timed call was refused: the rows hold {lens.tolist()} tokens.")
        self._state, _ = self._truncate(self._state, self._rows, self._lengths)
        return self._state

    def undonated(self) -> dict[str, Callable[[], Any]]:
        """Returns each operation as it is called outside a program, state not donated."""
        state = jax.tree.map(jnp.copy, self._state)
        guest, length = self._bursts["allocate"][1][0]
        return {
            "allocate": lambda: fj.allocate(state, guest, length),
            "extend": lambda: _extend_by_a_block(state, self._rows, self._block),
            "free": lambda: fj.free(state, self._rows[:1]),
        }


def _extend_by_a_block(state: _State, rows: ArrayLike, counts: ArrayLike):
    return fj.extend(state, rows, counts, max_new_tokens=BLOCK_SIZE)


def _free(state: _State, rows: ArrayLike):
    return fj.free(state, rows), None


def _nothing(state: _State, rows: jax.Array, counts: jax.Array):
    return state, (rows[0] < counts[0])


def _add_zero(state: _State, zeros: jax.Array, counts: jax.Array):
    tables = dataclasses.replace(state.tables, num_free=state.tables.num_free + zeros[0])
    return state.with_tables([tables]), (zeros[0] < counts[0])


def maxtext_calls(path: str, num_blocks: int) -> dict[str, Callable[[], Any]]:
    """Returns the same work done by MaxText's page manager, read from its source file.

    Args:
      path: Its `page_manager.py`, which MaxText removed in May 2026; needs `jaxtyping`.
      num_blocks: Pages.
    """
    module = _load_alone(path)
    state = module.initialize_page_state(num_blocks, NUM_ROWS + 1, MAX_BLOCKS_PER_SEQ)
    sizes = {"tokens_per_page": BLOCK_SIZE, "max_pages_per_group": MAX_BLOCKS_PER_SEQ}
    reserve, release = module._release_and_reserve_for_group, module._release_pages_for_group
    for row in range(NUM_ROWS):
        state = reserve(state, jnp.int32(row), jnp.int32(NUM_TOKENS), **sizes)
    first, guest, length = jnp.int32(0), jnp.int32(NUM_ROWS), jnp.int32(NUM_TOKENS)
    return {
        "allocate": lambda: reserve(state, guest, length, **sizes),
        "extend": lambda: module._update_decode_pages_global(state, **sizes),
        "free": lambda: release(state, first, max_pages_per_group=MAX_BLOCKS_PER_SEQ),
    }


def _load_alone(path: str) -> types.ModuleType:
    """Imports one file of MaxText; what it names of the rest of MaxText becomes `object`."""
    source = pathlib.Path(path).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").lower().startswith("maxtext"):
            stub = types.ModuleType(node.module or "")
            for alias in node.names:
                setattr(stub, alias.name, object)
            sys.modules.setdefault(stub.__name__, stub)
            sys.modules.setdefault(stub.__name__.partition(".")[0], types.ModuleType("maxtext"))
    spec = importlib.util.spec_from_file_location("maxtext_page_manager", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--maxtext must be a Python file, got {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(sizes: Sequence[int], repeats: int, maxtext: str | None) -> list[dict[str, Any]]:
    """Times every operation at every pool size, in turn.

    Args:
      sizes: Blocks of each pool.
      repeats: Bursts, and single calls, of each.
      maxtext: MaxText's page manager, if it is to be timed too.

    Returns:
      One row of figures per operation and size, microseconds per call.
    """
    bursts = {size: Burst(size) for size in sizes}
    seconds = _time_bursts(bursts, repeats, is_waiting=False)
    waited = _time_bursts(bursts, max(1, repeats // 4), is_waiting=True)
    seconds |= {f"{name}, waited for": times for name, times in waited.items()}

    calls: dict[str, Callable[[], Any]] = {}
    for size, burst in bursts.items():
        beside = {"undonated": burst.undonated()}
        if maxtext:
            beside["MaxText"] = maxtext_calls(maxtext, size)
        for who, ops in beside.items():
            calls |= {f"{op}/{size}, {who}": call for op, call in ops.items()}
    seconds |= time_interleaved(calls, max(1, repeats // 4))
    return [_figures(seconds, op, size) for op in OPERATIONS for size in sizes]


def _time_bursts(
    bursts: dict[int, Burst], repeats: int, *, is_waiting: bool
) -> dict[str, list[float]]:
    """Times every kind of burst at every size in turn: each leaves the state for the next."""
    seconds: dict[str, list[float]] = {}
    for round_ in progress(range(-1, repeats), "round"):  # The first compiles.
        for name in ("empty", "add_zero", *OPERATIONS):
            for size, burst in bursts.items():
                start = time.perf_counter()
                jax.block_until_ready(burst.run(name, is_waiting))
                elapsed = time.perf_counter() - start
                if round_ >= 0:
                    seconds.setdefault(f"{name}/{size}", []).append(elapsed)
        for burst in bursts.values():
            jax.block_until_ready(burst.restore())
    return seconds


def _figures(seconds: dict[str, list[float]], op: str, size: int) -> dict[str, Any]:
    def microseconds(name: str, who: str = "", of: Callable = statistics.median) -> float:
        calls = 1 if who in (", undonated", ", MaxText") else BURST
        return of(seconds[f"{name}/{size}{who}"]) * 1e6 / calls

    median, best, empty = microseconds(op), microseconds(op, of=min), microseconds("empty")
    waited = microseconds(op, ", waited for")
    figures = {
        "operation": op,
        "blocks": size,
        "median_us": median,
        "min_us": best,
        "empty_us": empty,
        "add_zero_us": microseconds("add_zero"),
        "times_empty": median / empty,
        "min_times_empty": best / microseconds("empty", of=min),
        "waited_us": waited,
        "waited_times_empty": waited / microseconds("empty", ", waited for"),
        "undonated_us": microseconds(op, ", undonated"),
    }
    if f"{op}/{size}, MaxText" in seconds:
        figures["maxtext_us"] = microseconds(op, ", MaxText")
    return figures


def verdicts(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Says of each operation how flat it is over the sizes, and how far from an empty call."""
    lines = []
    for op in OPERATIONS:
        rows = [row for row in figures if row["operation"] == op]
        flat = [max(r[key] for r in rows) / min(r[key] for r in rows) for key in _KEYS]
        worst = max(row["times_empty"] for row in rows)
        lines.append(
            f"{op}: medians within {flat[0]:.2f}x over all sizes (minima {flat[1]:.2f}x); "
            f"at most {worst:.2f}x an empty call"
        )
    return lines


_KEYS = ("median_us", "min_us")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times everything that the command line asks for, and prints it."""
    sizes = args.blocks or ((4096, 8192) if args.quick else (4096, 65536, 1048576))
    figures = compare(sizes, args.repeats or (10 if args.quick else 200), args.maxtext)
    columns = list(figures[0])
    print_table(columns, [[figure[column] for column in columns] for figure in figures])
    for line in verdicts(figures):
        say(line)
    if args.maxtext is None:
        say("MaxText was not timed: name its page_manager.py with --maxtext.")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("allocator", __doc__, quick="two small pools, few repeats")
    parser.add_argument("--blocks", type=int, nargs="+", help="sizes of the pools")
    parser.add_argument("--repeats", type=int, help="bursts of each operation")
    parser.add_argument("--maxtext", metavar="FILE", help="MaxText's page_manager.py, to time it")
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
