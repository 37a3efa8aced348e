"""Leaves of pytrees by path, and the parameter that a leaf of a state mirrors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def parameter_path(path: tuple) -> str:
    """Return the parameter that a leaf of a state mirrors: the trailing dict keys of its path.

    Optimizer states nest the parameters' dicts inside their fields (mu, nu, trace, ...), so the
    trailing dict keys of a leaf's path name its parameter: ".opt_state[1].mu['embed']['tokens']" is
    "embed/tokens". "" for a leaf that mirrors none.
    """
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.append(str(key.key))
    return "/".join(reversed(names))


def field_name(path: tuple) -> str:
    """Return the field of a state that a leaf belongs to: the last attribute on its path, or ""."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


def field_place(path: tuple) -> str:
    """Return the place of the field that a leaf belongs to: "[1].trace", or "" without a field."""
    at = [k for k, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
    return jax.tree_util.keystr(path[: at[-1] + 1]) if at else ""


def declared_for(path: tuple, fields: Mapping[str, Any]) -> Any:
    """Return what is declared for a leaf's field: by its place, else by its name, else None."""
    return fields.get(field_place(path), fields.get(field_name(path)))


def leaves_by_path(state: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path, joined with slashes, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def from_leaves(abstract: Any, leaves: dict[str, Any]) -> Any:
    """Return a pytree with the structure of `abstract` and these leaves (see `leaves_by_path`)."""
    paths = list(leaves_by_path(abstract))
    assert set(paths) == set(leaves), set(paths) ^ set(leaves)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[path] for path in paths])
