"""What the CPU kernel has room for; numba is not needed to ask."""

MAX_HEAD_DIM = 512
"""Numbers of a head, for which there is room on the stack."""

MIN_VECTOR_WORDS = 8
"""Words of the shortest compressed vector: the kernel unpacks at least 8 words at a time."""

MAX_TILE_NUMBERS = 16 * MAX_HEAD_DIM
"""Numbers of an item's queries, padded."""
