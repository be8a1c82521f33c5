"""The cache inside Flax models and decode loops."""
