"""What an operation takes: a value and options, their kinds and ranges, checked and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxmorph.cli.errors import nearest
from jaxmorph.cli.wording import listed, repeatable
from jaxmorph.config.run_shape import OperationError, check_number
from jaxmorph.config.settings import LARGEST_COUNT, Within

# A value as an entry keeps it: a tuple is a list of layers, None is null.
Given = float | int | tuple[int, ...] | None
_ANY = Within()


@dataclass(frozen=True)
class Value:
    """The values an operation accepts: a `kind` of number within a range; None: null.

    Args:
      words: what the number is.
      kind: of the number.
      within: its range.
      or_layers: whether a list of layers, counted from 0, is accepted instead.
    """

    words: str
    kind: type | None
    within: Within = _ANY
    or_layers: bool = False

    def __str__(self) -> str:
        number = f"{self.words} {self.within}" if self.kind else "null"
        return f"{number}, or a list of layers" if self.or_layers else number

    def check(self, got: Any, operation: str) -> None:
        """Check a value as parsed from a file, or as an entry keeps it.

        Args:
          got: the value.
          operation: the operation's name, for the message.

        Raises:
          OperationError: another kind, or out of range.
        """
        if self.kind is None and got is not None:
            raise OperationError(got, f"null: {operation} takes no value")
        if self.or_layers and isinstance(got, (list, tuple)):
            if not got or any(type(layer) is not int or layer < 0 for layer in got):
                raise OperationError(list(got), f"{self}, such as [0, 0, 1, 1]")
        elif self.kind is not None:
            check_number(got, self.kind, self.within)

    def read(self, got: Any) -> Given:
        """Return a checked value in its declared type, so that 1 and 1.0 are the same factor."""
        if isinstance(got, (list, tuple)):
            return tuple(got)
        return float(got) if self.kind is float else got


@dataclass(frozen=True)
class Option:
    """An option of an operation, given under `options` of an entry.

    Args:
      default: its default.
      effect: what it does, in a few words.
      choices: the words it accepts; empty for a number, or for true and false.
      within: the range of a number.
      only: the option, and its value, that this one requires; None: it always applies.
      with_layers: whether it applies where the value is a list of layers.
      needs: one of its choices, and the option that must be given with it.
    """

    default: Any
    effect: str
    choices: tuple[str, ...] = ()
    within: Within = _ANY
    only: tuple[str, Any] | None = None
    with_layers: bool = True
    needs: tuple[str, str] | None = None

    def __str__(self) -> str:
        kind = "whole number" if isinstance(self.default, int) else "number"
        takes = " | ".join(self.choices) if self.choices else f"{kind} {self.within}"
        takes = "true | false" if isinstance(self.default, bool) else takes
        return f"{takes} (default {shown(self.default)}{self._where}): {self.effect}"

    @property
    def _where(self) -> str:
        where = f", with {self.only[0]} {shown(self.only[1])}" if self.only else ""
        return where + ("" if self.with_layers else ", without a list")

    def check(self, got: Any, field: str) -> None:
        """Check a value of the option.

        Args:
          got: the value.
          field: the option's place in the entry, for the message.

        Raises:
          OperationError: another kind, or out of range.
        """
        if isinstance(self.default, bool):
            if not isinstance(got, bool):
                raise OperationError(_or_null(got), "true or false", field)
        elif not self.choices:
            check_number(got, type(self.default), self.within, field)
        elif got not in self.choices:
            near = nearest(got, self.choices) if isinstance(got, str) else ""
            raise OperationError(_or_null(got), f"one of {', '.join(self.choices)}{near}", field)

    def check_place(self, name: str, value: Any, chosen: dict[str, Any]) -> None:
        """Check that the option has an effect, next to the value and the other options.

        Args:
          name: its name.
          value: the operation's value.
          chosen: all options, by name.

        Raises:
          OperationError: it would be ignored.
        """
        if self.only and chosen[self.only[0]] != self.only[1]:
            other, needed = self.only
            wanted = f"{other} {shown(needed)} with it (it is {shown(chosen[other])})"
            raise OperationError(chosen[name], wanted, f"options: {name}")
        if not self.with_layers and isinstance(value, (list, tuple)):
            wanted = "no such option with a list of layers, which says it all"
            raise OperationError(chosen[name], wanted, f"options: {name}")
        if self.needs and chosen[name] == self.needs[0] and chosen[self.needs[1]] is None:
            wanted = f"the option {self.needs[1]} with {name} {chosen[name]}"
            raise OperationError(None, wanted, f"options: {self.needs[1]}")


@dataclass(frozen=True)
class HeadList(Option):
    """An option that lists attention heads as [layer, head] pairs, counted from 0."""

    def __str__(self) -> str:
        return f"a list of [layer, head] pairs (default none{self._where}): {self.effect}"

    def check(self, got: Any, field: str) -> None:
        """See `Option.check`; no head may be listed twice."""
        wanted = "a list of [layer, head] pairs, counted from 0, such as [[0, 1], [2, 0]]"
        if not isinstance(got, list) or not got or not all(map(_is_pair, got)):
            raise OperationError(_or_null(got), wanted, field)
        if twice := next((pair for n, pair in enumerate(got) if pair in got[:n]), None):
            raise OperationError(twice, "each head once", field)


def _is_pair(got: Any) -> bool:
    return (
        isinstance(got, list)
        and len(got) == 2
        and all(type(n) is int and 0 <= n <= LARGEST_COUNT for n in got)
    )


def shown(value: Any) -> str:
    """Return an option's value as a file has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repeatable(value) if isinstance(value, float) else str(value)


def written(value: Given) -> str:
    """Return a value as it can be written in a schedule, a long list of layers shortened; null as ""."""
    if value is None:
        return ""
    return listed(value) if isinstance(value, (list, tuple)) else repeatable(value)


def _or_null(got: Any) -> Any:
    return "null" if got is None else got
