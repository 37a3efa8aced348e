"""Other context lengths: the function at the positions both have, the moments, what is refused."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growing import grown_config, logits_of, morphed, setting_up, updates_after
from small_models import flat, small_tokens

from jaxmorph.cli.errors import InputError
from jaxmorph.model import gpt
from jaxmorph.step.state import gates_of

pytestmark = pytest.mark.usefixtures("quick_random_bits")
KEY = jax.random.key(0, impl="rbg")
TABLE = "embed/positions"


def _settled(config, optimizer: str) -> tuple[Any, Any]:
    """An optimizer and a state with moments that differ from row to row."""
    rule, state = setting_up(config, optimizer=optimizer)
    rng = np.random.default_rng(0)
    moments = jax.tree.map(
        lambda x: jnp.asarray(rng.random(x.shape), x.dtype) if x.ndim else x + 50, state.opt_state
    )
    return rule, dataclasses.replace(state, opt_state=moments)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_shorter_context_keeps_the_first_positions(optimizer):
    with jax.enable_x64(True):
        config = grown_config(seq_len=24)
        rule, state = _settled(config, optimizer)
        short, cut, report = morphed("change_seq_len", config, state, rule, KEY, seq_len=12)
        np.testing.assert_array_equal(logits_of(short, cut), logits_of(config, state))
        np.testing.assert_array_equal(flat(cut.params)[TABLE], flat(state.params)[TABLE][:12])
        fresh = jax.eval_shape(lambda: gpt.init(short, jax.random.key(0)))
        chex.assert_trees_all_equal_shapes_and_dtypes(cut.params, fresh)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            cut.opt_state, jax.eval_shape(rule.init, fresh)
        )
        if optimizer == "adamw":
            old, new = (jax.tree_util.tree_leaves_with_path(s.opt_state) for s in (state, cut))
            for (path, before), (_, after) in zip(old, new, strict=True):
                rows = before[:12] if "positions" in jax.tree_util.keystr(path) else before
                np.testing.assert_array_equal(after, rows)
        leaves = jax.tree.leaves(cut.opt_state)
        assert report.totals["transported"] == sum(leaf.size for leaf in leaves)
        _, updates = updates_after(short, rule, cut, 1)
        assert all(np.isfinite(update).all() for update in updates[0].values())
        _, same, _ = morphed("set_seq_len", config, state, rule, KEY, seq_len=12)
        chex.assert_trees_all_equal(same, cut)


@pytest.mark.parametrize("seq_len", [6, 36])
def test_with_rotary_positions_no_array_changes(seq_len):
    config = grown_config(dtype="float32", positions="rotary")
    rule, state = _settled(config, "adamw")
    for name in ("set_seq_len", "change_seq_len"):
        after, same, report = morphed(name, config, state, rule, KEY, seq_len=seq_len)
        chex.assert_trees_all_equal(same, state)
        assert report.totals["fresh"] == report.totals["reset"] == 0
    if seq_len > config.seq_len:
        tokens = jnp.asarray(small_tokens(1, seq_len))
        found = gpt.forward(after, same.params, tokens, gates=gates_of(same.variables)).logits
        np.testing.assert_allclose(
            found[:, :12],
            gpt.forward(
                config, state.params, tokens[:, :12], gates=gates_of(state.variables)
            ).logits,
            atol=1e-5,
        )


def test_more_than_the_learned_positions_is_refused():
    config = grown_config(dtype="float32")
    optimizer, state = setting_up(config)
    with pytest.raises(InputError, match="at most its size now, 12"):
        morphed("set_seq_len", config, state, optimizer, KEY, seq_len=13)
