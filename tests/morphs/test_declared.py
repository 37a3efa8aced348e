"""Arrays that are no parameters move along their axes, in the state of an optimizer and beside it."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmorph import morphs
from jaxmorph.morphs import NamedAxes

apply: Any = morphs.apply  # its results' types depend on the optimizer
TABLE = {"value": "layer | width -> head", "out": "layer | head +> width"}
PARAMS = {"value": jnp.ones((2, 3, 4)), "out": jnp.ones((2, 4, 3))}
PER_HEAD = np.arange(8).reshape(2, 4)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([morphs.pad("head", 4, 5)], [[0, 1, 2, 3, 9], [4, 5, 6, 7, 9]]),
        ([morphs.duplicate("head", 4, 6)], [[0, 1, 2, 3, 0, 1], [4, 5, 6, 7, 4, 5]]),
        ([morphs.cut("head", 4, 2)], [[0, 1], [4, 5]]),
        ([morphs.repeat("layer", 2, 3, fresh=True)], [[0, 1, 2, 3], [4, 5, 6, 7], [9, 9, 9, 9]]),
        ([morphs.repeat("layer", 2, 3, order="interleave")], [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7]]),
        ([morphs.repeat("layer", 2, 3), morphs.pad("head", 4, 5)],
         [[0, 1, 2, 3, 9], [4, 5, 6, 7, 9], [0, 1, 2, 3, 9]]),
        ([morphs.keep("head", [[3, 0], [1, 2]], over="layer")], [[3, 0], [5, 6]]),
        ([morphs.keep("head", [[3, 0], [1, 2]], over="layer"), morphs.repeat("layer", 2, 4)],
         [[3, 0], [5, 6], [3, 0], [5, 6]]),
        ([morphs.keep("head", [[3, 0], [1, 2]], over="layer"),
          morphs.repeat("layer", 2, 3, order="interleave", fresh=True)], [[3, 0], [9, 9], [5, 6]]),
        ([morphs.pad("width", 3, 5)], PER_HEAD.tolist()),
    ],
)  # fmt: skip
def test_entries_go_where_their_layer_and_head_go(changes, expected, dtype):
    sizes = {"layer": 2, "head": 4, "width": 3}
    maps = [c if isinstance(c, morphs.AxisMap) else c.from_size(sizes[c.axis]) for c in changes]
    leaf = jnp.asarray(PER_HEAD, dtype)
    found = morphs.moved(NamedAxes("layer head", fresh=9), leaf, maps)
    assert found.dtype == leaf.dtype
    np.testing.assert_array_equal(found, jnp.asarray(expected, dtype))


def test_there_may_be_no_layer_before():
    found = morphs.moved(
        NamedAxes("layer head", fresh=1), jnp.zeros((0, 4)), [morphs.repeat("layer", 0, 2)]
    )
    np.testing.assert_array_equal(found, np.ones((2, 4)))
    scalar = morphs.moved(NamedAxes(), jnp.asarray(3), [morphs.repeat("layer", 0, 2)])
    assert scalar == 3


def _apply(changes, state: Any = None, optimizer: Any = None, **arguments) -> Any:
    state = optax.EmptyState() if state is None else state
    return apply(changes, TABLE, PARAMS, state, optimizer or optax.identity(), **arguments)


def test_other_arrays_move_along_with_the_parameters():
    changes = [morphs.keep("head", [[3, 0], [1, 2]], over="layer"), morphs.deepen(to=3)]
    other = {
        "status": (jnp.asarray(PER_HEAD), NamedAxes("layer head", fresh=1)),
        "by width": (jnp.asarray([1.5, 2.5, 3.5]), NamedAxes("width")),
        "step": (jnp.asarray(7), NamedAxes()),
    }

    @jax.jit
    def moved(leaves):
        paired = {name: (leaf, other[name][1]) for name, leaf in leaves.items()}
        return _apply(changes, other=paired)[2]

    found = moved({name: leaf for name, (leaf, _) in other.items()}).other
    np.testing.assert_array_equal(found["status"], [[3, 0], [5, 6], [3, 0]])
    np.testing.assert_array_equal(found["by width"], [1.5, 2.5, 3.5])
    assert found["step"] == 7


class Ages(NamedTuple):
    """State of a transform that mirrors no parameter but for its trace."""

    status: jax.Array
    trace: Any


def _ages() -> optax.GradientTransformation:
    """Counts by layer and head, sized by the parameters."""

    def init(params) -> Ages:
        layers, heads, _ = params["out"].shape
        return Ages(jnp.zeros((layers, heads), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def test_a_field_that_mirrors_no_parameter_moves_by_the_axes_declared_for_it():
    optimizer = optax.chain(optax.scale_by_adam(), _ages())
    state: Any = optimizer.init(PARAMS)
    state = (state[0], state[1]._replace(status=jnp.asarray(PER_HEAD, jnp.int32)))
    changes = [morphs.widen("head", to=6, recipe="fresh"), morphs.deepen(to=3)]
    fields: Any = {"status": NamedAxes("layer head", fresh=5), "trace": 0}
    params, moved, report = _apply(changes, state, optimizer, fields=fields, key=jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, optimizer.init(params))
    expected = np.pad(PER_HEAD, [(0, 0), (0, 2)], constant_values=5)[[0, 1, 0]]
    np.testing.assert_array_equal(moved[1].status, expected)
    assert morphs.Line("[1].status", "status", "transported", 12) in report.lines
    assert morphs.Line("[1].status", "status", "fresh", 6) in report.lines
    with pytest.raises(morphs.InputError, match=r"\[1\]\.status.*NamedAxes"):
        _apply(changes, state, optimizer, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"statsu": NamedAxes("layer head")}, ["fields", "'statsu'", "did you mean 'status'"]),
        ({"[1].trace": 1}, ["fields", "'[1].trace'", "did you mean '[0].trace'"]),
        ({"trace": "1"}, ["fields: trace", "got '1'", "a finite number"]),
        ({"trace": True}, ["fields: trace", "got True", "a finite number"]),
        ({"trace": float("inf")}, ["fields: trace", "got inf", "a finite number"]),
        ({"trace": None}, ["fields: trace", "a finite number"]),
        ({"trace": "paramter"}, ["fields: trace", "did you mean 'parameter'"]),
        ({"status": 1}, ["fields: status", "got 1", "not shaped like the parameters"]),
        ({"status": "parameter"}, ["fields: status", "not shaped like the parameters"]),
        ({"status": "keep"}, ["[0].status", "(2, 4)", "(3, 4)"]),
        ({"trace": 1}, ["[0].status", "pass fields={'status': ...}"]),
        ({"status": NamedAxes("layer width")}, ["[0].status", "(2, 4)", "(2, 3)", "layer width"]),
        ({"status": NamedAxes("layer")}, ["[0].status", "(2, 4)", "'layer'"]),
        ({"status": NamedAxes("layer haed")}, ["'haed'", "did you mean 'head'"]),
    ],
)
def test_declarations_that_do_not_fit_are_refused(fields, words):
    optimizer = optax.chain(_ages())
    state: Any = optimizer.init(PARAMS)
    with pytest.raises(morphs.InputError) as raised:
        _apply([morphs.deepen(to=3)], state, optimizer, fields={"trace": 1} | fields)
    for word in words:
        assert word in str(raised.value)


def test_a_field_is_declared_by_its_place_where_its_name_is_not_enough():
    optimizer = optax.chain(optax.trace(0.9), optax.stateless(lambda u, _: u), optax.trace(0.5))
    state = jax.tree.map(jnp.ones_like, optimizer.init(PARAMS))
    change = [morphs.widen("head", to=8, recipe="even")]
    with pytest.raises(morphs.InputError, match=r"\[2\]\.trace"):
        _apply(change, state, optimizer)
    _, moved, _ = _apply(change, state, optimizer, fields={"[2].trace": 2})
    assert float(moved[0].trace["value"][0, 0, 0]) == 0.5  # by its rule
    assert float(moved[2].trace["value"][0, 0, 0]) == 0.25
    _, moved, _ = _apply(change, state, optimizer, fields={"[2].trace": 2, "trace": 0})
    assert float(moved[0].trace["value"][0, 0, 0]) == 1
    assert float(moved[2].trace["value"][0, 0, 0]) == 0.25


def test_an_array_without_the_axis_that_rows_are_over_is_refused_by_name():
    keep = morphs.keep("head", [[3, 0], [1, 2]], over="layer")
    with pytest.raises(morphs.InputError, match=r"importance.*stacked on 'layer'"):
        _apply([keep], other={"importance": (jnp.ones(4), NamedAxes("head"))})
    with pytest.raises(morphs.InputError, match=r"array over 'head': shape: got \(3,\)"):
        morphs.moved(NamedAxes("head"), jnp.ones(3), [morphs.pad("head", 4, 5)])
