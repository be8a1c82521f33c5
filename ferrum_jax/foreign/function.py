"""What is known of a foreign function before it is compiled."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CodePart:
    """A part of a function's code, which is compiled by itself.

    Attributes:
      name: Its name, which says the numbers that it takes if there are several.
      module: Module that compiles it: its `compile_part(name)` returns `MachineCode`.
      sources: Packages and modules that it is compiled from, beside `foreign`.
    """

    name: str
    module: str
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ForeignFunction:
    """A function in native code that XLA calls.

    Attributes:
      name: Its name, which says the numbers that it takes if there are several.
      parts: Its code: the handler, and the helper if it has one, which takes longest to compile.
      purpose: What it does, the first words of a warning.
    """

    name: str
    parts: tuple[CodePart, ...]
    purpose: str

    @property
    def target(self) -> str:
        """The name under which XLA knows it."""
        return f"ferrum_jax_{self.name}"
