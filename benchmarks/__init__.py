"""Measurements of ferrum_jax: `python -m benchmarks` lists them."""
