"""Where each setting was given, so that an error can point there, and the run be repeated."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmorph.cli.errors import InputError


@dataclass(frozen=True)
class Sources:
    """Where each setting came from; settings in neither set are defaults.

    Args:
      file: the YAML file, as the user named it.
      in_file: the settings it contains.
      flags: those given as flags, which override it.
      words: the arguments as given, after the program's name.
    """

    file: str
    in_file: frozenset[str]
    flags: frozenset[str]
    words: tuple[str, ...] = ()

    def given(self, name: str) -> bool:
        """Return whether the user gave `name`, in either place."""
        return name in self.flags or name in self.in_file

    def error(self, name: str, got: object, expected: str) -> InputError:
        """Return the error for a wrong `name`, naming the place where the user gave it."""
        if name in self.flags:
            return InputError(f"--{name}", "", got, expected)
        if name in self.in_file:
            return InputError(self.file, name, got, expected)
        return InputError(f"--{name}", "", got, f"{expected}; give --{name}")
