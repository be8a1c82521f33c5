"""What is known of a foreign function before it is compiled."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ForeignFunction:
    """A function in native code that XLA calls.

    Attributes:
      name: Its name, which says the numbers that it takes if there are several.
      module: Module that compiles it: its `compile_handler(name)` returns `MachineCode`.
      sources: Packages and modules of the code that it consists of, beside `foreign`.
      purpose: What it does, the first words of a warning.
    """

    name: str
    module: str
    sources: tuple[str, ...]
    purpose: str

    @property
    def target(self) -> str:
        """The name under which XLA knows it."""
        return f"ferrum_jax_{self.name}"
