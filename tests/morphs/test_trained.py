"""Optimizers whose state covers a part of the parameters only, against indexing in NumPy."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmorph import morphs

apply: Any = morphs.apply  # its results' types depend on the optimizer
TABLE = {
    "embed": "vocab -> width",
    "blocks/up": "layer | width -> hidden",
    "blocks/down": "layer | hidden +> width",
    "blocks/bias": "layer | +> width",
}


def _params(layers=4, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.random(shape), jnp.float32)  # noqa: E731
    blocks = {"up": draw(layers, 3, 5), "down": draw(layers, 5, 3), "bias": draw(layers, 3)}
    return {"embed": draw(7, 3), "blocks": blocks}


ADAM_FIELDS = {"mu": 1, "nu": 2}  # of a transform that is the tests' own


def _sliced(inner: optax.GradientTransformation, layers: list[int]) -> Any:
    """An optimizer of some layers only: it sees slices of the stacked parameters."""
    at = np.asarray(layers, int)

    def part(tree: Any) -> Any:
        return tree | {"blocks": jax.tree.map(lambda leaf: leaf[at], tree["blocks"])}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        found: Any = inner.update(part(updates), state, params and part(params))
        moved, state = found
        whole = jax.tree.map(
            lambda leaf, new: jnp.zeros_like(leaf).at[at].set(new),
            updates["blocks"],
            moved["blocks"],
        )
        return moved | {"blocks": whole}, state

    return optax.GradientTransformation(lambda params: inner.init(part(params)), update)


def _settled(inner, layers, params) -> Any:
    """The state of the sliced optimizer after two steps of random gradients."""
    optimizer = _sliced(inner, layers)
    state = optimizer.init(params)
    for seed in (1, 2):
        _, state = optimizer.update(_params(seed=seed), state, params)
    return state


def _moved(changes, state, optimizer, params, **arguments) -> Any:
    return apply(changes, TABLE, params, state, optimizer, **arguments)


@pytest.mark.parametrize(
    ("before", "after", "deepen", "source"),
    [  # source: what each new covered layer is a copy of, as a place in `before`; -1: not covered
        ([0, 1], [1, 3], None, [1, -1]),
        ([2, 3], [3, 2, 0], None, [1, 0, -1]),
        ([0, 1], [1, 3], {"to": 8}, [1, -1]),
        ([2, 3], [0, 2, 6, 7], {"to": 8}, [-1, 0, 0, 1]),
        ([2, 3], [3, 4, 5, 7], {"to": 8, "order": "interleave"}, [-1, 0, 0, 1]),
        ([0, 2], [0, 4, 6], {"to": 8, "moments": "fresh"}, [0, -1, -1]),
        ([0, 1, 2, 3], [], None, []),
        ([], [0, 1], None, [-1, -1]),
    ],
)
def test_covered_layers_come_from_the_covered_layer_they_copy(before, after, deepen, source):
    params, inner = _params(), optax.adam(1e-2)
    state = _settled(inner, before, params)
    changes: list = [morphs.trained(before=before, after=after)]
    changes += [morphs.deepen(**deepen)] if deepen else []
    optimizer = _sliced(inner, after)
    new, moved, report = _moved(changes, state, optimizer, params, fields=ADAM_FIELDS)
    plain, _, _ = apply(changes[1:], TABLE, params, optax.EmptyState(), optax.identity())
    chex.assert_trees_all_equal(new, plain)  # parameters know nothing of what is trained
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, optimizer.init(new))
    fresh = 0
    for field in ("mu", "nu"):
        old, found = getattr(state[0], field), getattr(moved[0], field)
        np.testing.assert_array_equal(found["embed"], old["embed"])
        everything = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(old)])
        for name, leaf in found["blocks"].items():
            rows = np.asarray(old["blocks"][name])
            mean = rows.mean() if before else everything.mean()
            for row, origin in zip(leaf, source, strict=True):
                begun = np.full(row.shape, mean if field == "nu" else 0)
                expected = rows[origin] if origin >= 0 else begun
                np.testing.assert_allclose(row, expected, rtol=1e-6)
                fresh += row.size * (origin < 0)
    assert report.totals["fresh"] == fresh
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, new), moved, new)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_what_else_changes_reaches_the_covered_layers_alone():
    params, inner = _params(), optax.adam(1e-2)
    state = _settled(inner, [1, 3], params)
    rows = [[0, 1, 2], [1, 2, 3], [2, 3, 4], [4, 0, 1]]
    changes = [
        morphs.deepen(to=6, identity=True),
        morphs.keep("hidden", rows, over="layer"),
        morphs.trained(before=[1, 3], after=[3, 5, 4]),
    ]
    optimizer = _sliced(inner, [3, 5, 4])
    new, moved, _ = _moved(changes, state, optimizer, params, fields=ADAM_FIELDS)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, optimizer.init(new))
    up = np.asarray(state[0].mu["blocks"]["up"])
    expected = [up[1][:, rows[3]], up[0][:, rows[1]], np.zeros((3, 3))]  # 4 is a copy of 0
    np.testing.assert_array_equal(moved[0].mu["blocks"]["up"], expected)
    # Of the new layers what adds to the residual stream is zero and fresh; layer 3 is old.
    down = np.asarray(state[0].mu["blocks"]["down"])[1][rows[3]]
    np.testing.assert_array_equal(moved[0].mu["blocks"]["down"], [down, 0 * down, 0 * down])


def test_a_factored_state_of_some_layers_is_shaped_as_a_fresh_one():
    params, inner = _params(), optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=0.9)
    state = _settled(inner, [0, 1], params)
    optimizer = _sliced(inner, [1, 3, 5])
    changes = [morphs.deepen(to=8), morphs.trained(before=[0, 1], after=[1, 3, 5])]
    fields = {"v_row": 2, "v_col": 2, "v": 2, "ema": 0}
    new, moved, _ = _moved(changes, state, optimizer, params, fields=fields)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, optimizer.init(new))


def _without_embed(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose state has no leaf at all for one parameter."""
    return optax.GradientTransformation(
        lambda params: inner.init({"blocks": params["blocks"]}), inner.update
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        _without_embed(optax.adam(1e-2)),
        optax.masked(optax.adam(1e-2), {"embed": False, "blocks": True}),
    ],
    ids=["absent", "masked"],
)
def test_parameters_that_a_state_lacks_need_nothing(optimizer):
    params = _params()
    state: Any = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), optimizer.init(params)
    )  # fmt: skip
    new, moved, report = _moved(
        [morphs.widen("width", to=6, recipe="even"), morphs.deepen(to=6)], state, optimizer, params
    )
    assert new["embed"].shape == (7, 6)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, optimizer.init(new))
    leaves = jax.tree.leaves(moved)
    assert report.totals["transported"] == sum(leaf.size for leaf in leaves)
    named = jax.tree_util.tree_leaves_with_path
    paths = [jax.tree_util.keystr(path) for path, _ in named(state)]
    at = next(n for n, path in enumerate(paths) if path.endswith(".mu['blocks']['bias']"))
    old, found = (np.asarray(named(tree)[at][1]) for tree in (state, moved))
    np.testing.assert_allclose(found, np.tile(old[[0, 1, 2, 3, 0, 1]], 2) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([morphs.trained(before=[0, 4], after=[0])], ["trained: before", "0 to 3"]),
        ([morphs.trained(before=[0, 1], after=[1, 1])], ["trained: after", "each once"]),
        ([morphs.trained(before=[0, 1], after=[4])], ["trained: after", "0 to 3"]),
        ([morphs.trained(before=[0], after=[1, 3])], ["opt", "(2, 3)", "(1, 3)", "trained"]),
        ([], ["(4, 3)", "`trained` says which layers"]),
        ([morphs.trained(before=[0, 1], after=[1, 3], axis="layr")], ["did you mean 'layer'"]),
        ([morphs.trained(before=[0, 1], after=[1, 3])] * 2, ["each axis once"]),
    ],
)
def test_wrong_layers_are_refused(changes, words):
    params, inner = _params(), optax.adam(1e-2)
    state = _settled(inner, [0, 1], params)
    with pytest.raises(morphs.InputError) as raised:
        _moved(changes, state, _sliced(inner, [1, 3]), params, fields=ADAM_FIELDS)
    for word in words:
        assert word in str(raised.value)


def test_weights_kept_for_some_layers_only_are_refused():
    params, inner = _params(), optax.contrib.schedule_free_sgd(1e-2)
    state = _sliced(inner, [0, 1]).init(params)
    change = morphs.trained(before=[0, 1], after=[1, 3])
    kept = dict.fromkeys(("b1", "weight_sum", "max_lr"), morphs.KEEP)
    fields = {**kept, "z": morphs.PARAMETER}
    with pytest.raises(morphs.InputError, match="without weights"):
        _moved([change], state, _sliced(inner, [1, 3]), params, fields=fields)
