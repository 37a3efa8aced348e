"""What every operation must keep, one table of them through one set of tests, by the product's own path.

The first 20 updates of fresh entries are tested with the morphs that make them, at a size where an
RMS means something: `test_first_steps_*` in test_width (recipe fresh), test_depth (identity, and
from no layers) and test_lora_morphs (ranks, merge).
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from operation_cases import (
    BASES,
    BATCH,
    CLOSED,
    CONTEXT,
    HEADS,
    LAYERS,
    MORPHS,
    STEPS_BEFORE,
    TUNINGS,
    VOCABULARY,
    Morph,
    Tuning,
    closed_before,
    documented_moments,
    heads_after,
    opens_heads,
)
from small_models import flat, resolved

from jaxmorph.config.mesh import MeshShape, parse_mesh
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.run_shape import RunShape
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.model import gpt
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.model.trainable import frozen_parameters
from jaxmorph.model.tree_paths import leaves_by_path
from jaxmorph.morphs.gpt import MORPHS as GPT_MORPHS
from jaxmorph.step.programs import Programs
from jaxmorph.step.sharding import make_mesh, place_batch
from jaxmorph.step.state import VARIABLES, TrainState, gates_of
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.storage.manifest import state_sha256
from jaxmorph.training import transitions
from jaxmorph.training.adjustments import ADJUSTMENTS, adjusted
from jaxmorph.training.choice import chosen_heads, with_heads
from jaxmorph.training.operate import OperationResult, decide, perform
from jaxmorph.training.position import Position
from jaxmorph.training.resume import restore_state
from jaxmorph.training.stages import StageCompiler
from jaxmorph.training.tables import Tables

CASES: list[Any] = [*TUNINGS, *MORPHS]
LABELS = [case.label for case in CASES]
every_operation = pytest.mark.parametrize("case", CASES, ids=LABELS)
every_morph = pytest.mark.parametrize("case", MORPHS, ids=LABELS[len(TUNINGS) :])
TOTAL = 100
BETA1, BETA2 = 0.9, 0.95  # the defaults
SETTLED = 3  # batches whose gradients the moments hold
# The others leave every leaf of the state as it is.
CHANGING = [case for case in CASES if isinstance(case, Morph) or case.leaves or case.gate]
MESHED = [case for case in CASES if isinstance(case, Tuning) or case.mesh]


def test_the_table_has_every_operation_and_every_recipe():
    names = [case.name for case in CASES]
    assert set(names) == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        for option in operation.options.values():
            if {"copy", "split"} & set(option.choices):  # by any operation with the same function
                same = [c for c in MORPHS if GPT_MORPHS[c.name] is GPT_MORPHS[name]]
                tried = {c.options.get("recipe", option.default) for c in same}
                assert tried == set(option.choices)
    assert {case.name for case in MESHED} == set(OPERATIONS)


class Compiler(StageCompiler):
    """One that compiles the programs of an architecture and a batch once for all plans."""

    shared: dict[Any, Programs] = {}  # noqa: RUF012

    def _compile_programs(self, index: int) -> Programs:
        shape, optimizer = self.plan.stages[index].shape, self.plan.settings.optimizer
        key = (shape.program_key, optimizer, self.mesh)
        if key not in self.shared:
            self.shared[key] = super()._compile_programs(index)
        return self.shared[key]


def _compiler(case: Tuning | Morph, folder: Path, mesh: str = "data=1") -> tuple[Plan, Compiler]:
    """The plan of one operation, read from a schedule file, and the compiler of its stages."""
    row = {"name": case.name, "value": case.value, "trigger_loss": 1.0, "reevaluate": False}
    schedule = folder / "schedule.json"
    schedule.write_text(json.dumps([row | {"options": case.options}]))
    return _compiler_of_base(_base(case), mesh, schedule)


def _compiler_of_base(
    base: str, mesh: str = "data=1", schedule: Path | None = None
) -> tuple[Plan, Compiler]:
    """The plan of a run, without a schedule that of a single stage, and its compiler."""
    settings, devices = resolved(*BASES[base]), make_mesh(parse_mesh(mesh))
    file = None if schedule is None else str(schedule)
    growth = dataclasses.replace(settings.growth, scaling_schedule_file=file)
    # With a controller any head may be closed by the first operation.
    heads = dataclasses.replace(settings.heads, enable_controller=True)
    settings = dataclasses.replace(settings, growth=growth, heads=heads)
    plan = make_plan(settings, MeshShape(**devices.shape))
    plan = plan.completed(vocab_size=VOCABULARY, total=TOTAL)
    return plan, Compiler(plan, devices, _validation_specs, Tables())


def _base(case: Tuning | Morph) -> str:
    return case.base if isinstance(case, Morph) else "trained"


def _validation_specs(shape: RunShape) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((BATCH, shape.model.seq_len + 1), jnp.int32)]


def _tokens(seed: int, rows: int = BATCH, length: int = CONTEXT + 1) -> np.ndarray:
    """Tokens that follow one another by a rule, so that there is something to learn."""
    starts = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, 1))
    return ((starts + 5 * np.arange(length) + starts * (np.arange(length) % 3)) % 11).astype(
        "int32"
    )


def _update(
    programs: Programs, compiler: StageCompiler, shape: RunShape, state: TrainState, seed: int = 0
) -> tuple[TrainState, dict[str, Any]]:
    """The state after one update, and its metrics; consumes the state."""
    sums = programs.zero_sums()
    for index in range(shape.grad_accum_steps):
        tokens = _tokens(seed + index, shape.batch_size, shape.model.seq_len + 1)
        batch = place_batch(compiler.mesh, tokens)
        sums = programs.accumulate(state, sums, batch, np.int32(index))
    state, _, metrics = programs.update(state, sums)
    return state, metrics


def _placed(host: TrainState, programs: Programs) -> TrainState:
    """A state of its own on the devices, from one in NumPy."""
    return jax.device_put(jax.tree.map(np.array, host), programs.state_shardings)


def _loss(programs: Programs, compiler: StageCompiler, shape: RunShape, state: TrainState) -> float:
    tokens = _tokens(0, BATCH, shape.model.seq_len + 1)
    batch = place_batch(compiler.mesh, tokens)
    return float(programs.evaluate(state, batch)["loss"].value)


@cache
def _trained(base: str) -> TrainState:
    """A state, in NumPy, some steps from the start whose moments are of gradients at that point alone.

    Those steps done, the moments are set to zero and some more are done at a learning rate of zero.
    Gates are neither 0 nor 1, but for one closed head; other heads are on their way to be stable.
    """
    (plan, compiler), rng = _compiler_of_base(base), np.random.default_rng(1)
    programs, shape = compiler.programs(0), plan.start
    state = jax.device_get(compiler.initial_state())
    gates = {
        name: (0.7 + 0.6 * rng.random(state[name].shape)).astype(state[name].dtype)
        for name in ("layer_gate", "head_gate")
    }
    gates["head_gate"][CLOSED] = 0
    per_head = {
        "head_status": np.asarray([[0, 3], [40, -1]], np.int32),
        "head_boost": (0.5 + rng.random((LAYERS, HEADS))).astype("float32"),
        "head_logit": rng.normal(size=(LAYERS, HEADS)).astype("float32"),
    }
    state = state.with_variables(**gates, **per_head)
    for seed in range(STEPS_BEFORE - SETTLED):
        state, _ = _update(programs, compiler, shape, _placed(state, programs), seed)
    state = jax.device_get(state).with_variables(lr_multiplier=np.float32(0))
    moments = jax.tree.map(np.zeros_like, state.opt_state)
    state = dataclasses.replace(state, opt_state=moments)
    for seed in range(SETTLED):
        state, _ = _update(programs, compiler, shape, _placed(state, programs), seed)
    return jax.device_get(state).with_variables(lr_multiplier=np.float32(1))


@dataclass(frozen=True)
class Outcome:
    """An operation, done.

    Args:
      plan: of two stages.
      compiler: of them.
      programs: of the two stages.
      before: the state it met, in NumPy.
      after: the state it led to.
      done: what the orchestrator says of it.
      compiled: what XLA compiled while it was done, all programs having been compiled before.
      measured: the measures of the heads before, for an operation that chooses by them.
    """

    plan: Plan
    compiler: Compiler
    programs: tuple[Programs, Programs]
    before: TrainState
    after: TrainState
    done: OperationResult
    compiled: list[str]
    measured: dict[str, np.ndarray]

    @property
    def shapes(self) -> tuple[RunShape, RunShape]:
        """The run before and after."""
        return self.plan.stages[0].shape, self.plan.stages[1].shape

    def next_update(self) -> tuple[TrainState, dict[str, Any]]:
        """The state one update later and its metrics."""
        state = _placed(jax.device_get(self.after), self.programs[1])
        return _update(self.programs[1], self.compiler, self.shapes[1], state)

    def losses(self) -> tuple[float, float]:
        """The loss before and after, on the same tokens where the contexts are equally long."""
        before = _placed(self.before, self.programs[0])
        states = zip(self.programs, self.shapes, (before, self.after), strict=True)
        first, second = (_loss(p, self.compiler, shape, state) for p, shape, state in states)
        return first, second


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Performs a case, once."""
    outcomes: dict[str, Outcome] = {}

    def get(case: Tuning | Morph) -> Outcome:
        label = LABELS[CASES.index(case)]
        if label not in outcomes:
            outcomes[label] = _performed(case, tmp_path_factory.mktemp("plan"))
        return outcomes[label]

    return get


