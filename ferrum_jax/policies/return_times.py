"""How soon blocks of one kind come back, as far as has been seen, and what it makes them worth."""

from __future__ import annotations

from collections.abc import Sequence

_NUM_OCTAVES = 40  # The last one holds whatever is older.
_KEPT = 0.98  # Of what was seen before, at each `learn`.
_MIN_SURVIVAL = 1e-3  # Keeps the room that is held above 0.


class ReturnTimes:
    """A histogram of ages at return, in octaves, and the rates that follow from it.

    An age is a number of blocks: those that were cached since a block was last used. Room is
    counted likewise: a block kept while 100 others are cached has held 100 blocks' worth.

    Example:
      >>> times = ReturnTimes()
      >>> times.add_blocks(4)
      >>> times.add_return(age=100)
      >>> times.learn()
      >>> times.rate(age=64) > times.rate(age=0) > times.rate(age=1000)
      True
    """

    def __init__(self) -> None:
        self._num_blocks = 0.0
        self._num_returns = [0.0] * _NUM_OCTAVES
        self._rates = [0.0] * _NUM_OCTAVES

    def add_blocks(self, num_blocks: int) -> None:
        """Counts blocks that were used just now."""
        self._num_blocks += num_blocks

    def add_return(self, age: int, num_blocks: int = 1) -> None:
        """Counts blocks that were used again, cached or not, at an age."""
        self._num_returns[_octave(age)] += num_blocks

    def rate(self, age: int) -> float:
        """Returns the hits to expect of a block of an age per block of room, by the last `learn`.

        It is the best that can be had: the block may be let go at any later age. Where returns
        are rare now and frequent later, later ones count (the Gittins index of the block).
        """
        return self._rates[_octave(age)]

    def learn(self) -> None:
        """Makes what was counted into rates, and lets it fade."""
        if not self._num_blocks:
            return
        self._rates = _best_rates([n / self._num_blocks for n in self._num_returns])
        self._num_blocks *= _KEPT
        self._num_returns = [n * _KEPT for n in self._num_returns]


def _octave(age: int) -> int:
    return min(age.bit_length(), _NUM_OCTAVES - 1)


def _best_rates(shares: Sequence[float]) -> list[float]:
    """Returns the rate from the beginning of each octave on.

    Args:
      shares: The part of all blocks that returns in each octave.

    Returns:
      For each octave the steepest slope of hits over room, from its beginning to any later one.
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
