"""Changes applied to models that are not ours: every optimizer, what is refused, what is reported."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from small_models import flat

from jaxmorph import morphs
from jaxmorph.cli.errors import InputError
from jaxmorph.model.signatures import SignatureError

TABLE = {
    "inner/kernel": "pixels -> hidden",
    "inner/bias": "-> hidden",
    "gain": "*> hidden",
    "outer/kernel": "hidden -> classes",
    "outer/bias": "-> classes",
}
SIZES = {"pixels": 5, "hidden": 6, "classes": 3}


def _perceptron(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    P, H, C = sizes["pixels"], sizes["hidden"], sizes["classes"]
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    return {
        "inner": {"kernel": draw(P, H), "bias": draw(H)},
        "gain": draw(H),
        "outer": {"kernel": draw(H, C), "bias": draw(C)},
    }


@jax.jit
def _apply(params, x):
    hidden = jnp.tanh(x @ params["inner"]["kernel"] + params["inner"]["bias"][None])
    return hidden * params["gain"][None] @ params["outer"]["kernel"] + params["outer"]["bias"][None]


@jax.jit
def _loss(params):
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=(9, 5))), jnp.asarray(rng.normal(size=(9, 3)))
    return jnp.mean(jnp.square(_apply(params, x) - y))


_gradient = jax.jit(jax.grad(_loss))
_INPUTS = jnp.asarray(np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32))


def _labels(params):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "vector", params)


# Without epsilons, clipping or decay a state after one update is a function of the gradient alone.
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2, eps=0.0),
    "amsgrad": optax.amsgrad(1e-2, eps=0.0),
    "lamb": optax.lamb(1e-2, eps=0.0),
    "lion": optax.lion(1e-2),
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(1e-2, eps=0.0),
    "rmsprop with momentum": optax.rmsprop(1e-2, eps=0.0, momentum=0.9),
    "adagrad": optax.adagrad(1e-2, initial_accumulator_value=0.0, eps=0.0),
    "adadelta": optax.adadelta(1e-2, eps=1e-60),
    "ademamix": optax.contrib.ademamix(1e-2, eps=0.0),
    "muon": optax.contrib.muon(1e-2, eps=0.0),
    "adafactor": optax.adafactor(
        1e-2, min_dim_size_to_factor=2, momentum=0.9, multiply_by_parameter_scale=False
    ),
    "adafactor, nothing factored": optax.adafactor(1e-2, multiply_by_parameter_scale=False),
    "chain": optax.chain(optax.trace(0.9), optax.scale_by_adam(eps=0.0), optax.trace(0.5)),
    "masked": optax.masked(optax.adam(1e-2, eps=0.0), lambda p: jax.tree.map(lambda q: q.ndim > 1, p)),
    "multi_transform": optax.multi_transform(
        {"matrix": optax.adam(1e-2, eps=0.0), "vector": optax.sgd(1e-2, momentum=0.9)}, _labels
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(
        optax.linear_schedule(1e-2, 1e-3, 10), eps=0.0
    ),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2, eps=0.0), 3),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2, eps=0.0), 3),
    "schedule": optax.adam(lambda step: 1e-2 / (step + 1), eps=0.0),
}  # fmt: skip


def _widen(signatures, params, opt_state, optimizer, **options) -> tuple[Any, Any, morphs.Report]:
    """`apply` of one `widen`, with the options of either."""
    arguments = {name: options.pop(name) for name in ("key", "fields") if name in options}
    change = morphs.widen(options.pop("axis"), **options)
    return morphs.apply([change], signatures, params, opt_state, optimizer, **arguments)


def _deepen(signatures, params, opt_state, optimizer, **options) -> tuple[Any, Any, morphs.Report]:
    return morphs.apply([morphs.deepen(**options)], signatures, params, opt_state, optimizer)


def _after_one_update(optimizer, params) -> Any:
    update = jax.jit(
        lambda params: optimizer.update(_gradient(params), optimizer.init(params), params)
    )
    return update(params)[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moved_state_is_that_of_the_wide_net_s_own_gradients(name):
    """One update, then widening, must leave the state that widening, then one update, leaves."""
    with jax.enable_x64(True):
        optimizer, params = OPTIMIZERS[name], _perceptron()
        state = _after_one_update(optimizer, params)
        wide, moved, report = _widen(
            TABLE, params, state, optimizer, axis="hidden", to=12, recipe="even"
        )
        expected = _after_one_update(optimizer, wide)
        chex.assert_trees_all_equal_shapes_and_dtypes(moved, expected)
        chex.assert_trees_all_close(moved, expected, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(_loss(wide), _loss(params), rtol=1e-12)
        entries = sum(leaf.size for leaf in jax.tree.leaves(moved))
        assert report.totals == {"transported": entries, "fresh": 0, "reset": 0}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [(name, "split") for name in OPTIMIZERS]
    + [("adamw", "fresh"), ("adafactor", "fresh"), ("lion", "noise")],
)
def test_state_is_shaped_as_a_fresh_one_and_goes_on(name, recipe):
    optimizer = OPTIMIZERS[name]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _perceptron())
    state = optimizer.init(params)
    wide, moved, report = _widen(
        TABLE, params, state, optimizer, axis="hidden", to=8, recipe=recipe, key=jax.random.key(0)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, optimizer.init(wide))
    assert sum(report.totals.values()) == sum(leaf.size for leaf in jax.tree.leaves(moved))
    before, after = _apply(params, _INPUTS), _apply(wide, _INPUTS)
    assert np.allclose(before, after, atol=2e-5) == (recipe != "noise")


def test_adafactor_s_second_moments_are_unfactored_moved_and_factored_again():
    with jax.enable_x64(True):
        optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=6)
        sizes = {"pixels": 9, "hidden": 5, "classes": 7}
        table = {"a": "pixels -> hidden", "b": "hidden -> classes", "c": "pixels -> classes"}
        rng = np.random.default_rng(0)
        params = {
            "a": jnp.asarray(rng.normal(size=(9, 5))),  # not factored before, factored after
            "b": jnp.asarray(rng.normal(size=(5, 7))),
            "c": jnp.asarray(rng.normal(size=(9, 7))),  # factored, and untouched
        }
        assert {k: v.shape for k, v in params.items()}["a"] == (sizes["pixels"], sizes["hidden"])
        gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        state: Any = optimizer.update(gradient, optimizer.init(params), params)[1]
        _, moved, _ = _widen(table, params, state, optimizer, axis="hidden", to=11, recipe="even")
        source = np.arange(11) % 5
        share = 1.0 / np.bincount(source)[source]
        a = np.asarray(state.v["a"])[:, source] * share**2
        b = np.asarray(state.v["b"])[source]
        np.testing.assert_allclose(moved.v_row["a"], a.mean(1))  # the longer side is averaged first
        np.testing.assert_allclose(moved.v_col["a"], a.mean(0))
        np.testing.assert_allclose(moved.v_row["b"], b.mean(0))
        np.testing.assert_allclose(moved.v_col["b"], b.mean(1))
        for name in ("v_row", "v_col", "v"):
            np.testing.assert_allclose(getattr(moved, name)["c"], getattr(state, name)["c"])


def test_readme_grows_someone_else_s_model():
    class Net(nn.Module):
        hidden: int

        @nn.compact
        def __call__(self, images):
            x = nn.relu(nn.Conv(self.hidden, (3, 3))(images))
            return nn.Dense(10)(x.mean((1, 2)))

    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    params = Net(hidden=64).init(jax.random.key(1), images)["params"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = optimizer.init(params)

    signatures = {
        "Conv_0/kernel": "height width | channels -> hidden",
        "Conv_0/bias": "-> hidden",
        "Dense_0/kernel": "hidden -> classes",
        "Dense_0/bias": "-> classes",
    }
    params2, opt_state2, report = morphs.apply(
        [morphs.widen("hidden", to=96)],
        signatures, params, opt_state, optimizer, key=jax.random.key(2),
    )  # fmt: skip
    before = Net(hidden=64).apply({"params": params}, images)
    after = Net(hidden=96).apply({"params": params2}, images)
    chex.assert_trees_all_close(after, before, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state2, optimizer.init(params2))
    assert str(report) == "optimizer state: 3,861 transported, 0 fresh, 0 reset entries"
    assert report.totals["transported"] == 2 * (10 * 96 + 97 * 10) + 1


def test_nnx_modules_and_frozen_dicts_are_nested_dicts_too():
    class Net(nnx.Module):
        def __init__(self, hidden, rngs):
            self.layers = nnx.List(
                [nnx.Linear(5, hidden, rngs=rngs), nnx.Linear(hidden, 3, rngs=rngs)]
            )

        def __call__(self, x):
            return self.layers[1](jax.nn.gelu(self.layers[0](x)))

    signatures = {
        "layers/0/kernel": "pixels -> hidden",
        "layers/0/bias": "-> hidden",
        "layers/1/kernel": "hidden -> classes",
        "layers/1/bias": "-> classes",
    }
    net, optimizer = Net(4, nnx.Rngs(0)), optax.adam(1e-3)
    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    for tree in (params, freeze(params)):
        wide, state, _ = _widen(
            signatures, tree, optimizer.init(tree), optimizer, axis="hidden", to=7, key=jax.random.key(0)
        )  # fmt: skip
        chex.assert_trees_all_equal_shapes_and_dtypes(state, optimizer.init(wide))
        graph, blank = nnx.split(nnx.eval_shape(lambda: Net(7, nnx.Rngs(0))))
        nnx.replace_by_pure_dict(blank, dict(wide))
        np.testing.assert_allclose(nnx.merge(graph, blank)(_INPUTS), net(_INPUTS), atol=1e-5)


def test_apply_is_jittable_and_moves_several_axes_at_once():
    with jax.enable_x64(True):
        params, optimizer = _perceptron(), optax.adam(1e-2)
        state = _after_one_update(optimizer, params)
        both = [morphs.duplicate("hidden", 6, 15), morphs.duplicate("pixels", 5, 10)]

        @jax.jit
        @chex.assert_max_traces(n=1)
        def moved(params, state) -> Any:
            return morphs.apply(both, TABLE, params, state, optimizer)

        found = moved(params, state)
        expected: Any = params, state, None
        for change in both:
            expected = morphs.apply([change], TABLE, expected[0], expected[1], optimizer)
        chex.assert_trees_all_close(found[:2], expected[:2], rtol=1e-12)
        assert found[2].totals == expected[2].totals
        assert moved(params, state)[2] == found[2]


def test_weights_kept_in_the_state_move_as_weights():
    params = _perceptron()
    optimizer = optax.contrib.schedule_free_sgd(1e-2)
    state = _after_one_update(optimizer, params)
    _, moved, _ = _widen(
        TABLE, params, state, optimizer, axis="hidden", to=9, key=jax.random.key(0)
    )
    np.testing.assert_allclose(_apply(moved.z, _INPUTS), _apply(state.z, _INPUTS), atol=1e-5)


def test_fresh_moments_are_means_of_their_layer():
    table = {"up": "layer | width -> hidden", "down": "layer | hidden +> width"}
    rng = np.random.default_rng(0)
    shapes = {"up": (2, 3, 4), "down": (2, 4, 3)}
    params, squares = (
        {path: jnp.asarray(rng.random(shape), jnp.float32) for path, shape in shapes.items()}
        for _ in range(2)
    )
    state: Any = optax.ScaleByAdamState(jnp.asarray(7, jnp.int32), params, squares)
    optimizer, key = optax.scale_by_adam(), jax.random.key(0)
    _, moved, report = _widen(
        table, params, state, optimizer, axis="hidden", to=6, recipe="fresh", key=key, fresh_nu=0.5
    )
    for path, at in (("up", 2), ("down", 1)):
        old, new = np.asarray(squares[path]), np.asarray(moved.nu[path])
        np.testing.assert_array_equal(np.take(new, range(4), at), old)
        mean = np.broadcast_to(
            0.5 * old.mean((1, 2), keepdims=True), np.take(new, [4, 5], at).shape
        )
        np.testing.assert_allclose(np.take(new, [4, 5], at), mean, rtol=1e-6)
        np.testing.assert_array_equal(np.take(moved.mu[path], [4, 5], at), 0)
    assert moved.count == 7
    assert report.totals == {"transported": 2 * 2 * 24 + 1, "fresh": 2 * 2 * 12, "reset": 0}
    assert morphs.Line(".nu['up']", "nu", "fresh", 12) in report.lines
    assert morphs.Line("down", "params", "fresh", 12) in report.lines

    fresh = {path: jnp.full((4, *shape[1:]), 10.0) for path, shape in shapes.items()}
    deep, moved, _ = _deepen(table, params, state, optimizer, to=4, fresh=fresh, identity=True)
    for path in table:
        old = np.asarray(squares[path])
        np.testing.assert_allclose(moved.nu[path][2:], old.mean(), rtol=1e-6)
        np.testing.assert_array_equal(deep[path][2:], 10 if path == "up" else 0)
    _, moved, _ = _deepen(table, params, state, optimizer, to=4, identity=True)
    np.testing.assert_array_equal(moved.nu["up"][2:], squares["up"])
    mean = np.asarray(squares["down"]).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(moved.nu["down"][2:], np.broadcast_to(mean, (2, 4, 3)), rtol=1e-6)


def test_moments_can_be_fresh_or_restarted():
    params, optimizer = _perceptron(), optax.adam(1e-2)
    state = _after_one_update(optimizer, params)

    def widened(**options):
        _, moved, report = _widen(
            TABLE, params, state, optimizer, axis="hidden", to=8, recipe="even", **options
        )
        return moved, report

    (kept, _), (fresh, report) = widened(), widened(moments="fresh")
    mu, old = fresh[0].mu["outer"]["kernel"], state[0].mu["outer"]["kernel"]
    np.testing.assert_array_equal(mu[:6], old)
    np.testing.assert_array_equal(mu[6:], 0)
    np.testing.assert_array_equal(kept[0].mu["outer"]["kernel"][6:], old[:2])
    mean = np.asarray(state[0].nu["outer"]["kernel"]).mean()
    np.testing.assert_allclose(fresh[0].nu["outer"]["kernel"][6:], mean, rtol=1e-6)
    assert report.totals["fresh"] == 2 * (2 * 5 + 2 + 2 + 2 * 3)
    restarted, report = widened(moments="restart")
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(restarted))
    assert report.totals == {"transported": 0, "fresh": 0, "reset": 2 * (8 * 10 + 3) + 1}
    with pytest.raises(InputError, match="did you mean 'provenance'"):
        widened(moments="provenence")


def _with_state(make):
    def update(updates, state, params=None):
        return updates, state

    return optax.GradientTransformation(make, update)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (optax.novograd(1e-2), ["scale_by_novograd", "one second moment per array", "fields={"]),
        (optax.sm3(1e-2), ["scale_by_sm3", "keeps bounds", "fields={"]),
        (optax.contrib.prodigy(1e-2), [".exp_avg", "'exp_avg'", "gain", "fields={"]),
        (optax.contrib.mechanize(optax.sgd(1e-2)), [".r", "fields={"]),
        (_with_state(lambda p: {"mine": p}), ["['mine']['gain']", "rule"]),
    ],
    ids=["novograd", "sm3", "prodigy", "mechanic", "unnamed"],
)
def test_unaccounted_state_is_refused_by_name(optimizer, words):
    params = _perceptron()
    state = optimizer.init(params)
    with pytest.raises(InputError) as error:
        _widen(TABLE, params, state, optimizer, axis="hidden", to=12, recipe="even")
    for word in words:
        assert word in str(error.value)
    _, restarted, _ = _widen(
        TABLE, params, state, optimizer, axis="hidden", to=12, recipe="even", moments="restart"
    )
    assert jax.tree.structure(restarted) == jax.tree.structure(state)


def test_a_user_s_own_fields_are_declared():
    params, optimizer = _perceptron(), optax.chain(optax.scale_by_adam(), optax.ema(0.5))
    state: Any = optimizer.init(params)
    ones = jax.tree.map(jnp.ones_like, state[1].ema)
    state = (state[0], state[1]._replace(ema=ones))
    found = {}
    for power in (0, 1, 2, "parameter"):
        _, moved, _ = _widen(
            TABLE, params, state, optimizer, axis="hidden", to=12, recipe="even", fields={"ema": power}
        )  # fmt: skip
        ema = moved[1].ema
        found[power] = float(ema["gain"][0]), float(ema["outer"]["kernel"][0, 0])
    assert found == {0: (1, 1), 1: (0.5, 1), 2: (0.25, 1), "parameter": (1, 0.5)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"axis": "hiden"}, InputError, ["'hiden'", "did you mean 'hidden'"]),
        ({"to": 6}, InputError, ["hidden", "more than its size now, 6"]),
        ({"recipe": "spilt"}, InputError, ["recipe", "did you mean 'split'"]),
        ({"key": None}, InputError, ["key", "random"]),
        ({"key": None, "recipe": "fresh"}, InputError, ["key", "random"]),
        ({"signatures": {k: TABLE[k] for k in list(TABLE)[1:]}}, SignatureError, ["inner/kernel"]),
        ({"signatures": TABLE | {"more": "-> hidden"}}, SignatureError, ["more"]),
        ({"params": [jnp.ones(2)]}, InputError, ["list", "nested dicts"]),
        ({"opt_state": optax.sgd(1e-2, momentum=0.9).init(_perceptron())}, InputError, ["opt_state"]),
        ({"recipe": "fresh", "fresh": _perceptron()}, InputError, ["fresh: gain", "(8,)"]),
    ],
    ids=["axis", "to", "recipe", "key", "fresh key", "uncovered", "unused", "list", "state", "fresh"],
)  # fmt: skip
def test_wrong_calls_say_what_is_wrong(change, error, words):
    params, optimizer = _perceptron(), optax.adam(1e-2)
    call = {
        "signatures": TABLE,
        "params": params,
        "opt_state": optimizer.init(params),
        "optimizer": optimizer,
        "axis": "hidden",
        "to": 8,
        "key": jax.random.key(0),
    }
    with pytest.raises(error) as raised:
        _widen(**call | change)
    for word in words:
        assert word in str(raised.value)


def test_maps_must_fit_the_parameters():
    params, optimizer = _perceptron(), optax.sgd(1e-2)
    state = optimizer.init(params)
    wide = morphs.duplicate("hidden", 7, 14)
    with pytest.raises(InputError, match="the parameters' own, 6"):
        morphs.apply([wide], TABLE, params, state, optimizer)
    twice = [morphs.duplicate("hidden", 6, 12)] * 2
    with pytest.raises(InputError, match="one map per axis"):
        morphs.apply(twice, TABLE, params, state, optimizer)


def test_unmapped_parameters_are_untouched():
    params, optimizer = _perceptron(), optax.adam(1e-2)
    state = _after_one_update(optimizer, params)
    same, kept, _ = morphs.apply([], TABLE, params, state, optimizer)
    chex.assert_trees_all_equal((same, kept), (params, state))
    wide, _, _ = _widen(TABLE, params, state, optimizer, axis="hidden", to=7, key=jax.random.key(0))
    assert set(flat(wide)) == set(TABLE)
    np.testing.assert_array_equal(wide["outer"]["bias"], params["outer"]["bias"])
