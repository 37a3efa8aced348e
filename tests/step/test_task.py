"""Another task than language modelling, through the same programs, loop and report."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import flat, reference_logits, shape_of, small_config

from jaxmorph.config.mesh import MeshShape, parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings import OptimizerSettings, Settings
from jaxmorph.growth.plan import make_plan
from jaxmorph.model import blocks, gpt
from jaxmorph.model.measures import Mean
from jaxmorph.plot import main as plot_main
from jaxmorph.step.metrics import Metric
from jaxmorph.step.parts import Parts
from jaxmorph.step.programs import make_programs
from jaxmorph.step.sharding import make_mesh, place_batch
from jaxmorph.step.state import Start
from jaxmorph.step.task import LANGUAGE_MODELLING, Task
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.training.loop import train
from jaxmorph.training.resume import CheckpointRecord, restore_model
from jaxmorph.training.tables import Tables


class Rows:
    """Examples cut from a text one after the other, each with the mean of its tokens."""

    def __init__(self, tokens, *, seq_len, seed):
        self.examples_per_epoch = len(tokens) // seq_len
        self._rows = np.asarray(tokens[: self.examples_per_epoch * seq_len]).reshape(-1, seq_len)

    def batches(self, position, batch_size):
        """Yield batches, over and over."""
        while True:
            yield _batch(self._rows[(position + np.arange(batch_size)) % len(self._rows)])
            position += batch_size


def _batch(rows):
    return {"tokens": rows.astype(np.int32), "mean": (rows.mean(1) / 100).astype(np.float32)}


def _ragged(tokens, *, seq_len, batch_size, n_batches):
    rows = Rows(tokens, seq_len=seq_len, seed=0)._rows[: batch_size * n_batches - 1]
    return [_batch(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]


def _measure(config, params, batch, **how):
    logits_BTV, measures = gpt.forward(config, params, batch["tokens"], **how)
    error_B = logits_BTV[..., 0].mean(axis=1) - batch["mean"].astype(logits_BTV.dtype)
    count = jnp.asarray(len(error_B), error_B.dtype)
    return {
        "error": Mean(jnp.sum(error_B**2), count),
        "distance": Mean(jnp.sum(jnp.abs(error_B)), count),
        **measures,
    }


REGRESSION = Task(
    name="mean of the tokens",
    weights={"error": 1.0},
    measure=_measure,
    metrics=(
        Metric(
            "val/error", "validation error", "squares", ".5f", "error", best="lowest", tile=True
        ),
        Metric("train/error", "training error", "squares", ".5f", "error"),
        Metric("val/error_after", "error right after an operation", "squares", figure="error"),
        Metric("val/distance", "distance", tile=True),
        Metric("train/distance", "training distance"),
    ),
    stream=Rows,
    validation=_ragged,
    spec=lambda rows, seq_len: {
        "tokens": jax.ShapeDtypeStruct((rows, seq_len), jnp.int32),
        "mean": jax.ShapeDtypeStruct((rows,), jnp.float32),
    },
    inputs=lambda batch: batch["tokens"],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that learns it, grows, and is evaluated on batches of 4, 4 and 3."""
    folder = tmp_path_factory.mktemp("regression")
    (folder / "text.txt").write_text(
        "".join(f"{n} green bottles on the wall. " for n in range(300))
    )
    row = {"name": "widen_mlp", "value": 2, "max_wait_iters": 4, "reevaluate": True}
    (folder / "schedule.json").write_text(json.dumps([row]))
    settings, sources = resolve(
        [
            *("--data", str(folder / "text.txt"), "--run_dir", str(folder / "run")),
            *("--n_layers", "1", "--d_model", "16", "--n_heads", "2", "--seq_len", "16"),
            *("--batch_size", "4", "--mesh", "data=1", "--max_steps", "30", "--eval_iters", "3"),
            *("--eval_interval", "10", "--log_interval", "1", "--progress", "lines"),
            *("--scaling_schedule_file", str(folder / "schedule.json"), "--precompile", "off"),
            *("--learning_rate", "1e-2", "--scheduler", "constant", "--dtype", "float64"),
        ]
    )
    plan = make_plan(settings, parse_mesh(settings.scale.mesh))
    assert train(plan, sources, Tables(step=Parts(task=REGRESSION))) == 0
    return folder / "run"


