"""Policies that return wrong answers or raise, and a collector of what is logged about them."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

from ferrum_jax import CacheEvictionPolicy, KvCacheHandle
from ferrum_jax.policies.blocks import BlockEvictionPolicy, CachedBlock, Retention

STRANGER = CachedBlock(0, 0, 0, Retention())
"""A block of no cache."""


class BadBlockPolicy(BlockEvictionPolicy):
    """Answers as its `mode` says; it remembers all blocks that were ever inserted.

    Modes: "newest" and "oldest" choose among the evictable blocks, "gone" and "any" among all ever
    inserted; "none", "stranger" and "word" return that; "raise" raises in every method.
    """

    MODES = ("newest", "oldest", "gone", "any", "none", "stranger", "word", "raise")

    def __init__(self, capacity: int, mode: str = "oldest"):
        super().__init__(capacity)
        self.mode, self.seen = mode, list[CachedBlock]()

    @property
    def name(self) -> str:
        return f"bad ({self.mode})"

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        self.seen += blocks
        self._may_raise()

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        self._may_raise()

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        self._may_raise()

    def evict(self, can_evict):
        self._may_raise()
        can_go = [block for block in self.seen if can_evict(block)]
        answers = {
            "newest": can_go[-1:],
            "oldest": can_go[:1],
            "gone": [block for block in self.seen if not can_evict(block)][:1],
            "any": self.seen[len(self.seen) // 2 :],
            "stranger": [STRANGER],
            "word": ["block"],
        }
        return next(iter(answers.get(self.mode, [])), None)

    def _may_raise(self):
        if self.mode == "raise":
            raise RuntimeError("The policy is broken.")


class BadRequestPolicy(CacheEvictionPolicy):
    """Answers as its `mode` says. A copy is the same object: a mode is set for all devices."""

    MODES = ("all", "last", "strangers", "repeated", "nothing", "no list", "raise")

    def __init__(self, mode: str = "all"):
        self.mode = mode

    def __deepcopy__(self, memo: dict):
        return self

    def select_eviction_candidates(
        self, required_memory: int, active_caches: Sequence[tuple[object, KvCacheHandle]]
    ):
        names = [name for name, _ in active_caches]
        if self.mode == "raise":
            raise RuntimeError("The policy is broken.")
        answers = {
            "all": names,
            "last": names[-1:],
            "strangers": ["nobody", 17],
            "repeated": [name for name in names for _ in range(2)],
            "no list": None,
        }
        return answers.get(self.mode, [])

    def record_access(self, request_id: object, access_time: float) -> None:
        del request_id, access_time  # Unused.

    def name(self) -> str:
        return f"bad ({self.mode})"


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Collects log messages, and keeps them from other handlers."""
    told = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("ferrum_jax")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
