"""Several changes at once: as one after the other, and each thing begun by the change that began it."""

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
    "norm": "layer | *> width",
    "value": "layer | width -> head head_dim",
    "out": "layer | head head_dim +> width",
    "up": "layer | width -> hidden",
    "up_bias": "layer | -> hidden",
    "down": "layer | hidden +> width",
    "last": "width -> classes",
}
SIZES = {"layer": 2, "width": 3, "head": 4, "head_dim": 2, "hidden": 5, "classes": 6}
ADAM: Any = optax.scale_by_adam()


def _setting() -> tuple[Any, Any]:
    """Parameters and moments of random numbers, in float64."""
    rng = np.random.default_rng(0)
    shapes = {path: [SIZES[a] for a in t.split() if a in SIZES] for path, t in TABLE.items()}
    draw = lambda: {p: jnp.asarray(rng.random(shape)) for p, shape in shapes.items()}  # noqa: E731
    params = draw()
    return params, ADAM.init(params)._replace(mu=draw(), nu=draw())


def _one_by_one(changes, params, state, **arguments) -> tuple[Any, Any]:
    for change in changes:
        params, state, _ = apply([change], TABLE, params, state, ADAM, **arguments)
    return params, state


WIDEN = morphs.widen("hidden", to=8, recipe="even")
FRESH = morphs.widen("hidden", to=8, recipe="fresh", fresh_nu=0.5)
KEEP = morphs.keep("head", [[0, 1, 2], [0, 2, 3]], over="layer")
DEEPEN = morphs.deepen(to=4, order="interleave")
IDENTITY = morphs.deepen(to=4, identity=True)


@pytest.mark.parametrize(
    "changes",
    [
        [WIDEN, KEEP, DEEPEN],
        [KEEP, WIDEN, DEEPEN],
        [WIDEN, KEEP, morphs.widen("width", to=6, recipe="even"), DEEPEN],
        [morphs.widen("hidden", to=10, recipe="even"), IDENTITY],  # leaves the means as they are
        [morphs.duplicate("hidden", 5, 10), DEEPEN, morphs.keep("classes", [1, 5])],
        [KEEP, morphs.keep("layer", [1])],
    ],
    ids=["all", "other order", "width too", "identity", "maps", "layers leave"],
)
def test_at_once_is_as_one_after_the_other(changes):
    with jax.enable_x64(True):
        params, state = _setting()
        expected = _one_by_one(changes, params, state)
        for order in (changes, changes[::-1]):
            found = apply(order, TABLE, params, state, ADAM)
            chex.assert_trees_all_close(found[:2], expected, rtol=1e-12)
            assert found[2].totals["reset"] == 0


def test_each_entry_begins_by_the_policy_of_the_change_that_made_it():
    with jax.enable_x64(True):
        params, state = _setting()
        filled = {p: jnp.full(leaf.shape, 9.0) for p, leaf in _shapes(layer=3, hidden=8).items()}
        quiet = morphs.deepen(to=3, fresh=filled, fresh_nu=0.25)
        found, moved, report = apply([FRESH, quiet], TABLE, params, state, ADAM)
        up, old = np.asarray(moved.nu["up"]), np.asarray(state.nu["up"])
        np.testing.assert_array_equal(up[:2, :, :5], old)
        for layer in range(2):
            np.testing.assert_allclose(up[layer, :, 5:], np.full((3, 3), 0.5 * old[layer].mean()))
        np.testing.assert_allclose(up[2, :, :5], np.full((3, 5), 0.25 * old.mean()))
        np.testing.assert_allclose(up[2, :, 5:], np.full((3, 3), 0.5 * old.mean()))  # the first's
        np.testing.assert_allclose(moved.nu["value"][2], 0.25 * np.mean(state.nu["value"]))
        # The parameters that one change gives are for what the others make, too.
        np.testing.assert_array_equal(found["up"][:, :, 5:], 9)
        np.testing.assert_array_equal(found["value"][2], 9)
        np.testing.assert_array_equal(found["down"][:, 5:], 0)
        begun = sum(leaf.size for leaf in _shapes(layer=3, hidden=8).values())
        begun -= sum(leaf.size for leaf in params.values())
        assert report.totals["fresh"] == 2 * begun


def _shapes(**sizes) -> dict[str, Any]:
    sizes = SIZES | sizes
    return {p: np.zeros([sizes[a] for a in t.split() if a in sizes]) for p, t in TABLE.items()}


def test_fresh_moments_of_one_change_leave_the_copied_ones_of_another():
    with jax.enable_x64(True):
        params, state = _setting()
        both = [morphs.widen("hidden", to=10, recipe="even", moments="fresh"), DEEPEN]
        _, moved, _ = apply(both, TABLE, params, state, ADAM)
        np.testing.assert_array_equal(
            moved.mu["value"], np.asarray(state.mu["value"])[[0, 0, 1, 1]]
        )
        np.testing.assert_array_equal(moved.mu["down"][:, 5:], 0)
        kept = np.asarray(state.mu["down"])[[0, 0, 1, 1]]
        np.testing.assert_array_equal(moved.mu["down"][:, :5], kept)


def test_a_restart_by_any_change_is_one_of_the_whole_state():
    params, state = _setting()
    changes = [WIDEN, morphs.deepen(to=3, moments="restart")]
    new, moved, report = apply(changes, TABLE, params, state, ADAM)
    chex.assert_trees_all_equal(moved, ADAM.init(new))
    assert report.totals["transported"] == report.totals["fresh"] == 0


def test_a_composition_can_be_jitted_and_is_the_same():
    params, state = _setting()
    changes = [morphs.widen("hidden", to=8), KEEP, IDENTITY]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def moved(params, state, key) -> Any:
        return apply(changes, TABLE, params, state, ADAM, key=key)

    plain: Any = apply(changes, TABLE, params, state, ADAM, key=jax.random.key(0))
    for _ in range(2):
        found = moved(params, state, jax.random.key(0))
        chex.assert_trees_all_close(found[:2], plain[:2], rtol=1e-5)
        assert found[2].lines == plain[2].lines


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([WIDEN, morphs.keep("hidden", [0])], ["one map per axis"]),
        ([WIDEN, "deepen"], ["changes", "'str'", "widen, deepen, keep"]),
        ([morphs.widen("width", to=4, recipe="fresh", fresh={}), morphs.deepen(to=3, fresh={})],
         ["fresh", "2 sets of parameters", "one change"]),
        ([KEEP, morphs.AxisMap("layer", 2, np.zeros((3, 1), int), np.ones((3, 1)), over="width")],
         ["layer", "'head' has a row for each"]),
    ],
)  # fmt: skip
def test_changes_that_do_not_go_together_are_refused(changes, words):
    params, state = _setting()
    with pytest.raises(morphs.InputError) as raised:
        apply(changes, TABLE, params, state, ADAM)
    for word in words:
        assert word in str(raised.value)
