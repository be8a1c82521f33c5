"""The platforms that a program may be lowered for, as far as known when it is traced."""

import jax


def traced_platforms() -> set[str]:
    """Returns the platforms to trace special code for, which takes time for each.

    They are the one that runs here, and that of the abstract device, if one is set, for which a
    program is lowered elsewhere (`jax.sharding.use_abstract_mesh`).
    """
    return {jax.default_backend(), target_platform()}


def target_platform() -> str:
    """Returns the platform of the abstract device if one is set, else the one that runs here."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.platform if described else jax.default_backend()
