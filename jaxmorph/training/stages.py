"""The programs of a run's stages, compiled while the previous stage trains.

A stage needs other programs than the previous one if its architecture, its batch or its trained
layers differ. Its step and evaluation, the morph to it and the probe that compares the two models
are compiled in one background thread as soon as the previous stage is running, so that the change
itself costs about as much as a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from jaxmorph.config.run_shape import RunShape
from jaxmorph.growth.plan import Plan, Stage
from jaxmorph.morphs import Report
from jaxmorph.step.programs import Programs, make_programs
from jaxmorph.step.sharding import batch_sharding, mesh_shape, place_batch, replicated
from jaxmorph.step.state import Start, TrainState
from jaxmorph.step.task import Batch
from jaxmorph.system.background import Background
from jaxmorph.system.crash_points import crash_point
from jaxmorph.system.host_memory import available_memory
from jaxmorph.training import transitions
from jaxmorph.training.choice import by_importance
from jaxmorph.training.head_meter import head_batch_rows
from jaxmorph.training.tables import Tables

_PROBE_TOKENS = 256  # at most, per sequence
_AHEAD = 2  # stages compiled ahead of time: two operations may fire in immediate succession


class _Key(NamedTuple):
    """A background task: "programs", "heads", "change" or "rehearsal", and the number of its stage."""

    kind: str
    stage: int


@dataclass(frozen=True)
class Change:
    """The compiled morph to a stage.

    Args:
      morph: from the old state, and the heads that the operation acts on if it does, as bool
        [layer, head], to (state, report, whether it is finite).
      function_delta: (old state, new state, probe tokens) -> see `transitions`.
      probe: shape of the probe tokens.
    """

    morph: Callable[..., tuple[TrainState, Report, jax.Array]]
    function_delta: Callable[..., jax.Array]
    probe: tuple[int, int]


class StageCompiler:
    """Compile the programs of a plan's stages, each once, ahead of time if possible.

    Nothing is compiled ahead for stages after an operation that still has something to decide.

    Args:
      plan: the run's completed plan.
      mesh: the device mesh.
      validation: shapes and dtypes of each distinct validation batch of a stage.
      tables: the tables that define the run.

    Attributes:
      plan: the run's plan, with all that has been decided; `replan` replaces it.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        validation: Callable[[RunShape], Sequence[Batch]],
        tables: Tables,
    ):
        self.plan, self.mesh = plan, mesh
        self._validation, self.tables = validation, tables
        self._uncompiled: dict[int, Programs] = {}
        self._background = Background(self._compile)

    def replan(self, plan: Plan) -> None:
        """Go on with a plan in which another entry is decided, or none of those that were.

        The programs of all stages that differ are dropped.
        """
        pairs = zip(self.plan.stages, plan.stages, strict=True)
        first = next((k for k, (old, new) in enumerate(pairs) if old != new), len(plan.stages))
        self._background.forget(lambda key: key.stage >= first)
        self._uncompiled = {k: v for k, v in self._uncompiled.items() if k < first}
        self.plan = plan

    def uncompiled(self, index: int) -> Programs:
        """Return the programs of stage `index`, not yet compiled; the same objects each time."""
        if index not in self._uncompiled:
            assert self.plan.total_steps is not None
            shape = self.plan.stages[index].shape
            start = Start(self.plan.settings, shape, self.plan.total_steps)
            self._uncompiled[index] = make_programs(start, self.mesh, self.tables.step)
        return self._uncompiled[index]

    def initial_state(self) -> TrainState:
        """Return the state before the first step."""
        init: Any = self.uncompiled(0).init
        return init.lower().compile(_quick_compilation(self.mesh.devices.flat[0].platform))()

    def programs(self, index: int) -> Programs:
        """Return the step and the evaluation of stage `index`, compiled now if they are not yet.

        Raises:
          Exception: what compiling them raised, such as out of memory.
        """
        # The caller runs them now.
        self._background.forget(lambda key: key == _Key("rehearsal", index))
        return self._background.result(_Key("programs", self._first_with_programs_of(index)))

    def change(self, index: int) -> Change:
        """Return the morph to stage `index`, compiled now if it is not yet.

        Raises:
          Exception: see `programs`.
        """
        return self._background.result(_Key("change", index))

    def for_heads(self, index: int) -> Programs:
        """Return the programs that measure the heads of stage `index`, compiled now if they are not yet.

        Raises:
          Exception: see `programs`.
        """
        return self._background.result(_Key("heads", self._first_with_programs_of(index)))

    def prefetch_after(self, index: int) -> None:
        """Compile the stages after `index` in the background; drop those before it."""
        oldest = self._first_with_programs_of(index)
        self._background.forget(lambda key: key.stage < oldest)
        if self.plan.settings.growth.precompile == "off":
            return
        self._background.want([_Key("heads", oldest)] * self._measures_heads)
        later = [self._work_for(k) for k in range(index + 1, self._first_undecided())]
        self._background.want(key for work in [w for w in later if w][:_AHEAD] for key in work)

    def wait(self) -> None:
        """Wait for all background compilations."""
        self._background.wait()

    def close(self) -> None:
        """Wait for the running compilation: a process must not exit in the middle of one."""
        self._background.close()

    def _compile(self, key: _Key) -> Any:
        work: dict[str, Callable[[int], Any]] = {
            "programs": self._compile_programs,
            "heads": self._compile_for_heads,
            "change": self._compile_change,
            "rehearsal": self._rehearse,
        }
        return work[key.kind](key.stage)

    def _work_for(self, index: int) -> list[_Key]:
        """Return the background tasks for the operation that leads to stage `index`."""
        entry = self.plan.stages[index].entry
        morph = entry is not None and entry.operation.kind == "morph"
        compiled = ["programs"] + ["heads"] * self._measures_heads
        kinds = compiled * (self._first_with_programs_of(index) == index)
        kinds += ["change"] * morph + ["rehearsal"] * (morph and self._can_rehearse())
        chooses = entry is not None and by_importance(entry)
        before = [_Key("heads", self._first_with_programs_of(index - 1))] * chooses
        return [*before, *(_Key(kind, index) for kind in kinds)]

    def _first_undecided(self) -> int:
        """Return the first stage whose shape is not known yet, or the number of stages."""
        entries = self.plan.entries
        return next((e.number for e in entries if e.is_undecided), len(self.plan.stages))

    def _first_with_programs_of(self, index: int) -> int:
        """Return the first stage with the same programs as stage `index`."""
        stages = self.plan.stages
        return next((k for k in range(index, 0, -1) if stages[k].recompiles), 0)

    @property
    def _measures_heads(self) -> bool:
        """Return whether the run measures heads from time to time."""
        return self.plan.settings.heads.enable_controller

    def _batch(self, shape: RunShape) -> Batch:
        return self.tables.step.task.spec(shape.batch_size, shape.model.seq_len)

    def _compile_programs(self, index: int) -> Programs:
        shape = self.plan.stages[index].shape
        programs = self.uncompiled(index).compiled(self._batch(shape), self._validation(shape))
        crash_point("compiling")
        return programs

    def _compile_for_heads(self, index: int) -> Programs:
        shape = self.plan.stages[index].shape
        rows = head_batch_rows(shape, mesh_shape(self.mesh))
        batch = self.tables.step.task.spec(rows, shape.model.seq_len)
        return self.uncompiled(index).compiled_for_heads(batch)

    def _compile_change(self, index: int) -> Change:
        old, new = (self.plan.stages[k] for k in (index - 1, index))
        assert new.entry is not None
        before, after, everywhere = (
            self.uncompiled(index - 1),
            self.uncompiled(index),
            replicated(self.mesh),
        )
        change = transitions.Morphing(
            new.entry, old.shape, new.shape, self.tables.morphs[new.entry.name], self.tables.step
        )
        heads = _heads_acted_on(new)
        morph = jax.jit(
            lambda state, *heads: change(state, after.optimizer, *heads),
            in_shardings=(before.state_shardings, *[everywhere] * len(heads)),
            out_shardings=(after.state_shardings, None, everywhere),
        ).trace(before.abstract_state, *heads)
        _check_same(morph.out_info[0], after.abstract_state)
        models = old.shape.model, new.shape.model
        probe = (
            mesh_shape(self.mesh).batch_parts,
            min(*(model.seq_len for model in models), _PROBE_TOKENS),
        )
        delta = jax.jit(
            lambda *arguments: transitions.function_delta(*models, *arguments),
            in_shardings=(
                before.state_shardings,
                after.state_shardings,
                batch_sharding(self.mesh),
            ),
            out_shardings=everywhere,
        )
        tokens = jax.ShapeDtypeStruct(probe, jnp.int32)
        return Change(
            morph.lower().compile(),
            delta.lower(before.abstract_state, after.abstract_state, tokens).compile(),
            probe,
        )

    def _can_rehearse(self) -> bool:
        """Whether programs may run during a step: only on a single CPU device; others take turns."""
        devices = self.mesh.devices
        return devices.size == 1 and devices.flat[0].platform == "cpu"

    def _rehearse(self, index: int) -> None:
        """Run the morph to stage `index` and its programs once, on zeros, if there is enough memory."""
        before, after = self.uncompiled(index - 1), self.uncompiled(index)
        programs, change = self.programs(index), self.change(index)
        shape, accumulate = self.plan.stages[index].shape, cast(Compiled, programs.accumulate)
        working = accumulate.memory_analysis()
        needed = _size((before.abstract_state, after.abstract_state, after.abstract_state.params))
        needed += 0 if working is None else working.temp_size_in_bytes
        if needed > (available_memory() or 0) // 2:
            return
        state = jax.tree.map(
            lambda leaf, where: jax.device_put(np.zeros(leaf.shape, leaf.dtype), where),
            before.abstract_state,
            before.state_shardings,
        )
        none = [np.zeros(heads.shape, bool) for heads in _heads_acted_on(self.plan.stages[index])]
        new, _, _ = change.morph(state, *none)
        probe = jax.ShapeDtypeStruct(change.probe, jnp.int32)
        results: list[Any] = [change.function_delta(state, new, self._zeros(probe))]
        if (
            self._first_with_programs_of(index) == index
        ):  # otherwise the current programs, which have run
            batch = self._zeros(self._batch(shape))
            results.append(programs.accumulate(new, programs.zero_sums(), batch, np.int32(0)))
            results += [programs.evaluate(new, self._zeros(b)) for b in self._validation(shape)]
        jax.block_until_ready(results)

    def _zeros(self, spec: Batch) -> Batch:
        return place_batch(
            self.mesh, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec)
        )


def _heads_acted_on(stage: Stage) -> list[jax.ShapeDtypeStruct]:
    """Return what the morph to a stage takes besides the state: the heads it acts on, or nothing."""
    model = stage.shape.model
    acts = stage.entry is not None and stage.entry.operation.heads
    return [jax.ShapeDtypeStruct((model.n_layers, model.n_heads), bool)] if acts else []


def _size(abstract: Any) -> int:
    """Return the bytes of a pytree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def _check_same(got: Any, wanted: Any) -> None:
    """Check a morph's result against a fresh state of the architecture: structure, shapes, dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted), "another structure"
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype), (path, leaf, other)


def _quick_compilation(platform: str) -> dict[str, Any]:
    """Return XLA's options for a program that runs once, where compile time dominates.

    On CPU, without LLVM's optimisations and, in jaxlib 0.10, with the fastest emitters, the
    initialisation of parameters compiles about eight times as fast.
    """
    if platform != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):  # later versions lack the option
        options["xla_cpu_use_fusion_emitters"] = False
    return options