def _closing(case: Tuning | Morph, state: TrainState) -> TrainState:
    """The state with the heads closed that a case begins with."""
    gates = np.array(state["head_gate"])
    for head in case.closing if isinstance(case, Morph) else ():
        gates[head] = 0
    gate = state["head_gate"]
    placed = jax.device_put(gates, gate.sharding) if isinstance(gate, jax.Array) else gates
    return state.with_variables(head_gate=placed)


def _performed(case: Tuning | Morph, folder: Path) -> Outcome:
    _, compiler = _compiler(case, folder)
    before = _closing(case, _trained(_base(case)))
    decide(compiler, before, 0)
    plan, programs = compiler.plan, (compiler.programs(0), compiler.programs(1))
    if isinstance(case, Morph):
        compiler.change(1)
    state, position = _placed(before, programs[0]), Position(step=STEPS_BEFORE, val_loss=0.5)
    tokens, measured = _tokens(5)[:, :-1], {}
    if case.options.get("by") == "importance":
        batch = place_batch(compiler.mesh, _tokens(6))
        measured = jax.device_get(programs[0].measure_heads(state, batch))
    with _compilations() as compiled:
        after, done = perform(compiler, state, position, "loss", tokens, measure=lambda: measured)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    return Outcome(plan, compiler, programs, before, after, done, compiled, measured)


