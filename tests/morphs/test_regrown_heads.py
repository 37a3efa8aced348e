"""Heads that open again: the function, weights, moments under every optimizer, first steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growing import function_delta, grown_config, logits_of, rms, setting_up, updates_after
from small_models import flat

from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.morphs.gpt import MORPHS, Transition
from jaxmorph.step.state import TrainState

pytestmark = pytest.mark.usefixtures("quick_random_bits")
KEY = jax.random.key(0, impl="rbg")
# Of 2 layers × 4 heads: layer 0 has two open heads, layer 1 none.
CLOSED = np.asarray([[0, 1, 0, 1], [1, 1, 1, 1]], bool)
CHOSEN = np.asarray([[0, 1, 0, 0], [0, 0, 1, 1]], bool)
ADAPTED = {"attn_lora_rank": 3, "vocab_lora_rank": 5, "lora_base": "trained"}
FIRST = {"mu", "trace"}  # fields that hold first moments


def _with_closed_heads(config: Any, optimizer: str, seed: int = 0) -> tuple[Any, TrainState]:
    """An optimizer and a state whose moments are random, and zero for closed heads."""
    made, state = setting_up(config, optimizer=optimizer)
    gates = np.where(CLOSED, 0, np.asarray(state["head_gate"]))
    status = np.where(CLOSED, -1, 7).astype(np.int32)
    rng = np.random.default_rng(seed)
    signatures = gpt_signatures(config)

    def one(path: tuple, leaf: Any) -> Any:
        if not leaf.ndim:
            return leaf
        random = 0.5 + rng.random(leaf.shape)
        name = "/".join(str(key.key) for key in path if hasattr(key, "key"))
        axes = next((s.axes for p, s in signatures.items() if name.endswith(p)), ())
        if {"layer", "head"} <= set(axes) and leaf.ndim == len(axes):
            random[_of(CLOSED, axes)] = 0
        return jnp.asarray(random, leaf.dtype)

    moments = jax.tree_util.tree_map_with_path(one, state.opt_state)
    state = dataclasses.replace(state, opt_state=moments)
    return made, state.with_variables(
        head_gate=jnp.asarray(gates, state["head_gate"].dtype), head_status=jnp.asarray(status)
    )


def _of(heads: np.ndarray, axes: tuple[str, ...]) -> Any:
    """The index, in an array with these axes, of what belongs to heads."""
    shape = [1] * len(axes)
    shape[axes.index("layer")], shape[axes.index("head")] = heads.shape
    layer, head = np.nonzero(heads)
    index: list[Any] = [slice(None)] * len(axes)
    index[axes.index("layer")], index[axes.index("head")] = layer, head
    return tuple(index)


def _regrown(config: Any, state: TrainState, optimizer: Any, **options: Any) -> TrainState:
    transition = Transition(config, config, state, optimizer, KEY, heads=jnp.asarray(CHOSEN))
    return jax.jit(lambda: MORPHS["regrow_heads"](transition, **options)[0])()


@pytest.mark.parametrize("base", ["trained", "frozen"])
def test_fresh_weights_keep_the_function_and_all_other_heads(base):
    with jax.enable_x64(True):
        config = grown_config(**ADAPTED | {"lora_base": base})
        optimizer, state = _with_closed_heads(config, "adamw")
        after = _regrown(config, state, optimizer)
        assert function_delta(logits_of(config, state), logits_of(config, after)) < 1e-12
        before, now = flat(state.params), flat(after.params)
        drawn = 0
        for path, signature in gpt_signatures(config).items():
            if not {"layer", "head"} <= set(signature.axes):
                np.testing.assert_array_equal(now[path], before[path], path)
                continue
            new, others = _of(CHOSEN, signature.axes), _of(~CHOSEN, signature.axes)
            np.testing.assert_array_equal(now[path][others], before[path][others], path)
            is_zero = "head" in signature.consumed or path.endswith(("_lora_b", "_bias"))
            assert (now[path][new] == 0).all() == is_zero, path
            drawn += not is_zero and 0.5 < rms(now[path][new]) / config.init_std < 2
        assert drawn == 3  # query, key and value
        for name, value in {"head_gate": 1, "head_status": -1, "head_logit": 3}.items():
            expected = np.where(CHOSEN, value, np.asarray(state[name]))
            np.testing.assert_array_equal(after[name], expected)


def test_kept_weights_stay_and_change_the_function():
    with jax.enable_x64(True):
        config = grown_config()
        optimizer, state = _with_closed_heads(config, "adamw")
        after = _regrown(config, state, optimizer, weights="kept")
        jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
        assert function_delta(logits_of(config, state), logits_of(config, after)) > 1e-3
        fresh = _regrown(config, state, optimizer)
        jax.tree.map(np.testing.assert_array_equal, after.opt_state, fresh.opt_state)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd", "muon", "adafactor"])
def test_moments_of_heads_that_open_begin_at_zero_and_at_the_mean_of_open_heads(optimizer):
    config = grown_config(dtype="float32", **ADAPTED)
    made, state = _with_closed_heads(config, optimizer)
    after = leaves_by_path(_regrown(config, state, made).opt_state)
    signatures, seen = gpt_signatures(config), set()
    for path, leaf in leaves_by_path(state.opt_state).items():
        old, new = np.asarray(leaf), np.asarray(after[path])
        parameter = next((p for p in signatures if path.endswith(p)), "")
        axes = signatures[parameter].axes if parameter else ()
        if old.ndim != len(axes) or not {"layer", "head"} <= set(axes):
            np.testing.assert_array_equal(new, old, path)
            continue
        field = path.removesuffix(f"/{parameter}").rsplit("/")[-1]
        of_layer = np.moveaxis(old, axes.index("head"), 1)
        in_layer_0 = of_layer[0][~CLOSED[0]].mean()
        expected = old.copy()
        # No head of layer 1 is open: the open heads of the other layers stand in.
        expected[_of(CHOSEN, axes)] = 0 if field in FIRST else in_layer_0
        np.testing.assert_allclose(new, expected, rtol=1e-5, err_msg=path)
        seen.add(field)
    assert seen == {
        "adamw": {"mu", "nu"}, "lion": {"mu"}, "sgd": {"trace"}, "muon": {"mu", "nu"},
        "adafactor": {"v"},
    }[optimizer]  # fmt: skip


def test_factored_second_moments_of_heads_that_open_are_those_of_open_heads():
    sizes = {"d_model": 128, "head_dim": 128, "n_heads": 4, "d_ff": 8, "seq_len": 4}
    config = grown_config(dtype="float32", **sizes)
    made, state = _with_closed_heads(config, "adafactor")
    after = leaves_by_path(_regrown(config, state, made).opt_state)
    before = leaves_by_path(state.opt_state)
    checked = 0
    for path in before:
        if "v_row" not in path or not path.endswith("attention/value"):
            continue
        row, col = ((np.asarray(x[path]), np.asarray(x[path.replace("v_row", "v_col")]))
                    for x in (before, after))  # fmt: skip
        (old_row, old_col), (new_row, new_col) = row, col
        assert old_row.shape == (2, 128, 4)
        assert old_col.shape == (2, 4, 128)
        old, new = (r.mean(1) * c.mean(2) / r.mean(1)
                    for r, c in ((old_row, old_col), (new_row, new_col)))  # fmt: skip
        np.testing.assert_array_equal(new[~CHOSEN], old[~CHOSEN])
        mean = old[0][~CLOSED[0]].mean()
        np.testing.assert_allclose(new[CHOSEN], mean, rtol=0.02)
        checked += 1
    assert checked == 1


def test_first_steps_of_heads_that_open_are_as_large_as_their_neighbours():
    with jax.enable_x64(True):
        config = grown_config()
        optimizer, state = setting_up(config, optimizer="adamw")
        gates = np.where([[0, 1, 0, 0], [0, 0, 1, 0]], 0.0, 1.0)
        state = state.with_variables(head_gate=jnp.asarray(gates))
        state, _ = updates_after(config, optimizer, state, 30)
        chosen = jnp.asarray(gates == 0)
        transition = Transition(config, config, state, optimizer, KEY, heads=chosen)
        after, _ = MORPHS["regrow_heads"](transition)
        _, updates = updates_after(config, optimizer, after, 20)
    axes = gpt_signatures(config)["blocks/attention/out"].axes
    new, others = _of(gates == 0, axes), _of(gates == 1, axes)
    ratios = [rms(u["blocks/attention/out"][new]) / rms(u["blocks/attention/out"][others])
              for u in updates]  # fmt: skip
    assert max(ratios) < 2.5
    assert ratios[-1] > 0.3
