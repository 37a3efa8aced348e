"""Input formats of text: documents, split into training and validation.

Files are never written. Each is read into memory once; nothing here holds a second copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import named, say, sentence
from jaxmorph.config.settings import STDLIB
from jaxmorph.data.pieces import Text, byte_of_character, count_characters

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The marks of encodings that are not read. That of UTF-32 (little-endian) begins with one of UTF-16's.
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Documents:
    """UTF-8 documents in a fixed order, each with the name that determines its split."""

    names: list[str]
    documents: list[Text]

    def digest(self) -> str:
        """Return the SHA-256 of all names and documents."""
        found = hashlib.sha256()
        for name, document in zip(self.names, self.documents, strict=True):
            found.update(f"{len(name.encode())} {len(document)} {name}".encode())
            found.update(document)
        return found.hexdigest()


@dataclass(frozen=True)
class Split:
    """Training and validation text."""

    train: list[Text]
    val: list[Text]
    separate: bool  # whether each is followed by an end of document


def read_documents(data: str, where: str) -> Documents:
    """Read stdlib, a text file, a folder of text files or a .jsonl file with a "text" per line.

    Raises:
      InputError: not a file or folder, not UTF-8, malformed, or without text; `where` names the
        source of `data`.
      OSError: something cannot be read.
    """
    path = Path(data)
    if data == STDLIB:
        text = _read_library()
    elif path.is_dir():
        text = _read_folder(path)
    elif not path.is_file():
        raise InputError(where, "", data, "a regular file or a folder")
    elif path.suffix == ".jsonl":
        text = _read_jsonl(path)
    else:
        text = Documents([""], [_utf8(path)])  # no name, so that moving the file changes nothing
    if not any(text.documents):
        raise InputError(where, data, None, "some text, but there is none")
    return text


def _read_library() -> Documents:
    root = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in _walk(root, _NOT_LIBRARY) if path.suffix == ".py"]
    text, _ = _read_files(root, sources)
    return text


def _read_folder(root: Path) -> Documents:
    text, skipped = _read_files(root, _walk(root, set()))
    if skipped:
        names = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
        found = f"skipped {len(skipped)} files that are not UTF-8: {sentence(names)}"
        say(f"{named(str(root))}: {found}", file=sys.stderr)
    return text


def _walk(root: Path, left_out: set[str]) -> list[Path]:
    """Return the regular files under `root` in path order, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in left_out and name[0] != "."]
        found += [Path(folder, name) for name in files if name[0] != "."]
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(root).parts)


def _read_files(root: Path, paths: list[Path]) -> tuple[Documents, list[str]]:
    """Return the non-empty UTF-8 files, and the names of files that are not UTF-8."""
    text, skipped = Documents([], []), []
    for path in paths:
        name = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode()
        content = _without_mark(path.read_bytes())
        try:
            count_characters(content)
        except UnicodeDecodeError:
            skipped.append(name)
            continue
        if content:
            text.names.append(name)
            text.documents.append(content)
    return text, skipped


def _without_mark(content: bytes) -> Text:
    """Return the text after its byte-order mark, if it begins with one."""
    marked = content.startswith(_BYTE_ORDER_MARK)
    return memoryview(content)[len(_BYTE_ORDER_MARK) :] if marked else content


def _utf8(path: Path) -> Text:
    content = path.read_bytes()
    _refuse_other_encodings(path, content)
    text = _without_mark(content)
    try:
        count_characters(text)
    except UnicodeDecodeError as error:
        place = f"byte {error.start + len(content) - len(text)}"
        raise InputError(str(path), place, None, f"UTF-8 text ({error.reason})") from None
    return text


def _refuse_other_encodings(path: Path, start: bytes) -> None:
    for mark, encoding in _OTHER_MARKS.items():
        if start.startswith(mark):
            expected = (
                f"UTF-8 text (it begins with the byte-order mark of {encoding}; "
                f"iconv -f {encoding} -t UTF-8 converts it)"
            )
            raise InputError(str(path), "", None, expected)


def _read_jsonl(path: Path) -> Documents:
    with path.open("rb") as file:
        _refuse_other_encodings(path, file.peek(4)[:4])
        return _read_lines(path, file)


def _read_lines(path: Path, lines: BinaryIO) -> Documents:
    text = Documents([], [])
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            content = json.loads(line.decode("utf-8"))
            document = content["text"].removeprefix("\ufeff").encode("utf-8")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            got = line[:60].decode("utf-8", errors="replace")
            expected = 'a JSON object with a "text" string, in valid Unicode'
            raise InputError(str(path), f"line {number}", got, expected) from None
        if document:
            text.names.append(str(number))
            text.documents.append(document)
    return text


def split_documents(text: Documents, val_fraction: float) -> Split:
    """Hold out whole documents by a hash of their names, or the end of a single text.

    Documents are taken in hash order while each brings validation closer to `val_fraction` of the
    bytes; if none does, the smallest. A single text is cut at a character, as nanoGPT does.
    """
    if len(text.documents) == 1:
        whole = memoryview(text.documents[0])
        cut = byte_of_character(whole, int(count_characters(whole) * (1 - val_fraction)))
        return Split([whole[:cut]], [whole[cut:]], separate=False)
    held_out = _held_out(text, val_fraction)
    train = [d for i, d in enumerate(text.documents) if i not in held_out]
    return Split(train, [text.documents[i] for i in sorted(held_out)], separate=True)


def _held_out(text: Documents, val_fraction: float) -> set[int]:
    """Return the documents for validation: at least one, and never all."""
    sizes = [len(document) for document in text.documents]
    keys = [hashlib.sha256(name.encode()).digest() for name in text.names]
    missing, chosen = val_fraction * sum(sizes), set()
    for i in sorted(range(len(sizes)), key=keys.__getitem__):
        if abs(missing - sizes[i]) < missing and len(chosen) < len(sizes) - 1:
            chosen.add(i)
            missing -= sizes[i]
    return chosen or {min(range(len(sizes)), key=sizes.__getitem__)}
