"""Text files that people write, read whole within a limit: settings, schedules, loss curves."""

from __future__ import annotations

import math
import re
from pathlib import Path

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.paths import kind_of, reason

LARGEST_FILE = 1_000_000  # bytes; a settings or schedule file has a few thousand
LARGEST_NUMBER = 400  # characters; int() refuses more than 4,300 with its own error


_NOT_ZERO = re.compile("[1-9]")
_SMALLEST = math.ulp(0.0)


def plain_float(text: str) -> float:
    """Return a decimal as a float; one that would become 0 as the smallest there is.

    So 1e-999 is refused by the range of its setting, like every number that is too small to compute
    with, and not taken for the 0 that switches something off.
    """
    number = float(text)
    if number == 0 and _NOT_ZERO.search(re.split("[eE]", text)[0]):
        return math.copysign(_SMALLEST, number)
    return number


def read_text(path: Path, largest: int = LARGEST_FILE) -> str:
    """Return the text of a regular file, without a byte-order mark.

    What is no regular file is not opened, and what is larger than allowed is not read.

    Args:
      path: the file.
      largest: the most bytes it may have.

    Raises:
      InputError: unreadable, not a regular file, not UTF-8 or too large.
    """
    where = str(path)
    try:
        if kind := kind_of(path):
            raise InputError(where, "", None, f"a readable file (it is {kind})")
        with open(path, "rb") as file:
            content = file.read(largest + 1)  # the size is no limit where a file grows, as in /proc
        if len(content) > largest:
            size = max(path.stat().st_size, len(content))
            raise InputError(where, "", None, f"at most {largest:,} bytes (it has {size:,})")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(where, "", None, f"UTF-8 text ({error.reason} at {error.start})") from None
    except (OSError, ValueError) as error:
        raise InputError(where, "", None, f"a readable file ({reason(error)})") from None
