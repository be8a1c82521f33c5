"""Refusal of copies: of objects that stand for a cache in this process."""

from typing import NoReturn, SupportsIndex


class Uncopied:
    """A base class whose objects are neither copied nor pickled.

    A copy of a manager would share its pool and not its counts: each would hand out blocks that
    the other one holds.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raises TypeError: `copy` and `pickle` ask here first."""
        raise TypeError(
            f"A {type(self).__name__} cannot be copied or pickled: it stands for the one cache "
            "that it has made. Share the object itself, or make another one of the same config."
        )
