"""What fits the memory there is: the forecast against real arrays, what is refused, what is said."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from schedule_entries import ONE, entries, entry, make_shape

from jaxmorph.cli.errors import InputError
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.growth.fitting import Room, check_fits, forecasts
from jaxmorph.growth.plan import make_plan, walk
from jaxmorph.model import gpt
from jaxmorph.model.trainable import trainable_of
from jaxmorph.step.memory import activations, memory
from jaxmorph.step.optimizer import make_optimizer
from jaxmorph.step.sharding import make_mesh, shardings_like_parameters

ADAMW = OptimizerSettings()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("mesh", [MeshShape(2, 2, 2), MeshShape(1, 8, 1), MeshShape(1, 1, 8)])
def test_memory_of_a_device_is_that_of_its_part_of_every_array(optimizer, width, mesh):
    """An odd vocabulary, a tensor axis that does not divide the 4 heads, factors that are whole."""
    shape = make_shape(d_model=width, head_dim=width // 4, attn_lora_rank=0, vocab_lora_rank=0)
    settings, trainable = OptimizerSettings(optimizer=optimizer), trainable_of(shape)
    params = jax.eval_shape(lambda: gpt.init(shape.model, jax.random.key(0)))
    state = jax.eval_shape(make_optimizer(settings, trainable).init, params)

    def local(tree) -> int:
        places = shardings_like_parameters(make_mesh(mesh), tree, trainable.signatures)
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
        sizes = [math.prod(place.shard_shape(leaf.shape)) for leaf, place in pairs]
        return sum(4 * size for size in sizes if size > 3)  # the smallest are counts

    found = memory(shape, settings, mesh)
    assert (found.parameters, found.gradients) == (local(params), local(params))
    assert found.optimizer == local(state)


ACTIVATIONS = {
    "wide MLP": {"d_ff": 512},
    "large vocabulary, gated": {"vocab_size": 3000, "activation": "swiglu"},
    "long, scores in full": {"attention": "xla", "seq_len": 192},
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_estimated_within_half(name):
    """Against what XLA sets aside for the gradient, less the gradient itself."""
    sizes = {"n_layers": 2, "seq_len": 64, "d_ff": 128, "attn_lora_rank": 0, "vocab_lora_rank": 0}
    shape = make_shape(**{**sizes, **ACTIVATIONS[name]})
    config = shape.model
    params = jax.eval_shape(lambda: gpt.init(config, jax.random.key(0)))
    gates = jax.eval_shape(lambda: gpt.open_gates(config))
    tokens = jax.ShapeDtypeStruct((shape.batch_size, config.seq_len + 1), "int32")

    def loss(params, gates, tokens):
        return gpt.measure(config, params, tokens, gates=gates)["loss"].value

    working = jax.jit(jax.grad(loss)).lower(params, gates, tokens).compile().memory_analysis()
    assert working is not None
    estimate = activations(shape)
    assert estimate / 1.5 < working.temp_size_in_bytes < estimate * 1.5


def test_activations_shrink_with_the_mesh_and_with_recomputation():
    shape = make_shape(batch_size=16)
    assert activations(shape, MeshShape(data=2, fsdp=4, tensor=2)) * 16 == pytest.approx(
        activations(shape), rel=1e-6
    )
    again = dataclasses.replace(shape, model=dataclasses.replace(shape.model, remat=True))
    assert activations(again) < activations(shape) / 2


def _forecasts(room: Room):
    rows = entries(entry("widen_mlp", 4), entry("change_lr", 0.5), entry("stack_layers", 2))
    stages = walk(rows, make_shape(), ONE, "file")
    return [memory(stage.shape, ADAMW) for stage in stages], forecasts(stages, ADAMW, ONE, room)


def test_a_change_needs_both_states_and_a_stage_its_own():
    held, found = _forecasts(Room())
    assert [forecast.held for forecast in found] == held
    assert [forecast.verdict for forecast in found] == ["-"] * 4
    assert [forecast.change for forecast in found] == [
        *(0, held[0].state + held[1].state, 0, held[2].state + held[3].state)
    ]
    start, widened, same, stacked = held
    # the limit; what is said of each stage: what certainly does not fit, and what hardly will
    for limit, verdicts in (
        (start.total - 1, ["no", "no", "no", "no"]),
        (start.total, ["hardly", "no", "no", "no"]),
        (widened.state + start.state - 1, ["hardly", "no", "hardly", "no"]),
        (widened.state + start.state, ["hardly", "hardly", "hardly", "no"]),
        (1 << 40, ["yes"] * 4),
    ):
        _, found = _forecasts(Room({"all": limit, "more": 1 << 50}))
        assert [forecast.verdict for forecast in found] == verdicts
    assert (
        same.total < widened.state + start.state
    )  # else the third limit would not tell them apart
    # Eight devices of one host; and a host that must hold a copy of the largest state.
    _, found = _forecasts(Room({"all": 8 * start.total - 1}, sharing=8))
    assert found[0].verdict == "no"
    for limit, verdict in ((stacked.state - 1, "no"), (stacked.state, "yes")):
        _, found = _forecasts(Room({"device": 1 << 40}, host={"host": limit}))
        assert [forecast.verdict for forecast in found] == ["yes", "yes", "yes", verdict]


def _plan(folder, rows, *flags):
    (folder / "schedule.json").write_text(json.dumps(rows))
    argv = ["--scaling_schedule_file", str(folder / "schedule.json"), "--n_layers", "2"]
    return make_plan(resolve([*argv, "--d_model", "384", *flags])[0], ONE)


LIMIT = Room({"this machine's memory": 25 * 10**9, "the rest": 1 << 60})


def test_a_size_given_for_a_factor_is_refused_and_the_factor_named(tmp_path):
    plan = _plan(tmp_path, [entry("change_lr", 0.5), entry("widen_mlp", 3072)])
    with pytest.raises(InputError) as caught:
        check_fits(plan, LIMIT)
    text = str(caught.value)
    for words in (
        f"{tmp_path / 'schedule.json'}: entry 2 (widen_mlp): value: got 3072",
        "d_ff 1,536 -> 4,718,592",
        "3.75M -> 7.26B parameters",
        "116GB for parameters, gradients and optimizer state, of 25GB, this machine's memory",
        "3072 is a factor here: 2 gives d_ff 3072, as does set_d_ff 3072",
        "--allow_oversized",
    ):
        assert words in text
    assert plan.stages[2].warnings == (
        "widen_mlp: 3072 is a factor here: 2 gives d_ff 3072, as does set_d_ff 3072",
    )  # on a machine where it fits
    assert _plan(tmp_path, [entry("widen_mlp", 3)]).stages[1].warnings == ()


def test_an_oversized_stage_is_let_through_with_a_warning(tmp_path):
    rows = [entry("widen_mlp", 100), entry("change_lr", 0.5)]
    plan = _plan(tmp_path, rows, "--allow_oversized")
    [warning] = check_fits(plan, Room({"it": 10**9}))
    assert warning.startswith("stage 1 (widen_mlp) cannot fit: it needs 3.8")
    with pytest.raises(InputError, match=r"entry 1 \(widen_mlp\): value: got 100"):
        check_fits(_plan(tmp_path, rows), Room({"it": 10**9}))
    [warning] = check_fits(_plan(tmp_path, rows), Room({"it": 4 * 10**9}))
    assert warning.startswith("stage 1 (widen_mlp) may not fit: ")
    assert check_fits(plan, Room()) == check_fits(plan, Room({"it": 1 << 60})) == []


def test_a_model_too_large_from_the_start_is_refused(tmp_path):
    plan = _plan(tmp_path, [], "--d_ff", "100000000")
    with pytest.raises(
        InputError, match="the model at the start: got '154B parameters', expected a"
    ):
        check_fits(plan, LIMIT)


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 * 10**9,) * 2)
from jaxmorph.train import main
for argv in (["--dry_run"], []):
    print(main([*sys.argv[1:], *argv]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address limits hold on Linux alone")
def test_under_an_address_limit_the_dry_run_says_so_and_the_run_is_refused(tmp_path):
    """The operation of the report: 317 million parameters in 3 GB."""
    (tmp_path / "text.txt").write_text("some words " * 1000)
    rows = [{"name": "widen_mlp", "value": 25, "max_wait_iters": 500, "reevaluate": False}]
    (tmp_path / "schedule.json").write_text(json.dumps(rows))
    argv = ["--scaling_schedule_file", str(tmp_path / "schedule.json"), "--d_model", "512"]
    argv += ["--n_heads", "8", "--data", str(tmp_path / "text.txt"), "--seq_len", "32"]
    argv += ["--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *argv],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    dry, run = done.stdout.strip().rsplit("\n", 2)[:2], done.stderr
    assert done.stdout.endswith("0\n2\n"), done
    [widened] = [line.split() for line in dry[0].splitlines() if line.endswith("  no")]
    assert widened[:2] == ["1", "5.14GB"]
    assert "what the address limit (ulimit -v) leaves" in dry[0]
    assert run.count("\n") == 1
    assert "entry 1 (widen_mlp): value: got 25" in run
    assert "it needs 5.14GB for parameters, gradients and optimizer state, of 2." in run
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
