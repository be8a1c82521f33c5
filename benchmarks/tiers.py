"""Swapping: the time to move blocks off the device and back, beside a plain copy.

The yardsticks are NumPy copying the same number of bytes in the same run: into new memory for a
swap out, which some systems are slow to provide, and into existing memory for a swap in. For
the disk it is a plain file of as many bytes, written, synchronized and read. Every call is waited
for, except "call alone": the time until it returns. What is swapped in is compared, bit for bit,
before and after the timed calls.

`peak_growth_mib` is by how much a leg raised the most memory that the process had so far. What the
leg returns may be in it. A temporary copy of the pool, which has twice the bytes swapped, would be.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import ferrum_jax as fj
from benchmarks.harness import make_parser, print_table, progress, run
from ferrum_jax.manager.pool import DevicePool, RowShape
from ferrum_jax.ops.transfer import BlockPayload, BlockShape
from ferrum_jax.tiers import TieredStore

_MIB = 2**20
_YARDSTICKS = {
    "swap out": "copy",
    "swap out, call alone": "copy",
    "swap in": "copy into place",
    "swap out to disk": "write file",
    "swap in from disk": "read file",
}


class Swaps:
    """One row of a manager's cache, swapped out and in by turns.

    Args:
      num_bytes: Bytes of the row; its pool has twice as many.
      directory: Where files go.
    """

    def __init__(self, num_bytes: int, directory: str):
        # A block of 1 MiB: 16 tokens of 16 layers and 8 heads of 128 numbers.
        num_blocks, block_size = num_bytes // _MIB, 16
        geometry = fj.CacheGeometry(
            num_layers=16,
            num_kv_heads=8,
            head_dim=128,
            dtype=fj.DataType.BF16,
            max_seqs=2,
            max_sequence_length=num_blocks * block_size,
        )
        config = fj.CacheConfig(
            block_size=block_size, max_blocks=2 * num_blocks, initial_blocks=2 * num_blocks
        )
        self._cache = DevicePool(
            config, geometry, fj.Device.of(jax.devices()[0]), scrub_freed_blocks=False
        )
        block_shape = BlockShape.of(self._cache.state.pool)
        if block_shape.block_bytes != _MIB:
            raise RuntimeError(f"A block has {block_shape.block_bytes} bytes instead of 1 MiB.")
        rng = np.random.default_rng(0)
        arrays = {
            name: np.frombuffer(rng.bytes(num_bytes // 2), row.dtype).reshape(-1, *row.shape)
            for name, row in block_shape.arrays
        }
        self._shape = RowShape(num_blocks * block_size)
        payload = BlockPayload.of_arrays(block_shape, arrays)
        self._row = self._cache.restore_row(self._shape, [payload])
        self._bytes = [np.array(array) for array in arrays.values()]
        self._memory = [np.array(array) for array in arrays.values()]
        self._host = TieredStore([block_shape], num_bytes)
        self._disk = TieredStore([block_shape], 0, disk_directory=directory)
        self._path = pathlib.Path(directory) / "plain"

    def legs(self) -> dict[str, Callable[[], Any]]:
        """Returns what is timed, in the order in which it has to run."""
        return {
            "copy": lambda: [array.copy() for array in self._bytes],
            "copy into place": self._copy_into_place,
            "swap out": lambda: self._out_and_wait(self._host),
            "swap in": lambda: self._in(self._host),
            "write file": self._write_file,
            "read file": self._path.read_bytes,
            "swap out to disk": lambda: self._out(self._disk),
            "swap in from disk": lambda: self._in(self._disk),
        }

    def call_alone(self) -> float:
        """Returns the seconds until a swap out returns, while the device may still be at it."""
        jax.block_until_ready(self._cache.state.pool)
        start = time.perf_counter()
        self._out(self._host)
        seconds = time.perf_counter() - start
        self._in(self._host)
        return seconds

    def check(self) -> None:
        """Raises RuntimeError unless the row holds what it held at first."""
        (payload,) = self._cache.queries.stream_seq(self._row)
        payload = payload.gathered()
        for (name, _), want in zip(payload.block_shape.arrays, self._bytes, strict=True):
            got = np.concatenate([np.asarray(chunk[name]) for chunk in payload.chunks])
            if got.tobytes() != want.tobytes():
                raise RuntimeError(f"The bits of {name} changed while they were swapped.")

    def _out(self, store: TieredStore) -> None:
        (payload,) = self._cache.queries.stream_seq(self._row)
        store.put("swapped", payload)

    def _out_and_wait(self, store: TieredStore) -> None:
        self._out(store)
        payload = store.stream("swapped")
        jax.block_until_ready([dict(chunk) for chunk in payload.chunks])

    def _in(self, store: TieredStore) -> None:
        payload = store.stream("swapped")
        row = self._cache.restore_row(self._shape, [payload], wait=True)
        store.discard("swapped")
        # Not before: what is swapped in comes to another place, where it was not simply left.
        self._cache.free([self._row])
        self._row = row

    def _copy_into_place(self) -> None:
        for target, source in zip(self._memory, self._bytes, strict=True):
            np.copyto(target, source)

    def _write_file(self) -> None:
        with open(self._path, "wb") as file:
            for array in self._bytes:
                array.tofile(file)
            file.flush()
            os.fsync(file.fileno())


def compare(num_bytes: int, repeats: int, directory: str) -> list[dict[str, Any]]:
    """Times every leg in turn.

    Args:
      num_bytes: Bytes to swap.
      repeats: Timed calls of each leg.
      directory: Where files go.

    Returns:
      One row of figures per leg, its yardstick beside it.
    """
    swaps = Swaps(num_bytes, directory)
    legs = swaps.legs()
    seconds: dict[str, list[float]] = {name: [] for name in (*legs, "swap out, call alone")}
    extra: dict[str, int] = {}
    # The first two rounds compile, and take memory from the system.
    for round_ in progress(range(-2, repeats), "round"):
        for name, leg in legs.items():
            before = _reset_peak() if round_ == -1 else None
            start = time.perf_counter()
            result = jax.block_until_ready(leg())
            elapsed = time.perf_counter() - start
            if before is not None:
                extra[name] = _peak_bytes() - before
            del result  # Its memory goes back before the next leg begins.
            if round_ >= 0:
                seconds[name].append(elapsed)
        if round_ == -2:
            swaps.check()
        if round_ >= 0:
            seconds["swap out, call alone"].append(swaps.call_alone())
    swaps.check()
    return [_figures(name, seconds, num_bytes, extra.get(name)) for name in seconds]


def _figures(
    name: str, seconds: dict[str, list[float]], num_bytes: int, extra_bytes: int | None
) -> dict[str, Any]:
    median = statistics.median(seconds[name])
    yardstick = seconds[_YARDSTICKS.get(name, name)]
    return {
        "leg": name,
        "median_ms": median * 1e3,
        "min_ms": min(seconds[name]) * 1e3,
        "gib_per_second": num_bytes / median / 2**30,
        "yardstick": _YARDSTICKS.get(name, name),
        "times_yardstick": median / statistics.median(yardstick),
        "min_times_yardstick": min(seconds[name]) / min(yardstick),
        "peak_growth_mib": "?" if extra_bytes is None else extra_bytes / _MIB,
    }


def _reset_peak() -> int | None:
    """Resets the peak memory of this process, and returns its current memory; None if it cannot."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak_bytes()


def _peak_bytes() -> int:
    """Returns the most memory that this process has had since `_reset_peak`."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times all legs, and prints their table."""
    num_bytes = (args.mib or (32 if args.quick else 256)) * _MIB
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        figures = compare(num_bytes, args.repeats or (3 if args.quick else 15), directory)
    columns = list(figures[0])
    print_table(columns, [[figure[column] for column in columns] for figure in figures])
    return {"num_bytes": num_bytes, "legs": figures}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = make_parser("tiers", __doc__, quick="32 MiB, few repeats")
    parser.add_argument("--mib", type=int, help="what is swapped")
    parser.add_argument("--repeats", type=int, help="calls of each leg")
    parser.add_argument("--directory", help="where files go; a temporary directory if absent")
    run(parser, measure, argv)


if __name__ == "__main__":
    main()
