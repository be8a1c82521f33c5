"""Finds the platforms for which a program may be compiled, while it is traced."""

import jax


def traced_platforms() -> set[str]:
    """Returns the platforms to trace special code for; each takes time.

    These are the default backend, and the platform of the abstract device, if one is set, for which
    a program is exported (`jax.sharding.use_abstract_mesh`).
    """
    return {jax.default_backend(), target_platform()}


def target_platform() -> str:
    """Returns the platform of the abstract device if one is set, else the one that runs here."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.platform if described else jax.default_backend()
