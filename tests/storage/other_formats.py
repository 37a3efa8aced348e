"""Checkpoints as another version would have written them, made of present ones."""

import hashlib
import json
from pathlib import Path

OTHER_TYPES = (None, True, 3, -1, 0.5, 10**30, "x", "", [], [1], {}, {"a": 1})  # of every JSON type


def rewrite(folder: Path, meta: dict | None = None, **changes) -> None:
    """Give a checkpoint other meta and other entries of its manifest (None: without it), soundly."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    if meta is not None:
        data = json.dumps(meta).encode()
        (folder / "meta.json").write_bytes(data)
        sums = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        manifest["files"]["meta.json"] = sums
    for name in [name for name, value in changes.items() if value is None]:
        del manifest[name]
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = hashlib.sha256(canonical(manifest)).hexdigest()
    (folder / "manifest.json").write_bytes(canonical(manifest))


def canonical(manifest: dict) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def places(value, path=()):
    """Yield where the values of a JSON value are, itself not counted."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        yield (*path, name)
        if isinstance(item, dict | list):
            yield from places(item, (*path, name))


def replaced(value, path, new):
    """Return a JSON value with another one at a place."""
    if not path:
        return new
    name, *rest = path
    copy = value.copy()
    copy[name] = replaced(value[name], rest, new)
    return copy


def at(value, path):
    """Return the value at a place."""
    for name in path:
        value = value[name]
    return value
