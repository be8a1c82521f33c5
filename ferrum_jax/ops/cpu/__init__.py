"""Native code of the operations on CPU."""
