"""Which platforms a program may be for, as far as that is known when it is traced."""

import jax


def traced_platforms() -> set[str]:
    """Returns the platforms to trace special code for, which takes time for each.

    They are the one that runs here, and that of the abstract device, if one is set, for which a
    program is lowered elsewhere (`jax.sharding.use_abstract_mesh`).
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    return {jax.default_backend()} | ({described.platform} if described else set())
