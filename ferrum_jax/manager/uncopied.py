"""Base class of objects that must not be copied or pickled."""

from typing import NoReturn, SupportsIndex


class Uncopied:
    """Refuses copies and pickles.

    A copy of a manager would share its pool and not its counts: each would allocate blocks that
    the other one holds.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raises TypeError; `copy` and `pickle` call this first."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it stands for the one cache "
            "that it has made. Share the object itself, or make another one of the same config."
        )