@every_operation
def test_function_is_kept_where_the_table_says_so_and_changed_where_not(case, outcome):
    result = outcome(case)
    operation, (before, after) = OPERATIONS[case.name], result.shapes
    entry = result.plan.entries[0]
    chosen = operation.with_defaults(entry.options)
    exact = operation.exact(before, after, chosen)
    assert exact == result.plan.stages[1].exact
    delta = result.done.function_delta
    if operation.kind == "hyperparameter":
        assert delta is None
        states = jax.device_get((result.before, result.after))
        delta = float(_function_delta(before.model)(*states, _tokens(5)[:, :-1]))
    assert delta <= 1e-5 if exact else 1e-3 < delta < 5, delta


@cache
def _function_delta(config: ModelConfig) -> Any:
    return jax.jit(lambda *arguments: transitions.function_delta(config, config, *arguments))


@every_operation
def test_new_state_is_shaped_placed_and_typed_as_a_fresh_one(case, outcome):
    result = outcome(case)
    fresh = result.programs[1]
    assert jax.tree.structure(result.after) == jax.tree.structure(fresh.abstract_state)
    shardings = leaves_by_path(fresh.state_shardings)
    wanted = leaves_by_path(fresh.abstract_state)
    for path, leaf in leaves_by_path(result.after).items():
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (wanted[path].shape, wanted[path].dtype), path
        assert leaf.weak_type == wanted[path].weak_type, path
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path


