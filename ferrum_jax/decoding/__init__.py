"""What a decode loop is made of: a model's view of the cache, prefill, sampling, generation.

`ferrum_jax.integrations` has the names that users import.
"""
