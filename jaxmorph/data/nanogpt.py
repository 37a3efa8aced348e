"""nanoGPT's prepared data: .bin files of uint16 ids, and the meta.pkl of its character data sets."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from jaxmorph.cli.errors import InputError
from jaxmorph.data.token_files import TokenFile

_LARGEST_META = 8 << 20  # bytes; one with 65,536 characters has about 2 MB
# What a pickle of dictionaries of numbers and text is made of. All other instructions import or call
# something, or need memory that the size of the file does not limit.
_PLAIN = {
    *(
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
    ),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "BININT", "BININT1", "BININT2"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}


class _PlainUnpickler(pickle.Unpickler):
    """Reads what is made of Python's own values."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")


def open_bin(path: Path) -> TokenFile:
    """Open a nanoGPT file: uint16, little-endian.

    Raises:
      InputError: not an integer number of ids, or none.
      OSError: it cannot be read.
    """
    return TokenFile(path, np.dtype("<u2"))


def read_meta(path: Path) -> str:
    """Return the characters of a nanoGPT meta.pkl in the order of their ids.

    Nothing in the file is executed: of pickle's instructions only those for dictionaries, numbers
    and text are followed.

    Raises:
      InputError: not such a file, or its two dictionaries do not fit each other.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_LARGEST_META + 1)
    if len(content) > _LARGEST_META:
        raise _refused(path, "", None, f"at most {_LARGEST_META:,} bytes")
    meta = _plain_content(path, content)
    if not isinstance(meta, dict) or not {"stoi", "itos"} <= meta.keys():
        raise _refused(path, "", None, "the dictionaries stoi and itos")
    itos, stoi = meta["itos"], meta["stoi"]
    if not isinstance(itos, dict) or not _dense(itos):
        raise _refused(path, "itos", None, "ids 0, 1, 2, …, each with a character of its own")
    characters = [itos[number] for number in range(len(itos))]
    if not isinstance(stoi, dict) or stoi != {text: n for n, text in enumerate(characters)}:
        raise _refused(path, "stoi", None, "the reverse of itos")
    if meta.get("vocab_size", len(characters)) != len(characters):
        raise _refused(path, "vocab_size", None, f"{len(characters)}, as itos has")
    return "".join(characters)


def _plain_content(path: Path, content: bytes) -> Any:
    try:
        for instruction, argument, _ in pickletools.genops(content):
            # A place in the memo takes memory up to it.
            far = instruction.name == "LONG_BINPUT" and int(argument or 0) > len(content)
            if far or instruction.name not in _PLAIN:
                raise _refused(path, "", instruction.name, "dictionaries of numbers and text alone")
        return _PlainUnpickler(io.BytesIO(content)).load()
    except InputError:
        raise
    except Exception as error:  # a malformed pickle makes the reader raise anything
        raise _refused(path, "", None, f"a pickle ({error})") from None


def _dense(itos: dict[Any, Any]) -> bool:
    """Return whether the keys are 0, 1, 2, … and each value is a character of its own."""
    numbered = all(type(key) is int and 0 <= key < len(itos) for key in itos)
    characters = [text for text in itos.values() if type(text) is str and len(text) == 1]
    surrogate = any("\ud800" <= text < "\ue000" for text in characters)
    distinct = len(set(characters)) == len(itos)
    return 0 < len(itos) <= 1 << 16 and numbered and distinct and not surrogate


def _refused(path: Path, field: str, got: object, expected: str) -> InputError:
    kind = "nanoGPT's meta.pkl for characters; another tokenizer can be named with --tokenizer"
    return InputError(str(path), field, got, f"{expected}: {kind}")