@pytest.mark.parametrize("case", TUNINGS, ids=LABELS[: len(TUNINGS)])
def test_a_hyperparameter_operation_sets_what_it_says_and_nothing_else(case, outcome):
    result = outcome(case)
    after, expected = leaves_by_path(result.after), leaves_by_path(result.before)
    for name, value in zip(("head_gate", "head_logit"), case.gate or (), strict=False):
        leaf = expected[f"variables/{name}"] = expected[f"variables/{name}"].copy()
        for head in case.heads or result.done.heads:
            leaf[head] = value
    for path, leaf in expected.items():
        np.testing.assert_array_equal(after[path], case.leaves.get(path, leaf), path)
    assert case.heads is None or sorted(result.done.heads) == case.heads
    before, shape = result.shapes
    faint = case.gate is not None and 0 < case.gate[0] <= 0.1  # closed, and still adds a little
    closed = dataclasses.replace(before.closed, faint=faint)
    assert shape == dataclasses.replace(before, **case.fields, closed=closed)


@every_morph
def test_moments_are_those_of_the_new_net_s_gradients_or_what_is_documented(case, outcome):
    result = outcome(case)
    config = result.shapes[1].model
    exact = result.plan.stages[1].exact
    comparable = exact and case.policy != "copied"
    reference = _reference_moments(config, result.after) if comparable else None
    compared = 0
    for power, name in ((1, "mu"), (2, "nu")):
        old, new = (_moments(state, name) for state in (result.before, result.after))
        assert new.keys() == gpt_signatures(config).keys() - frozen_parameters(config)
        for path, signature in gpt_signatures(config).items():
            if path not in new or path.endswith("key_bias"):
                continue  # frozen; its gradient is zero but for rounding
            for kind, part, expected in documented_moments(case, signature, old[path], power):
                if kind == "gradient" and reference is not None:
                    expected = reference[name][path][part]
                    compared += expected.size
                _assert_close(new[path][part], expected, f"{name} of {path}: {kind}")
    assert (compared > 0) == comparable
    counts = [
        [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
        for state in (result.before, result.after)
    ]
    assert counts[0] == counts[1] == [SETTLED] * len(counts[0])
    totals = result.done.report.totals
    state = jax.tree.leaves(result.after.opt_state)
    assert sum(totals.values()) == sum(leaf.size for leaf in state)
    assert (totals["fresh"] > 0) == (case.policy in ("begun", "silent", "renewed", "regrown"))
    assert totals["reset"] == 0


@every_morph
def test_variables_go_where_the_axes_they_are_declared_over_go(case, outcome):
    result = outcome(case)
    for name, variable in VARIABLES.items():
        old, new = jax.device_get((result.before[name], result.after[name]))
        axes = variable.axes.names
        if case.axis in axes:
            padding = [(0, int(axis == case.axis)) for axis in axes]  # what -1, nowhere, takes
            padded = np.pad(old, padding, constant_values=variable.axes.fresh)
            old = np.take(padded, case.source, axes.index(case.axis))
            if case.policy == "masked":  # layers 1 and 3 are copies of 0 and 1
                fades = {"layer_gate": 0, "fade_start": STEPS_BEFORE, "fade_steps": 4}
                old[1::2] = fades.get(name, old[1::2])
            if case.policy == "regrown" and len(axes) == 2:
                old[CLOSED] = variable.axes.fresh
            if case.policy == "silent" and name == "head_status":
                opens = result.before["head_gate"][case.source] >= 0.2
                opens[:LAYERS] = False
                old[opens] = variable.axes.fresh
        jax.tree.map(np.testing.assert_array_equal, new, old)


@every_operation
def test_gates_and_status_are_as_documented_after_it_and_after_an_update(case, outcome):
    result, cooldown = outcome(case), 1000
    names = ("head_gate", "head_status")
    before, after = ([np.asarray(s[n]) for n in names] for s in (result.before, result.after))
    gates, status = heads_after(case, before[0], before[1], result.done.heads)
    np.testing.assert_array_equal(after, [gates.astype("float32"), status])
    later = np.where(status > 0, (status + 1) * (status < cooldown), status)
    later = np.where(gates >= 0.2, np.where(status < 0, 1, later), later)
    later = np.where(gates.astype("float32") <= np.float32(0.1), -1, later)
    state, _ = result.next_update()
    np.testing.assert_array_equal(state["head_status"], later)
    np.testing.assert_array_equal(state["head_gate"], gates.astype("float32"))


@every_operation
def test_a_head_closed_before_is_closed_after_and_keeps_every_bit(case, outcome):
    result, config = outcome(case), outcome(case).shapes[1].model
    closed = closed_before(case, result.before["head_gate"])
    assert closed.any() != opens_heads(case)
    for head in result.done.heads or () if case.name == "prune_heads" else ():
        closed[head] = True
    assert (np.asarray(result.after["head_gate"])[closed] <= np.float32(0.1)).all()
    state, _ = result.next_update()
    state, _ = _update(result.programs[1], result.compiler, result.shapes[1], state, seed=1)
    np.testing.assert_array_equal(np.asarray(state["head_status"])[closed], -1)
    kept, moved = flat(jax.device_get(result.after.params)), flat(jax.device_get(state.params))
    moments = [_moments(state, name) for name in ("mu", "nu")]
    checked = 0
    for path, signature in gpt_signatures(config).items():
        if {"layer", "head"} <= set(signature.axes):
            at = signature.axes.index("head")
            for leaf in (kept[path], moved[path]):
                assert leaf.shape[at] == config.n_heads
            old, new = (np.moveaxis(leaf[path], at, 1)[closed] for leaf in (kept, moved))
            np.testing.assert_array_equal(new, old, path)
            for moment in moments:
                if path in moment:
                    assert not np.moveaxis(moment[path], at, 1)[closed].any(), path
            checked += 1
    assert checked >= 4


def _moments(state: TrainState, name: str) -> dict[str, np.ndarray]:
    """The moments of that name by the parameter they are of."""
    leaves = leaves_by_path(state.opt_state).items()
    return {p.split(f"/{name}/")[1]: np.asarray(x) for p, x in leaves if f"/{name}/" in p}


def _reference_moments(config: ModelConfig, state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """Adam's moments, in float64, of the net that `state` holds on the batches that were trained on."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: np.asarray(x, np.float64), (state.params, gates_of(state.variables))
        )
        batches = np.stack([_tokens(seed) for seed in range(SETTLED)])
        gradients = flat(_gradients(dataclasses.replace(config, dtype="float64"))(*wide, batches))
    kinds: dict[str, dict[str, np.ndarray]] = {"mu": {}, "nu": {}}
    for path, gradient in gradients.items():
        mu, nu = np.zeros(gradient.shape[1:]), np.zeros(gradient.shape[1:])
        for one in gradient:
            mu, nu = BETA1 * mu + (1 - BETA1) * one, BETA2 * nu + (1 - BETA2) * one**2
        kinds["mu"][path], kinds["nu"][path] = mu, nu
    return kinds


@cache
def _gradients(config: ModelConfig) -> Any:
    """The compiled gradient on each of several batches, which come first."""

    def one(params: Any, gates: Any, tokens_BT: jax.Array) -> Any:
        return jax.grad(lambda p: gpt.measure(config, p, tokens_BT, gates=gates)["loss"].value)(
            params
        )

    return jax.jit(jax.vmap(one, (None, None, 0)))


def _assert_close(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    scale = float(np.sqrt(np.mean(np.square(expected))))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * scale, err_msg=what)


@every_operation
def test_next_update_is_finite_and_the_loss_stays_sane(case, outcome):
    result = outcome(case)
    before, after = result.losses()
    exact = result.plan.stages[1].exact
    same_tokens = result.shapes[0].model.seq_len == result.shapes[1].model.seq_len
    bound = 1e-5 if exact and same_tokens else 1.0
    assert abs(after - before) < bound
    state, metrics = result.next_update()
    assert int(state["step"]) == STEPS_BEFORE + 1
    assert int(metrics["train/skipped"]) == 0
    assert all(math.isfinite(float(value)) for value in metrics.values())
    for path, leaf in leaves_by_path((state.params, state.opt_state)).items():
        assert np.isfinite(leaf).all(), path
    frozen, moved = frozen_parameters(result.shapes[1].model), flat(state.params)
    assert (float(metrics["train/learning_rate"]) == 0) == (case.name == "reset_lr_schedule")
    for path, leaf in flat(result.after.params).items():
        still = path in frozen or case.name == "reset_lr_schedule"
        assert (moved[path] != leaf).any() != still, path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The states before every operation, as steps 0, 1, ... in the order of BASES."""
    made = Checkpoints(tmp_path_factory.mktemp("checkpoints"), len(CASES) + len(BASES), False)
    for step, base in enumerate(BASES):
        made.save(step, leaves_by_path(_trained(base)), {}, score=None, wait=True)
    yield made
    made.close()


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_right_before_an_operation_holds_the_state(base, checkpoints):
    _, compiler = _compiler_of_base(base)
    _assert_restored(checkpoints, list(BASES).index(base), _trained(base), compiler.uncompiled(0))


@pytest.mark.parametrize("case", CHANGING, ids=[LABELS[CASES.index(case)] for case in CHANGING])
def test_a_checkpoint_right_after_it_holds_the_state(case, outcome, checkpoints):
    result, step = outcome(case), len(BASES) + CASES.index(case)
    checkpoints.save(step, leaves_by_path(result.after), {}, score=None, wait=True)
    _assert_restored(checkpoints, step, result.after, result.programs[1])


def _assert_restored(
    checkpoints: Checkpoints, step: int, state: TrainState, programs: Programs
) -> None:
    shardings = programs.state_shardings
    restored = restore_state(checkpoints, step, programs.abstract_state, shardings)
    assert state_sha256(leaves_by_path(restored)) == state_sha256(leaves_by_path(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, shardings)
    assert all(jax.tree.leaves(placed))


@pytest.mark.parametrize("case", MESHED, ids=[LABELS[CASES.index(case)] for case in MESHED])
def test_two_devices_do_what_one_does_from_the_same_checkpoint(
    case, outcome, checkpoints, tmp_path
):
    result, mesh = outcome(case), case.mesh if isinstance(case, Morph) else "fsdp=2"
    plan, compiler = _compiler(case, tmp_path, mesh)
    assert compiler.mesh.devices.size == 2
    state = _closing(case, _restored_on(mesh, _base(case), checkpoints))
    decide(compiler, state, 0)
    if isinstance(case, Morph):
        acted_on = []
        if (heads := result.done.heads) is not None:
            acted_on = [np.zeros((LAYERS, HEADS), bool)]
            acted_on[0][tuple(np.transpose(heads))] = True
            assert chosen_heads(plan.entries[0], state, 1, dict) == list(heads)
        new, report, finite = compiler.change(1).morph(state, *acted_on)
        assert bool(finite)
        report = report.of_part(1, LAYERS * HEADS) if acted_on else report
        assert report.lines == result.done.report.lines
    else:
        before, after = result.shapes
        entry = plan.entries[0]
        if entry.operation.heads:
            heads = chosen_heads(entry, state, 1, lambda: result.measured)
            assert heads == list(result.done.heads)
            entry = with_heads(entry, heads)
        new = adjusted(entry, before, after, state, ADJUSTMENTS, allow_past_end=False)
    expected = leaves_by_path(result.after)
    shardings = leaves_by_path(compiler.uncompiled(1).state_shardings)
    for path, leaf in leaves_by_path(new).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)
        assert leaf.sharding.is_equivalent_to(shardings[path], leaf.ndim), path


@cache
def _restored_on(mesh: str, base: str, checkpoints: Checkpoints) -> TrainState:
    """The state before every operation, from a checkpoint, on other devices than it was saved from."""
    programs = _compiler_of_base(base, mesh)[1].uncompiled(0)
    step, shardings = list(BASES).index(base), programs.state_shardings
    return restore_state(checkpoints, step, programs.abstract_state, shardings)


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """What XLA compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(str(kwargs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations_are_counted():
    with _compilations() as compiled:
        jax.jit(lambda x: x * 3)(np.ones(7)).block_until_ready()
    assert len(compiled) == 1


@every_operation
def test_what_has_been_compiled_before_is_all_that_has_to_be(case, outcome):
    result = outcome(case)
    operation, stage = OPERATIONS[case.name], result.plan.stages[1]
    assert operation.recompiles or not stage.recompiles
    if operation.kind == "hyperparameter" and not case.name.endswith("batch_size"):
        assert not operation.recompiles
    assert (result.programs[1] is result.programs[0]) != stage.recompiles
    with _compilations() as compiled:
        _loss(result.programs[1], result.compiler, result.shapes[1], result.after)
        result.next_update()
    assert compiled == result.compiled == []
