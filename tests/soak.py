"""Draws random calls of a multi-device manager for as long as asked, against a simple model.

    python -m tests.soak --steps 1000000 --seed 0 --processes 2

A life starts with an empty manager and makes some hundred calls, of those in
`random_operations.py`. The calls depend only on the seed and the life's number, so that a life that
fails can be repeated: `--first-life N --steps 1`. After each call the whole manager is compared
with the model: the blocks of each request, each byte of each pool, and the cached prefixes.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator

from tests.support.devices import environment
from tests.support.random_operations import OPERATIONS, Operations
from tests.support.random_scenarios import SCENARIOS

STEPS_PER_LIFE = 500
# A process keeps its compiled programs, and Linux grants a process 65,530 memory maps.
LIVES_PER_PROCESS = 20


class Dice(random.Random):
    """Choices drawn from a seeded generator."""

    def one_of(self, options):
        return options[int(self.random() * len(options))]

    def number(self, low, high):
        return low + int(self.random() * (high - low + 1))


@dataclasses.dataclass(frozen=True)
class Life:
    """A life to run: its seed, its number, and its length."""

    seed: int
    number: int
    num_steps: int = STEPS_PER_LIFE
    steps_per_check: int = 1

    @property
    def scenario(self) -> str:
        return list(SCENARIOS)[self.number % len(SCENARIOS)]


@dataclasses.dataclass(frozen=True)
class Ended:
    """The result of a life.

    Attributes:
      num_steps: Calls made.
      counts: Calls per operation and outcome.
      refusals: Refused calls per error.
      faults: Injected faults per kind.
      num_compared_bytes: Bytes compared with the model.
      failure: The difference from the model and where it was found; None if there is none.
    """

    num_steps: int
    counts: collections.Counter[str]
    refusals: collections.Counter[str]
    faults: collections.Counter[str]
    num_compared_bytes: int
    failure: str | None = None


def run_life(life: Life) -> Ended:
    """Runs one life."""
    dice, step, name = Dice(f"{life.seed}, {life.number}"), 0, "begin"
    operations, weights = list(OPERATIONS), list(OPERATIONS.values())
    failure = None
    with tempfile.TemporaryDirectory(dir=_memory()) as directory:
        lived = Operations(SCENARIOS[life.scenario], pathlib.Path(directory))
        try:
            for step in range(1, life.num_steps + 1):
                (operation,) = dice.choices(operations, weights)
                name = f"step {step}, {operation.__name__}"
                operation(lived, dice)
                lived.check_pressure()
                if step % life.steps_per_check == 0:
                    lived.check()
            name = "end"
            lived.end()
        except Exception:
            where = f"seed {life.seed}, life {life.number} ({life.scenario}), {name}"
            again = f"python -m tests.soak --seed {life.seed} --first-life {life.number} --steps 1"
            failure = f"{traceback.format_exc()}\nDiverged at {where}. Again: {again}"
        finally:
            lived.close()
    return Ended(
        num_steps=step,
        counts=lived.counts,
        refusals=lived.refusals,
        faults=lived.faults,
        num_compared_bytes=lived.num_compared_bytes,
        failure=failure,
    )


def _memory() -> str | None:
    """Returns a directory in memory if there is one: files on a disk take longer."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run_lives(lives: list[Life], num_processes: int) -> Generator[Ended]:
    """Runs lives in processes with four CPU devices each, which share their compiled programs."""
    with tempfile.TemporaryDirectory(dir=_memory()) as programs:
        kept = {
            "JAX_COMPILATION_CACHE_DIR": programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        os.environ.update({**kept, **environment(4)})
        # Successive lives of one scenario run the same programs.
        lives = sorted(lives, key=lambda life: life.scenario)
        num_at_once = num_processes * LIVES_PER_PROCESS
        for first in range(0, len(lives), num_at_once):
            yield from _run_at_once(lives[first : first + num_at_once], num_processes)


def _run_at_once(lives: list[Life], num_processes: int) -> Iterator[Ended]:
    """Runs lives in new processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
        try:
            futures = [pool.submit(run_life, life) for life in lives]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def summary(ended: list[Ended], seconds: float) -> str:
    """Returns a report of the lives as text."""
    num_steps = sum(life.num_steps for life in ended)
    num_bytes = sum(life.num_compared_bytes for life in ended)
    lines = [
        f"{num_steps:,} steps in {len(ended):,} lives, {seconds:,.0f} seconds, "
        f"{num_steps / seconds:,.0f} steps per second; {num_bytes:,} bytes compared."
    ]
    for title in ("counts", "refusals", "faults"):
        total = collections.Counter[str]()
        for life in ended:
            total += getattr(life, title)
        lines += ["", f"{title.capitalize()}: {sum(total.values()):,}"]
        lines += [f"  {name}: {count:,}" for name, count in sorted(total.items())]
    return "\n".join(lines)


def main() -> int:
    """Runs the lives that the command line asks for; returns the number that failed."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        description="Random calls of a multi-device manager against a model."
    )
    parser.add_argument("--steps", type=int, default=20_000, help="rounded up to whole lives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--steps-per-check", type=int, default=1, help="steps between two comparisons"
    )
    parser.add_argument("--first-life", type=int, default=0, help="number of the first life")
    args = parser.parse_args()
    num_lives = -(-args.steps // STEPS_PER_LIFE)
    numbers = range(args.first_life, args.first_life + num_lives)
    lives = [Life(args.seed, n, steps_per_check=args.steps_per_check) for n in numbers]
    ended, started = list[Ended](), time.monotonic()
    with (
        tqdm(total=num_lives * STEPS_PER_LIFE, unit="step", smoothing=0.05) as bar,
        contextlib.closing(run_lives(lives, args.processes)) as running,
    ):
        for life in running:
            ended.append(life)
            bar.update(life.num_steps)
            if life.failure is not None:
                break
    print(summary(ended, time.monotonic() - started))
    failures = [life.failure for life in ended if life.failure is not None]
    print("\n".join(["", *failures]) if failures else "\nNo divergence.")
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
