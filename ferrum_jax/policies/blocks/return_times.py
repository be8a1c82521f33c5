"""Return times of cached blocks of one kind, and the hit rates that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

PERIOD = 1 << 11
"""Blocks cached between two calls of `ReturnTimes.learn`."""

_PERIOD_OCTAVE = PERIOD.bit_length() - 1
_NUM_OCTAVES = 24  # The last one includes all higher ages.
_NUM_PERIODS = 1 << (_NUM_OCTAVES - _PERIOD_OCTAVE - 1)  # History: as long as the last octave.
_MIN_REACHED = 1.0  # Blocks; avoids a division by 0 in an octave that no block has reached.
_KEPT = 0.98  # Weight of earlier counts after each `learn`.
_MIN_SURVIVAL = 1e-3  # Keeps the room held above 0.
_PRIOR_BLOCKS = 300.0  # Weight of the parent's shares, in blocks.


class ReturnTimes:
    """Histogram of the ages at which blocks are used again, in octaves, and the resulting rates.

    The age of a block is the number of blocks cached since its last use. Room is counted in the
    same unit: a block kept while 100 others are cached has held 100 blocks of room.

    The share of returns in an octave is relative to the blocks that have reached it: a block used
    a moment ago does not count as one that has not returned after 10,000 others. With few
    observations, the parent's shares are used.

    Args:
      parent: Return times of a wider kind, to which all counts are added too. Call its `learn`
        first.

    References:
      The shares are those of a life table with censored observations: Cutler, Ederer, Maximum
      utilization of the life table method in analyzing survival, J. Chronic Diseases 8(6), 1958.

    Example:
      >>> times = ReturnTimes()
      >>> times.add_blocks(4)
      >>> times.add_return(age=100)
      >>> times.learn()
      >>> times.rate(age=64) > times.rate(age=0) > times.rate(age=1000)
      True
    """

    def __init__(self, parent: ReturnTimes | None = None) -> None:
        self._parent = parent
        self._num_used = 0.0
        self._used_by_period = [0.0]  # Blocks used up to the end of each period.
        self._num_reached = [0.0] * _NUM_OCTAVES
        self._num_returns = [0.0] * _NUM_OCTAVES
        self.shares = [0.0] * _NUM_OCTAVES
        self.rates = [0.0] * _NUM_OCTAVES if parent is None else parent.rates

    def add_blocks(self, num_blocks: int) -> None:
        """Counts blocks that are used now."""
        self._num_used += num_blocks
        if self._parent is not None:
            self._parent.add_blocks(num_blocks)

    def add_return(self, age: int, num_blocks: int = 1) -> None:
        """Counts blocks that are used again at an age in blocks, whether or not still cached."""
        self._num_returns[_octave(age)] += num_blocks
        if self._parent is not None:
            self._parent.add_return(age, num_blocks)

    def rate(self, age: int) -> float:
        """Returns the expected hits per block of room of a block of an age, as of the last `learn`.

        It is the maximum over all later ages of eviction (the Gittins index of the block). So
        where returns are rare now and frequent later, the later ones count.
        """
        return self.rates[_octave(age)]

    def learn(self) -> None:
        """Computes rates from the counts, then decays the counts. Call it once per `PERIOD`."""
        self._count_reached()
        prior = 0.0 if self._parent is None else _PRIOR_BLOCKS
        expected = self.shares if self._parent is None else self._parent.shares
        self.shares = [
            min(1.0, (num_returns + prior * share) / max(_MIN_REACHED, num_reached + prior))
            for num_returns, num_reached, share in zip(
                self._num_returns, self._num_reached, expected, strict=True
            )
        ]
        self.rates = _best_rates(self.shares)
        self._num_reached = [n * _KEPT for n in self._num_reached]
        self._num_returns = [n * _KEPT for n in self._num_returns]

    def _count_reached(self) -> None:
        """Counts the blocks that passed (part of) each octave of age in this period."""
        used = self._used_by_period
        num_new, now = self._num_used - used[-1], len(used) - 1
        for octave in range(_PERIOD_OCTAVE + 1):
            self._num_reached[octave] += num_new
        for octave in range(_PERIOD_OCTAVE + 1, _NUM_OCTAVES):
            num_periods = 1 << (octave - _PERIOD_OCTAVE - 1)
            if num_periods > now:
                break
            num_here = used[now - num_periods + 1] - used[max(0, now - 2 * num_periods + 1)]
            self._num_reached[octave] += num_here / num_periods
        used.append(self._num_used)
        if len(used) > 2 * _NUM_PERIODS:
            del used[:_NUM_PERIODS]


def _octave(age: int) -> int:
    return min(age.bit_length(), _NUM_OCTAVES - 1)


def _best_rates(shares: Sequence[float]) -> list[float]:
    """Returns the rate at the beginning of each octave.

    Args:
      shares: Share of all blocks that returns in each octave.

    Returns:
      For each octave the steepest slope of hits over room, from its beginning to any later point.
    """
    room = hits = 0.0
    points = [(room, hits)]
    for octave, share in enumerate(shares):
        length = 1 << max(0, octave - 1)  # Ages 0, 1, 2-3, 4-7, ...
        room += length * max(1.0 - hits, _MIN_SURVIVAL)
        hits += share
        points.append((room, hits))
    # The steepest slope from a point touches the upper hull of all points behind it.
    hull, rates = [points[-1]], []
    for point in reversed(points[:-1]):
        while len(hull) > 1 and _slope(point, hull[-1]) <= _slope(point, hull[-2]):
            hull.pop()
        rates.append(_slope(point, hull[-1]))
        hull.append(point)
    return rates[::-1]


def _slope(start: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
