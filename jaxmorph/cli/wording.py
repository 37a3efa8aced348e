"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_LISTED = 16


def short(number: float, units: str = "kMBT") -> str:
    """Return 12,345,678 as "12.3M"; `units` are the letters for 10^3, 10^6, …"""
    power = 0
    while abs(number) >= 999.5 and power < len(units):
        number, power = number / 1000, power + 1
    return f"{number:.3g}{units[power - 1] if power else ''}"


def short_flops(number: float) -> str:
    """Return a number of floating-point operations as "1.23P"."""
    return short(number, "kMGTPEZY")


def duration(seconds: float) -> str:
    """Return a time as "3 h 05 min", "4 min 09 s" or "12.3 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def repeatable(factor: float) -> str:
    """Return a factor as text that parses back exactly; 2.0 as 2."""
    return repr(int(factor)) if factor == int(factor) else repr(factor)


def listed(numbers: Sequence[int]) -> str:
    """Return integers as "[0, 0, 1, 1]"; of more than 16, the first and the last, and how many."""
    if len(numbers) <= _MOST_LISTED:
        return f"[{', '.join(map(str, numbers))}]"
    first, last = (", ".join(map(str, part)) for part in (numbers[:4], numbers[-4:]))
    return f"[{first}, …, {last}] ({len(numbers)})"


def aligned(rows: Sequence[Sequence[str]], *, indent: int = 2, gap: int = 2) -> list[str]:
    """Return the lines of a table: numeric columns right-aligned, others left-aligned.

    Args:
      rows: equally long, the header first. A dash stands for a missing value.
      indent: spaces before each line.
      gap: spaces between columns.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1] in "0123456789-–" for cell in column[1:]) for column in columns]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append((" " * indent + (" " * gap).join(cells)).rstrip())
    return lines
