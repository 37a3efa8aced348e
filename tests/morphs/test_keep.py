"""Entries that stay: of a whole axis, and other heads in every layer, against deletion in NumPy."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from growing import function_delta, grown_config, logits_of, setting_up, with_gradient_moments
from small_models import VARIANTS, flat, reference_logits, small_tokens

from jaxmorph import morphs
from jaxmorph.model.architecture import gpt_signatures

apply: Any = morphs.apply  # its results' types depend on the optimizer
pytestmark = pytest.mark.usefixtures("quick_random_bits")
HEADS = [[0, 1, 2], [0, 2, 3]]
CLOSED = {(0, 3), (1, 1)}
TWICE = [0, 0, 1, 1]  # the layers where each is there twice
ADAPTED = {"attn_lora_rank": 3, "lora_base": "trained"}


def _kept(config, leaves, layers: list[int]) -> dict[str, np.ndarray]:
    """Leaves with these layers, each with the heads that HEADS leaves the one it was."""
    found = {}
    for path, signature in gpt_signatures(config).items():
        leaf = leaves[path]
        if signature.stacked:
            rows = [leaf[layer] for layer in layers]
            if "head" in signature.axes:
                at = signature.axes.index("head") - 1
                rows = [np.take(r, HEADS[o], at) for r, o in zip(rows, layers, strict=True)]
            leaf = np.stack(rows)
        found[path] = leaf
    return found


@pytest.mark.parametrize("variant", [*VARIANTS, "adapted"])
@pytest.mark.parametrize("layers", [[0, 1], TWICE], ids=["heads", "heads and layers"])
def test_heads_of_each_layer_s_own_leave_as_numpy_deletes_them(variant, layers):
    with jax.enable_x64(True):
        config = grown_config(**(ADAPTED if variant == "adapted" else VARIANTS[variant]))
        _, state = setting_up(config)
        state = _with_open_gates(state, config)
        adam, state = with_gradient_moments(config, state)
        changes: list = [morphs.keep("head", HEADS, over="layer")]
        if layers == TWICE:
            changes.append(morphs.deepen(to=4, order="interleave"))
        params, moments, report = _apply(changes, config, state, adam)
        for old, new in (
            (state.params, params),
            (state.opt_state.mu, moments.mu),
            (state.opt_state.nu, moments.nu),
        ):
            expected = _kept(config, flat(old), layers)
            assert expected["blocks/attention/query"].shape[2] == 3
            for path, leaf in flat(new).items():
                np.testing.assert_allclose(leaf, expected[path], rtol=1e-12, atol=0)
        assert report.totals["fresh"] == report.totals["reset"] == 0
        chex.assert_trees_all_equal_shapes_and_dtypes(moments, adam.init(params))
        if variant == "adapted":
            return  # the reference knows no adapters
        small = dataclasses.replace(config, n_heads=3, n_layers=len(layers))
        found = logits_of(small, _with_open_gates(dataclasses.replace(state, params=params), small))
        whole = jax.device_get(state.params)
        whole["blocks"] = jax.tree.map(lambda leaf: leaf[layers], whole["blocks"])
        deep = dataclasses.replace(config, n_layers=len(layers))
        without = {(n, h) for n, layer in enumerate(layers) for o, h in CLOSED if o == layer}
        tokens = small_tokens(2, 12)
        np.testing.assert_allclose(
            found, reference_logits(deep, whole, tokens, without), rtol=1e-12, atol=1e-12
        )
        assert function_delta(reference_logits(deep, whole, tokens), found) > 1e-3


def _with_open_gates(state: Any, config) -> Any:
    """The state with gates of one, as the reference has none."""
    heads = jnp.ones((config.n_layers, config.n_heads))
    return state.with_variables(layer_gate=heads[:, 0], head_gate=heads, lora_alpha=jnp.ones(()))


def _apply(changes, config, state, optimizer, **arguments) -> tuple[Any, Any, morphs.Report]:
    signatures = gpt_signatures(config)
    return apply(changes, signatures, state.params, state.opt_state, optimizer, **arguments)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adafactor(1e-2, min_dim_size_to_factor=2), optax.contrib.muon(1e-2)],
    ids=["adafactor", "muon"],
)
def test_state_of_other_optimizers_is_shaped_as_a_fresh_one(optimizer):
    config = grown_config(dtype="float32")
    _, state = setting_up(config)
    state = dataclasses.replace(state, opt_state=optimizer.init(state.params))
    params, moved, _ = _apply([morphs.keep("head", HEADS, over="layer")], config, state, optimizer)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, optimizer.init(params))


def test_a_flat_list_keeps_the_same_entries_everywhere_in_its_order():
    rng = np.random.default_rng(0)
    table = {"up": "layer | width -> hidden", "down": "layer | hidden +> width"}
    params = {"up": rng.normal(size=(2, 3, 5)), "down": rng.normal(size=(2, 5, 3))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = optax.sgd(1.0, momentum=0.9).init(params)
    change = morphs.keep("hidden", np.asarray([4, 0, 2]))
    found, _, _ = apply([change], table, params, state, optax.sgd(1.0, momentum=0.9))
    np.testing.assert_array_equal(found["up"], np.asarray(params["up"])[:, :, [4, 0, 2]])
    np.testing.assert_array_equal(found["down"], np.asarray(params["down"])[:, [4, 0, 2]])


def test_rows_follow_their_layers_wherever_those_stand():
    """The axis with rows may stand before the one that they are over; a new layer needs no row."""
    rng = np.random.default_rng(0)
    table = {"a": "expert layer | width -> width2", "b": "layer expert | +> width"}
    params = {"a": rng.normal(size=(3, 2, 4, 5)), "b": rng.normal(size=(2, 3, 4))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    fresh = {"a": jnp.full((2, 3, 4, 5), 7.0), "b": jnp.full((3, 2, 4), 7.0)}
    rows = [[2, 0], [0, 1]]
    changes = [morphs.keep("expert", rows, over="layer"), morphs.deepen(to=3, fresh=fresh)]
    adam: Any = optax.scale_by_adam()
    squares = jax.tree.map(jnp.square, params)
    state = adam.init(params)._replace(nu=squares)
    found, moved, _ = apply(changes, table, params, state, adam)
    for old, new, begun in (
        (params, found, {"a": 7.0, "b": 7.0}),
        (squares, moved.nu, {path: np.mean(leaf) for path, leaf in squares.items()}),
    ):
        a, b = np.asarray(old["a"]), np.asarray(old["b"])
        for layer, row in enumerate(rows):
            np.testing.assert_array_equal(new["a"][:, layer], a[row, layer])
            np.testing.assert_array_equal(new["b"][layer], b[layer, row])
        np.testing.assert_allclose(new["a"][:, 2], np.full((2, 4, 5), begun["a"]), rtol=1e-6)
        np.testing.assert_allclose(new["b"][2], np.full((2, 4), begun["b"]), rtol=1e-6)


def test_moments_of_entries_with_rows_follow_shares_and_layers():
    """A map by rows may copy, too: what it shares out differs from layer to layer."""
    source = np.asarray([[0, 1, 0], [0, 1, 1]])
    share = np.asarray([[0.25, 1.0, 0.75], [1.0, 0.5, 0.5]])
    change = morphs.AxisMap("hidden", 2, source, share, over="layer")
    assert change.is_copy.tolist() == [[False, False, True], [False, False, True]]
    table = {"up": "layer | -> hidden", "down": "layer | hidden +> width"}
    rng = np.random.default_rng(0)
    shapes = {"up": (2, 2), "down": (2, 2, 3)}
    params, mu, nu = (
        {p: jnp.asarray(rng.random(s), jnp.float32) for p, s in shapes.items()} for _ in range(3)
    )
    adam: Any = optax.scale_by_adam()
    state = adam.init(params)._replace(mu=mu, nu=nu)
    found, moved, _ = apply([change], table, params, state, adam)
    for layer in range(2):
        at, part = source[layer], share[layer]
        up = [(found, params, 1), (moved.mu, mu, part), (moved.nu, nu, part**2)]
        down = [(found, params, part[:, None]), (moved.mu, mu, 1), (moved.nu, nu, 1)]
        for path, cases in (("up", up), ("down", down)):
            for new, old, factor in cases:
                expected = np.asarray(old[path])[layer][at] * factor
                np.testing.assert_allclose(new[path][layer], expected, rtol=1e-6)


def test_a_fresh_layer_is_whole_whatever_the_rows_of_the_old_ones_say():
    """A fresh head in layer 0 gives nothing there yet; those of a fresh layer are as it says."""
    source, share = np.asarray([[0, morphs.FRESH], [1, 0]]), np.asarray([[0.5, 1], [0.5, 0.5]])
    change = morphs.AxisMap("head", 2, source, share, over="layer")
    table = {"value": "layer | -> head", "out": "layer | head +> width"}
    params = {"value": jnp.ones((2, 2)), "out": jnp.ones((2, 2, 1))}
    fresh = {"value": jnp.full((3, 2), 7.0), "out": jnp.full((3, 2, 1), 7.0)}
    adam: Any = optax.scale_by_adam()
    state = adam.init(params)._replace(nu=jax.tree.map(lambda leaf: 4 * leaf, params))
    changes = [change, morphs.deepen(to=3, fresh=fresh)]
    found, moved, _ = apply(changes, table, params, state, adam)
    np.testing.assert_array_equal(found["value"], [[1, 7], [1, 1], [7, 7]])
    np.testing.assert_array_equal(found["out"][..., 0], [[0.5, 0], [0.5, 0.5], [7, 7]])
    np.testing.assert_array_equal(moved.nu["value"], [[1, 4], [1, 1], [4, 4]])
    np.testing.assert_array_equal(moved.nu["out"][..., 0], np.full((3, 2), 4))


TABLE = {"gain": "*> head", "value": "layer | width -> head", "out": "layer | head +> width"}
STACKED = {path: TABLE[path] for path in ("value", "out")}


@pytest.mark.parametrize(
    ("table", "changes", "words"),
    [
        (TABLE, [morphs.keep("head", HEADS, over="layer")], ["gain", "stacked on 'layer'"]),
        (STACKED, [morphs.keep("head", [[0], [1, 2]], over="layer")], ["head", "as many for each"]),
        (STACKED, [morphs.keep("head", [[0]], over="layer")], ["head: rows: got 1", "'layer', 2"]),
        (STACKED, [morphs.keep("head", [0, 4])], ["from 0 to 3"]),
        (STACKED, [morphs.keep("head", [1, 1])], ["each once"]),
        (STACKED, [morphs.keep("head", [-1])], ["from 0 to 3"]),
        (STACKED, [morphs.keep("head", [0, 1], over="layer")], ["a list for each entry"]),
        (STACKED, [morphs.keep("head", HEADS)], ["flat list"]),
        (STACKED, [morphs.keep("haed", [0])], ["did you mean 'head'"]),
        (STACKED, [morphs.keep("head", HEADS, over="layr")], ["did you mean 'layer'"]),
    ],
)
def test_what_cannot_be_kept_is_refused(table, changes, words):
    params = {"value": jnp.ones((2, 3, 4)), "out": jnp.ones((2, 4, 3)), "gain": jnp.ones(4)}
    params = {path: params[path] for path in table}
    with pytest.raises(morphs.InputError) as raised:
        apply(changes, table, params, optax.EmptyState(), optax.identity())
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": [[0, 4]], "share": [[1, 1]], "over": "layer"}, ["source", "from 0 to 3"]),
        ({"source": [0, 1], "share": [1, 1], "over": "layer"}, ["[size of layer, new]"]),
        ({"source": [0, 1], "share": [1, 1, 1]}, ["one shape"]),
        ({"source": [[0]], "share": [[1]], "over": "layer", "spread": 0.5}, ["spread", "'layer'"]),
        ({"source": [[0]], "share": [[1]], "over": "layer", "noise": 0.5}, ["noise", "'layer'"]),
    ],
)
def test_maps_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(morphs.InputError) as raised:
        morphs.AxisMap("head", 4, **changes)
    for word in words:
        assert word in str(raised.value)
