"""Eviction policies for cached blocks and for requests."""
