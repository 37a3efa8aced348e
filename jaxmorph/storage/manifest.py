"""The manifest of a checkpoint folder: what is in it, and whether it still is.

`manifest.json` is canonical JSON (sorted keys, no spaces) of

    files            relative path -> {"sha256", "size"}, every file but the manifest
    leaves           path of each leaf of the state -> [dtype, shape]
    manifest_sha256  digest of the manifest without this key
    score            the validation loss the checkpoint was taken at, or null
    state_sha256     one digest over all leaves in path order
    step

so that a changed bit anywhere, the manifest's own included, is found: its bytes must equal the
canonical form of what they say.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmorph.storage.run_folder import sync_file, sync_folder

if TYPE_CHECKING:
    import jax
    import numpy as np

MANIFEST = "manifest.json"
_KEYS = {"files", "leaves", "manifest_sha256", "score", "state_sha256", "step"}


def state_sha256(arrays: Mapping[str, jax.Array | np.ndarray]) -> str:
    """Return one SHA-256 over all leaves, in order of their paths: path, dtype, shape and bytes.

    An array that spans processes is gathered first, one at a time; then every process must call.

    Args:
      arrays: path -> array of any shape and dtype.
    """
    import numpy as np

    digest = hashlib.sha256()
    for path in sorted(arrays):
        value = np.ascontiguousarray(_whole(arrays[path]))
        shape = tuple(arrays[path].shape)
        digest.update(f"{path}\0{value.dtype.name}\0{shape}\0".encode())
        # as bytes, because hashlib takes no buffer of a dtype that NumPy itself lacks (bfloat16)
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


def write_manifest(
    folder: Path, step: int, leaves: dict[str, list], digest: str, score: float | None
) -> None:
    """Write the manifest of all files in `folder`; they and it are on the disk on return.

    Args:
      folder: a complete checkpoint, but for its manifest.
      step: the step it is of.
      leaves: see `describe_leaves`.
      digest: see `state_sha256`.
      score: the lower the better; one that is not finite counts as none.
    """
    manifest = {
        "files": {name: _sums(folder / name) for name in _files(folder)},
        "leaves": leaves,
        "score": score if score is not None and math.isfinite(score) else None,
        "state_sha256": digest,
        "step": step,
    }
    manifest["manifest_sha256"] = hashlib.sha256(_canonical(manifest)).hexdigest()
    (folder / MANIFEST).write_bytes(_canonical(manifest))
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(parent) / name)
        sync_folder(Path(parent))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

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
    if not isinstance(manifest, dict) or set(manifest) != _KEYS or _canonical(manifest) != data:
        raise ValueError(f"{MANIFEST} is damaged (not in canonical form)")
    digest = manifest.pop("manifest_sha256")
    if hashlib.sha256(_canonical(manifest)).hexdigest() != digest:
        raise ValueError(f"{MANIFEST} is damaged (its digest differs)")
    if str(manifest["step"]) != folder.name:
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def problem_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None: every file is read and compared."""
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
    """Relative paths of all that is not a folder, links included, but for the manifest."""
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
