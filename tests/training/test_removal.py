"""Closed heads leave the arrays: what stays, against deletion in NumPy, and whole runs that do it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growing import function_delta, grown_config, logits_of, setting_up
from small_models import VARIANTS, reference_logits, shape_of, small_config, small_tokens
from tiny_runs import train_until_killed, write_text

from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.resolve import resolve
from jaxmorph.growth.decisions import kept_heads
from jaxmorph.growth.plan import make_plan
from jaxmorph.model import gpt
from jaxmorph.model.architecture import flops_per_token, gpt_signatures, parameter_count
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.morphs.gpt import MORPHS, Transition
from jaxmorph.step.sharding import make_mesh, place_batch
from jaxmorph.train import main
from jaxmorph.training.operate import decide
from jaxmorph.training.stages import StageCompiler
from jaxmorph.training.tables import Tables

CLOSED = {(0, 0), (0, 2), (1, 1)}  # of two layers of 4 heads
KEPT = [[0, 1, 3], [0, 2, 3]]  # the largest number open in a layer is 3
ADAPTED = {"attn_lora_rank": 3, "lora_base": "trained"}


@pytest.mark.usefixtures("quick_random_bits")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", ["gpt2", "llama", "adapted"])
def test_closed_heads_leave_without_a_trace(variant, dtype):
    with jax.enable_x64(dtype == "float64"):
        changes = ADAPTED if variant == "adapted" else VARIANTS[variant]
        config = grown_config(**{**changes, "dtype": dtype, "n_heads": 4, "head_dim": 4})
        optimizer, state = setting_up(config)
        gates = np.ones((2, 4), dtype)
        gates[tuple(np.transpose(list(CLOSED)))] = 0
        state = state.with_variables(
            head_gate=jnp.asarray(gates), layer_gate=jnp.ones(2, dtype),
            head_status=jnp.asarray(np.where(gates == 0, -1, np.arange(8).reshape(2, 4)), "int32"),
        )  # fmt: skip
        rng = np.random.default_rng(0)
        moments = jax.tree.map(
            lambda leaf: jnp.asarray(rng.random(leaf.shape), leaf.dtype), state.opt_state
        )
        state = dataclasses.replace(state, opt_state=moments)
        variables = {"head_gate": gates.tolist()}
        kept = kept_heads(variables, shape_of(config), MeshShape())
        assert [list(row) for row in kept] == KEPT
        small = dataclasses.replace(config, n_heads=3)
        transition = Transition(config, small, state, optimizer, jax.random.key(0), value=KEPT)
        after, report = MORPHS["remove_heads"](transition)
        assert small.n_heads * small.head_dim != small.d_model
        bound = 1e-10 if dtype == "float64" else 1e-5
        assert function_delta(logits_of(config, state), logits_of(small, after)) < bound
        if variant != "adapted":  # the reference knows no adapters
            tokens = small_tokens(2, 12)
            expected = reference_logits(config, jax.device_get(state.params), tokens, CLOSED)
            assert function_delta(expected, logits_of(small, after)) < bound
        assert report.totals["fresh"] == report.totals["reset"] == 0
        _check_rows(config, state, after)
        for name in ("head_gate", "head_status"):
            expected = np.take_along_axis(np.asarray(state[name]), np.asarray(KEPT), 1)
            np.testing.assert_array_equal(after[name], expected)
        assert parameter_count(small) == sum(leaf.size for leaf in jax.tree.leaves(after.params))


def _check_rows(config, before, after):
    """Every weight and moment of the heads that stay is the one it was, bit by bit."""
    signatures, of_heads = gpt_signatures(config), 0
    new = leaves_by_path((after.params, after.opt_state))
    for path, leaf in leaves_by_path((before.params, before.opt_state)).items():
        leaf = np.asarray(leaf)
        signature = next((s for name, s in signatures.items() if path.endswith(f"/{name}")), None)
        if signature is not None and "head" in signature.axes and leaf.ndim > 1:
            at = signature.axes.index("head") - 1
            leaf = np.stack([np.take(r, k, at) for r, k in zip(leaf, KEPT, strict=True)])
            of_heads += 1
        np.testing.assert_array_equal(new[path], leaf, path)
    own = sum("head" in signature.axes for signature in signatures.values())
    assert of_heads == 3 * own  # weights, and both moments


def test_fewer_heads_cost_what_the_formula_says():
    """Of XLA's compiled step the difference that two of four heads make."""

    def costs(heads: int) -> tuple[float, int]:
        config = small_config(
            n_layers=2, d_model=64, n_heads=heads, head_dim=32, d_ff=64, seq_len=32,
            scan_layers="unroll", attention="xla",
        )  # fmt: skip
        params = jax.eval_shape(lambda: gpt.init(config, jax.random.key(0)))
        gates, tokens = gpt.open_gates(config), jax.ShapeDtypeStruct((2, 33), jnp.int32)

        def loss(params, tokens):
            return gpt.measure(config, params, tokens, gates=gates)["loss"].value

        cost: Any = jax.jit(jax.grad(loss)).lower(params, tokens).compile().cost_analysis()
        return cost["flops"], 2 * 32 * flops_per_token(config)

    (four, all_four), (two, half) = costs(4), costs(2)
    assert (four - two) / (all_four - half) == pytest.approx(1, abs=0.03)
    assert two / four == pytest.approx(half / all_four, abs=0.015)


