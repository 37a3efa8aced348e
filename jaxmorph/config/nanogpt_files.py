"""nanoGPT's prepared data: which of its files a path means, and where their tokenizer is."""

from __future__ import annotations

import os
from pathlib import Path


def ways_to_name(file: Path) -> str:
    """Return the three ways to say what the ids of a .bin file mean, for messages."""
    return (
        f"the tokenizer that the ids of {file.name} are from: nanoGPT's meta.pkl beside it "
        "(characters), --tokenizer gpt2 (or byte), or --tokenizer PATH of a tokenizer.json"
    )


def bin_files(path: Path) -> list[Path]:
    """Return the nanoGPT files of `path`: training and validation, one to split, or none.

    A folder with train.bin or val.bin means those it has, never text, and its train.bin means both. A
    path that cannot be one, such as one that is too long, means none.
    """
    if os.path.isdir(path):
        return [file for file in (path / "train.bin", path / "val.bin") if os.path.isfile(file)]
    if path.suffix != ".bin" or not os.path.isfile(path):
        return []
    sibling = path.with_name("val.bin")
    return [path, sibling] if path.name == "train.bin" and os.path.isfile(sibling) else [path]


def meta_file(path: Path) -> Path | None:
    """Return the meta.pkl that describes the ids of `path`'s nanoGPT files, if there is one."""
    files = bin_files(path)
    beside = files[0].with_name("meta.pkl") if files else None
    return beside if beside is not None and os.path.isfile(beside) else None
