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
canonical form of their content. All formats keep these keys and this rule, whatever they add, so
that a checkpoint of another format can be distinguished from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmorph import __version__
from jaxmorph.cli.errors import InputError
from jaxmorph.system.files import sync_file, sync_folder, write_new

if TYPE_CHECKING:
    import jax
    import numpy as np

MANIFEST = "manifest.json"
_KEYS = {"files", "leaves", "manifest_sha256", "score", "state_sha256", "step"}


def state_sha256(arrays: Mapping[str, jax.Array | np.ndarray]) -> str:
    """Return one SHA-256 over all leaves, in order of their paths: path, dtype, shape and bytes.

    Arrays that span processes are gathered first, one at a time; then every process must call this.

    Args:
      arrays: path -> array of any shape and dtype.
    """
    import numpy as np

    digest = hashlib.sha256()
    for path in sorted(arrays):
        value = np.ascontiguousarray(_whole(arrays[path]))
        shape = tuple(arrays[path].shape)
        digest.update(f"{path}\0{value.dtype.name}\0{shape}\0".encode())
        # as bytes, because hashlib accepts no buffer of a dtype that NumPy lacks (bfloat16)
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _whole(array: jax.Array | np.ndarray) -> Any:
    """The whole array, on this host."""
    import jax

    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    return array


def describe_leaves(arrays: Mapping[str, Any]) -> dict[str, list]:
    """Return path -> [dtype, shape] for arrays or ShapeDtypeStructs."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in arrays.items()}


def check_leaves(folder: Path, stored: dict[str, list], wanted: dict[str, list]) -> None:
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


def _worded(leaf: list | None) -> str:
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; its format number is always filled in.

    Raises:
      ValueError: it is missing, damaged or of another step than the folder's name; says which.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is damaged (not JSON)") from error
    if (
        not isinstance(manifest, dict)
        or not manifest.keys() >= _KEYS
        or _canonical(manifest) != data
    ):
        raise ValueError(f"{MANIFEST} is damaged (not in canonical form)")
    digest = manifest.pop("manifest_sha256")
    if hashlib.sha256(_canonical(manifest)).hexdigest() != digest:
        raise ValueError(f"{MANIFEST} is damaged (its digest differs)")
    if str(manifest["step"]) != folder.name:
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    if type(number := manifest.setdefault("format", 1)) is not int or number < 1:
        raise ValueError(f"{MANIFEST} is damaged (its format is not a number)")
    return manifest


def problem_of(folder: Path) -> str | None:
    """Read and verify every file of a checkpoint; return what is wrong with it, or None."""
    try:
        expected = read_manifest(folder)["files"]
        found = _files(folder)
        if missing := sorted(set(expected) - set(found)):
            return f"{missing[0]} is missing"
        if extra := sorted(set(found) - set(expected)):
            return f"{extra[0]} is not in its manifest"
        for name in found:
            size = (folder / name).stat().st_size
            if size != expected[name]["size"]:
                return f"{name} has {size} bytes, not {expected[name]['size']}"
            if _sums(folder / name) != expected[name]:
                return f"{name} is damaged (its SHA-256 differs)"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _files(folder: Path) -> list[str]:
    """Relative paths of everything but folders, including links, except the manifest."""
    names = [
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, folders, files in os.walk(folder)
        for name in files + [each for each in folders if (Path(parent) / each).is_symlink()]
    ]
    return sorted(name for name in names if name != MANIFEST)


def _sums(path: Path) -> dict[str, Any]:
    """Digest and size of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": os.fstat(file.fileno()).st_size}