ENTRIES = [
    ("set_gates", 0, 2, {"heads": [list(head) for head in sorted(CLOSED)]}),
    ("remove_heads", None, 2, {}),
    ("stack_layers", 2, 2, {"recipe": "identity"}),
    ("widen_mlp", 2, 2, {}),
]
STEPS = 9


def _argv(folder: Path, name: str, *more: str, entries=ENTRIES) -> list[str]:
    rows = [
        {"name": n, "value": v, "max_wait_iters": wait, "reevaluate": True, "options": options}
        for n, v, wait, options in entries
    ]
    (folder / "schedule.json").write_text(json.dumps(rows))
    return [
        *("--data", write_text(folder / "text.txt"), "--run_dir", str(folder / name)),
        *("--scaling_schedule_file", str(folder / "schedule.json"), "--max_steps", str(STEPS)),
        *("--n_layers", "2", "--d_model", "8", "--n_heads", "4", "--seq_len", "8"),
        *("--batch_size", "2", "--mesh", "data=1", "--eval_iters", "1", "--log_interval", "1"),
        *("--scan_layers", "scan", "--checkpoint_interval", "5", *more),
    ]


@pytest.fixture(scope="module")
def removed(tmp_path_factory):
    """The folder of a run that removes heads and grows on."""
    folder = tmp_path_factory.mktemp("removed")
    assert main(_argv(folder, "whole")) == 0
    return folder


def _lines(run: Path, name: str) -> list[dict]:
    times = ("step_seconds", "seconds", "compile_wait_seconds")
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def _meta(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoints/{step}/meta.json").read_text())


def test_a_run_decides_what_leaves_and_goes_on_from_there(removed):
    run = removed / "whole"
    records = _lines(run, "operations.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert [record["model_after"]["n_heads"] for record in records] == [4, 3, 3, 3]
    assert [record.get("decided") for record in records] == [None, KEPT, None, None]
    for record in records[1:]:
        assert record["function_delta"] <= 1e-5
        assert record["params_after"] == parameter_count(ModelConfig(**record["model_after"]))
    meta = _meta(run, STEPS)
    assert meta["decisions"] == {"2": KEPT}
    assert (meta["model"]["n_heads"], meta["model"]["n_layers"]) == (3, 4)
    assert json.loads((run / "waiting.json").read_text())["operations"] == []
    assert main(_argv(removed, "whole")) == 0  # finished: nothing is left to decide


def test_killed_around_it_and_resumed_is_the_same_run(removed):
    """Resumed from before the decision, which is made again, and after it, where it is read."""
    name = "killed"
    for point in ("during_operation:1", "after_save:1"):
        train_until_killed(_argv(removed, name), point)
    assert _meta(removed / name, 5)["decisions"] == {"2": KEPT}
    assert main(_argv(removed, name)) == 0
    both = [removed / "whole", removed / name]
    digests = [json.loads((run / f"checkpoints/{STEPS}/manifest.json").read_text()) for run in both]
    assert digests[0]["state_sha256"] == digests[1]["state_sha256"]
    for file in ("metrics.jsonl", "operations.jsonl"):
        assert _lines(both[0], file) == _lines(both[1], file)


def test_what_it_makes_impossible_is_one_message_and_changes_nothing(tmp_path, capsys):
    entries = [*ENTRIES[:2], ("widen_heads", 1.5, 50, {})]
    assert main(_argv(tmp_path, "run", entries=entries)) == 1
    error = capsys.readouterr().err
    assert "operation 2 of the schedule, remove_heads, could not be done:" in error
    assert "entry 3 (widen_heads): value: got 1.5, expected a factor" in error
    meta = _meta(tmp_path / "run", 4)
    assert (meta["decisions"], meta["model"]["n_heads"]) == ({}, 4)
    assert meta["position"]["pending"] == "timeout"


def test_on_two_devices_as_many_stay_as_they_divide(tmp_path):
    entries = [("remove_heads", None, 1, {})]
    controlled = ("--enable_head_lr", "--enable_controller", "--controller_warmup", "1")
    argv = _argv(tmp_path, "run", *controlled, entries=entries)
    plan = make_plan(resolve([*argv, "--mesh", "tensor=2"])[0], MeshShape(tensor=2))
    plan = plan.completed(vocab_size=20, total=STEPS)
    compiler = StageCompiler(plan, make_mesh(plan.mesh), lambda shape: [], Tables())
    state = compiler.initial_state()
    gates = np.asarray([[0, 1, 0, 0], [0, 0, 0, 1]], "float32")
    placed = jax.device_put(gates, state["head_gate"].sharding)
    state = state.with_variables(head_gate=placed)
    decide(compiler, state, 0)
    assert compiler.plan.entries[0].decided == ((0, 1), (0, 3))
    change = compiler.change(1)
    after, _, _ = change.morph(state)
    np.testing.assert_array_equal(after["head_gate"], [[0, 1], [0, 1]])
    query = after.params["blocks"]["attention"]["query"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 8, 1, 2)}
    probe = np.zeros(change.probe, np.int32)
    assert float(change.function_delta(state, after, place_batch(compiler.mesh, probe))) <= 1e-5
