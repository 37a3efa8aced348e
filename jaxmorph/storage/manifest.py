"""The manifest of a checkpoint folder: its contents, and how to verify them.

`manifest.json` is canonical JSON (sorted keys, no spaces) of

    files            relative path -> {"sha256", "size"}, every file except the manifest
    format           of the checkpoint, see `storage.formats`; absent from those of format 1
    jaxmorph         the version that wrote it; likewise
    leaves           path of each leaf of the state -> [dtype, shape]
    manifest_sha256  digest of the manifest without this key
    score            the validation loss the checkpoint was taken at, or null
    state_sha256     one digest over all leaves in path order
    step

so that a changed bit anywhere, including the manifest itself, is detected: its bytes must equal the
canonical form of their content. All formats keep these keys, their types (`Manifest`) and this rule,
whatever they add, so that a checkpoint of another format can be distinguished from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from jaxmorph import __version__
from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import named
from jaxmorph.storage.declared import mismatch
from jaxmorph.system import processes
from jaxmorph.system.files import sync_file, sync_folder, write_new

if TYPE_CHECKING:
    import jax
    import numpy as np

MANIFEST = "manifest.json"


class FileSums(TypedDict):
    """What a manifest says of a file."""

    sha256: str
    size: int


class Manifest(TypedDict):
    """A manifest as read; that of format 1 is of version ""."""

    files: dict[str, FileSums]
    format: int
    jaxmorph: str
    leaves: dict[str, tuple[str, list[int]]]
    score: float | None
    state_sha256: str
    step: int


def state_sha256(arrays: Mapping[str, jax.Array | np.ndarray]) -> str:
    """Return one SHA-256 over all leaves, in order of their paths: path, dtype, shape and bytes.

    Arrays that span processes are gathered first, one at a time; then every process must call this.

    Args:
      arrays: path -> array of any shape and dtype.
    """
    import numpy as np

    digest = hashlib.sha256()
    for path in sorted(arrays):
        value = np.ascontiguousarray(processes.whole(arrays[path]))
        shape = tuple(arrays[path].shape)
        digest.update(f"{path}\0{value.dtype.name}\0{shape}\0".encode())
        # as bytes, because hashlib accepts no buffer of a dtype that NumPy lacks (bfloat16)
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def describe_leaves(arrays: Mapping[str, Any]) -> dict[str, list]:
    """Return path -> [dtype, shape] for arrays or ShapeDtypeStructs."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in arrays.items()}


def check_leaves(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the expected leaves (both as `describe_leaves` returns them).

    Raises:
      InputError: names the first leaf that differs.
    """
    for path in sorted(set(stored) | set(wanted)):
        got, expected = stored.get(path), wanted.get(path)
        if got != expected:
            raise InputError(
                str(folder), path, _worded(got), f"{_worded(expected)}, as in this run"
            )


def _worded(leaf: Any) -> str:
    return "no such array" if leaf is None else f"{leaf[0]} {tuple(leaf[1])}"


def write_manifest(
    folder: Path,
    step: int,
    leaves: dict[str, list],
    digest: str,
    score: float | None,
    format_number: int,
) -> None:
    """Write the manifest of all files in `folder`; all of it is synced to disk on return.

    Args:
      folder: a complete checkpoint except for its manifest.
      step: its step.
      leaves: see `describe_leaves`.
      digest: see `state_sha256`.
      score: lower is better; a non-finite one counts as none.
      format_number: of the checkpoint.
    """
    manifest = {
        "files": {name: _sums(folder / name) for name in _files(folder)},
        "format": format_number,
        "jaxmorph": __version__,
        "leaves": leaves,
        "score": score if score is not None and math.isfinite(score) else None,
        "state_sha256": digest,
        "step": step,
    }
    manifest["manifest_sha256"] = hashlib.sha256(_canonical(manifest)).hexdigest()
    write_new(folder / MANIFEST, _canonical(manifest))
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(parent) / name)
        sync_folder(Path(parent))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
      ValueError: it is missing, damaged or of another step than the folder's name; says which.
    """
    manifest, data = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or _canonical(manifest) != data:
        raise ValueError(f"{MANIFEST} is damaged (not in canonical form)")
    digest = manifest.pop("manifest_sha256", None)
    if hashlib.sha256(_canonical(manifest)).hexdigest() != digest:
        raise ValueError(f"{MANIFEST} is damaged (its digest differs)")
    manifest = {"format": 1, "jaxmorph": ""} | manifest
    if problem := mismatch(manifest, Manifest):
        raise ValueError(f"{MANIFEST} is damaged ({problem})")
    if manifest["format"] < 1:
        raise ValueError(f"{MANIFEST} is damaged (format is {manifest['format']}, not from 1 on)")
    if str(manifest["step"]) != folder.name:
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    return cast(Manifest, manifest)


def read_json(path: Path) -> tuple[Any, bytes]:
    """Return the value and the bytes of a JSON file.

    Raises:
      ValueError: it cannot be read, or is not JSON; names the file.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device might never end
            raise ValueError(f"{path.name} is not a plain file")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    try:
        return json.loads(data), data
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged (not JSON)") from error


def problem_of(folder: Path) -> str | None:
    """Read and verify every file of a checkpoint; return what is wrong with it, or None."""
    try:
        expected = read_manifest(folder)["files"]
        found = _files(folder)
        if missing := sorted(set(expected) - set(found)):
            return f"{named(missing[0])} is missing"
        if extra := sorted(set(found) - set(expected)):
            return f"{named(extra[0])} is not in its manifest"
        for name in found:
            if problem := _problem_of_file(folder / name, expected[name]):
                return f"{named(name)} {problem}"
    except ValueError as error:
        return str(error)
    return None


def _problem_of_file(path: Path, expected: FileSums) -> str | None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "is not a plain file"
        if status.st_size != expected["size"]:
            return f"has {status.st_size} bytes, not {expected['size']}"
        return None if _sums(path) == expected else "is damaged (its SHA-256 differs)"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _files(folder: Path) -> list[str]:
    """Relative paths of everything but folders, including links, except the manifest."""
    names = [
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, folders, files in os.walk(folder)
        for name in files + [each for each in folders if (Path(parent) / each).is_symlink()]
    ]
    return sorted(name for name in names if name != MANIFEST)


def _sums(path: Path) -> FileSums:
    """Digest and size of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": os.fstat(file.fileno()).st_size}