def test_it_is_learnt_and_evaluated_as_a_plain_loop_over_examples_has_it(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "val/error" in line]
    assert [line["step"] for line in evaluated] == [0, 10, 20, 30]
    assert evaluated[-1]["val/error"] < 0.5 * evaluated[0]["val/error"]
    assert lines[4]["val/error_after"] > 0
    checkpoints = Checkpoints(run / "checkpoints", 2, True)
    config = CheckpointRecord.from_meta(checkpoints.read_meta(30)).model
    with jax.enable_x64(True):
        params = jax.device_get(restore_model(checkpoints, 30, config)[0])
    tokens = np.frombuffer((run.parent / "text.txt").read_bytes(), np.uint8)
    rows = tokens[len(tokens) - len(tokens) // 10 :]  # the validation split: the last tenth
    rows = rows[: len(rows) // 16 * 16].reshape(-1, 16)[:11].astype(int)
    errors = []
    for row in rows:
        logits = reference_logits(
            config, jax.tree.map(np.float64, jax.device_get(params)), row[None]
        )
        errors.append(float(logits[0, :, 0].mean() - row.mean() / 100))
    np.testing.assert_allclose(evaluated[-1]["val/error"], np.mean(np.square(errors)), rtol=1e-6)
    np.testing.assert_allclose(evaluated[-1]["val/distance"], np.mean(np.abs(errors)), rtol=1e-6)


def test_log_and_report_have_the_task_s_words(run):
    assert plot_main(["report", str(run)]) == 0  # reads the words from the run folder
    page = (run / "report.html").read_text()
    assert "Validation error" in page
    assert "Distance" in page
    assert "nats" not in page
    assert "Validation loss" not in page
    assert (run / "error.png").exists()
    assert not (run / "loss.png").exists()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"train/error", "train/distance", "val/error", "val/distance"} <= last.keys()
    assert not {"train/loss", "val/loss", "val/accuracy"} & last.keys()


def _programs(parts, config, **optimizer):
    plain = {"weight_decay": 0.0, "grad_clip": 0.0, "warmup_steps": 0} | optimizer
    settings = Settings(optimizer=OptimizerSettings(**plain))
    start = Start(settings, shape_of(config, "--warmup_steps", "0"), 40)
    return make_programs(start, make_mesh(MeshShape()), parts)


def test_micro_batches_of_any_sizes_are_one_batch():
    with jax.enable_x64(True):
        programs = _programs(Parts(task=REGRESSION), small_config(dtype="float64", n_layers=1))
        rows = np.random.default_rng(0).integers(0, 50, (8, 12))
        found = []
        for cuts in ([], [5], [1, 4]):
            state, sums = programs.init(), programs.zero_sums()
            for index, part in enumerate(np.split(rows, cuts)):
                batch = place_batch(make_mesh(MeshShape()), _batch(part))
                sums = programs.accumulate(state, sums, batch, np.int32(index))
            state, _, metrics = programs.update(state, sums)
            found.append((flat(state.params), float(metrics["train/error"])))
        for params, error in found[1:]:
            np.testing.assert_allclose(error, found[0][1], rtol=1e-12)
            for path, leaf in params.items():
                np.testing.assert_allclose(leaf, found[0][0][path], atol=1e-9, err_msg=path)


def _two_terms(config, params, batch, **how):
    """Errors of some examples only, and of the others half as much: counts that differ by batch."""
    logits_BTV, _ = gpt.forward(config, params, batch["tokens"], **how)
    error_B = logits_BTV[..., 0].mean(axis=1) - batch["mean"].astype(logits_BTV.dtype)
    counts_B = (batch["tokens"][:, 0] % 3 > 0).astype(error_B.dtype)
    return {
        "error": Mean(jnp.sum(error_B**2 * counts_B), jnp.sum(counts_B)),
        "distance": Mean(jnp.sum(jnp.abs(error_B) * (1 - counts_B)), jnp.sum(1 - counts_B)),
    }


def test_a_loss_of_two_terms_does_not_depend_on_how_a_batch_is_cut():
    task = dataclasses.replace(
        REGRESSION, measure=_two_terms, weights={"error": 1.0, "distance": 0.5}
    )
    with jax.enable_x64(True):
        programs = _programs(Parts(task=task), small_config(dtype="float64", n_layers=1))
        rows = np.random.default_rng(0).integers(0, 50, (8, 12))
        rows[:2, 0] = 3  # the first two count for the second term alone
        found = []
        for cuts in ([], [2], [1, 4]):
            state, sums = programs.init(), programs.zero_sums()
            for index, part in enumerate(np.split(rows, cuts)):
                batch = place_batch(make_mesh(MeshShape()), _batch(part))
                sums = programs.accumulate(state, sums, batch, np.int32(index))
            _, _, metrics = programs.update(state, sums)
            found.append({name: float(value) for name, value in metrics.items()})
        for metrics in found[1:]:
            for name, value in metrics.items():
                np.testing.assert_allclose(value, found[0][name], rtol=1e-10, err_msg=name)
        assert found[0]["train/skipped"] == 0


def test_a_task_names_the_metrics_of_its_loss():
    with pytest.raises(ValueError, match="no metric named val/error"):
        dataclasses.replace(REGRESSION, metrics=REGRESSION.metrics[1:])


class Routed(blocks.Block):
    """A block that measures something of its own: the mean square of what it adds."""

    def __call__(self, x_BTD, gates, key, cache=None, position=None):
        """Return what a block does, and a measure."""
        y_BTD, cache, _ = super().__call__(x_BTD, gates, key, cache, position)
        change = (y_BTD - x_BTD).astype(jnp.result_type(float))
        return (
            y_BTD,
            cache,
            {"size": Mean(jnp.sum(change**2), jnp.asarray(change.size, change.dtype))},
        )


@pytest.mark.parametrize(
    "policy", [{"scan_layers": "scan"}, {"scan_layers": "unrolled", "remat": True}]
)
def test_blocks_hand_up_a_loss_and_a_measure(policy, monkeypatch):
    """Its weight makes it a term of the gradient; the loss that is recorded stays cross-entropy."""
    monkeypatch.setattr(gpt, "Block", Routed)
    weight, tokens = 0.25, np.random.default_rng(0).integers(0, 50, (2, 13)).astype(np.int32)
    with jax.enable_x64(True):
        config = small_config(dtype="float64", n_layers=2, **policy)
        task = Task(**{**vars(LANGUAGE_MODELLING), "weights": {"loss": 1.0, "size": weight}})
        programs = _programs(Parts(task=task), config)
        state = programs.init()
        batch = place_batch(make_mesh(MeshShape()), tokens)
        sums = programs.accumulate(state, programs.zero_sums(), batch, np.int32(0))
        gates = gpt.open_gates(config)

        def terms(params):
            measures = gpt.measure(config, params, jnp.asarray(tokens), gates=gates)
            return measures["loss"].value, measures["size"].total / measures["loss"].count

        gradients = [jax.grad(lambda p, k=k: terms(p)[k])(state.params) for k in (0, 1)]
        expected = jax.tree.map(lambda a, b: a + weight * b, *gradients)
        count = float(sums.measures["loss"].count)
        for path, leaf in flat(sums.gradients).items():
            np.testing.assert_allclose(leaf / count, flat(expected)[path], atol=1e-12, err_msg=path)
        loss, size = (float(term) for term in terms(state.params))
        assert size > 0
        _, _, metrics = programs.update(state, sums)
        np.testing.assert_allclose(float(metrics["train/loss"]), loss, rtol=1e-12)
        np.testing.assert_allclose(float(metrics["train/size"]), size, rtol=1e-12)
