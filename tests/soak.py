"""Drives random lives of a manager of several devices by dice, as long as one likes.

    python -m tests.soak --steps 1000000 --seed 0 --processes 2

A life begins with an empty manager and takes some hundred steps, of those that
`random_operations.py` has. What happens in it depends on the seed and its number alone, so that
one that fails can be run again: `--first-life N --steps 1`. After each step everything there is
has been held against the model: who holds what, every byte of every pool, what is cached.
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
from collections.abc import Iterator

from tests.support.devices import environment
from tests.support.random_operations import OPERATIONS, Operations
from tests.support.random_scenarios import SCENARIOS

STEPS_PER_LIFE = 500
# A process keeps what it compiles, some fifty regions of memory a program, and Linux grants 65,530.
LIVES_PER_PROCESS = 20


class Dice(random.Random):
    """Lets chance decide."""

    def one_of(self, options):
        return options[int(self.random() * len(options))]

    def number(self, low, high):
        return low + int(self.random() * (high - low + 1))


@dataclasses.dataclass(frozen=True)
class Life:
    """Which life is to be led."""

    seed: int
    number: int
    num_steps: int = STEPS_PER_LIFE
    steps_per_check: int = 1

    @property
    def scenario(self) -> str:
        return list(SCENARIOS)[self.number % len(SCENARIOS)]


@dataclasses.dataclass(frozen=True)
class Ended:
    """What came of a life.

    Attributes:
      num_steps: Steps that it took.
      counts: How often each operation ended how.
      refusals: How often each error was met.
      faults: How often each fault was.
      num_compared_bytes: Bytes that were compared.
      failure: Where it diverged from the model, and how; None if it did not.
    """

    num_steps: int
    counts: collections.Counter[str]
    refusals: collections.Counter[str]
    faults: collections.Counter[str]
    num_compared_bytes: int
    failure: str | None = None


def run_life(life: Life) -> Ended:
    """Leads one life."""
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
    """Returns a directory in memory, where there is one: the disk is waited for at every file."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run_lives(lives: list[Life], num_processes: int) -> Iterator[Ended]:
    """Leads lives in processes that have four CPU devices each, and compile for one another."""
    with tempfile.TemporaryDirectory(dir=_memory()) as programs:
        kept = {
            "JAX_COMPILATION_CACHE_DIR": programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        os.environ.update({**kept, **environment(4)})
        # Lives of one scenario, one after the other, run the same programs.
        lives = sorted(lives, key=lambda life: life.scenario)
        num_at_once = num_processes * LIVES_PER_PROCESS
        for first in range(0, len(lives), num_at_once):
            yield from _run_at_once(lives[first : first + num_at_once], num_processes)


def _run_at_once(lives: list[Life], num_processes: int) -> Iterator[Ended]:
    """Leads lives in processes that are new."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
        try:
            futures = [pool.submit(run_life, life) for life in lives]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def summary(ended: list[Ended], seconds: float) -> str:
    """What was done, in words."""
    num_steps = sum(life.num_steps for life in ended)
    num_bytes = sum(life.num_compared_bytes for life in ended)
    lines = [
        f"{num_steps:,} steps in {len(ended):,} lives, {seconds:,.0f} seconds, "
        f"{num_steps / seconds:,.0f} steps a second; {num_bytes:,} bytes compared."
    ]
    for title in ("counts", "refusals", "faults"):
        total = collections.Counter[str]()
        for life in ended:
            total += getattr(life, title)
        lines += ["", f"{title.capitalize()}: {sum(total.values()):,}"]
        lines += [f"  {name}: {count:,}" for name, count in sorted(total.items())]
    return "\n".join(lines)


def main() -> int:
    """Returns 0 if all lives agreed with the model."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="Random lives of a manager of several devices.")
    parser.add_argument("--steps", type=int, default=20_000, help="at least so many, whole lives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps-per-check", type=int, default=1, help="how seldom all is checked")
    parser.add_argument("--first-life", type=int, default=0, help="begin with this one")
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
