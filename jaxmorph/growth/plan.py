"""A run's plan: the schedule's entries and all its stages, known in advance.

A *stage* is the run between two operations; stage k is the run after k operations. What an operation
decides only when it fires (`decisions`) is known in advance as the largest and the smallest case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxmorph.cli.errors import InputError
from jaxmorph.config.heads import limits_problem
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.run_shape import OperationError, RunShape, overflow, whole_product
from jaxmorph.config.settings import Settings
from jaxmorph.config.start import known_vocab_size, start_shape, start_warnings, total_steps
from jaxmorph.growth.decisions import Decided, decided
from jaxmorph.growth.operations import OPERATIONS, Operation
from jaxmorph.growth.schedule import Entry, load_schedule, refusal
from jaxmorph.growth.values import Given, written

_LARGE_FACTOR = 16  # of which one wonders whether it was meant


@dataclass(frozen=True)
class Stage:
    """A run between two operations, or before the first, or after the last.

    Args:
      number: the number of operations before it.
      entry: the last of them; None at the start.
      shape: sizes and numbers of the run; while an operation before it is undecided, the largest.
      recompiles: whether it needs other programs than the previous stage, or may.
      exact: whether the operation preserves the function.
      warnings: oddities of the operation that were accepted.
      least: the smallest shape it can have; None: there is only one.
      bounds: what its operation can still lead to, in words; "" if nothing is open.
    """

    number: int
    entry: Entry | None
    shape: RunShape
    recompiles: bool = False
    exact: bool = True
    warnings: tuple[str, ...] = ()
    least: RunShape | None = None
    bounds: str = ""

    @property
    def smallest(self) -> RunShape:
        """Return the smallest shape it can have."""
        return self.shape if self.least is None else self.least

    @property
    def may_be_smaller(self) -> bool:
        """Return whether the model's sizes are not known yet."""
        return self.smallest.model != self.shape.model


@dataclass(frozen=True)
class Plan:
    """What a run will do, as far as it is known.

    Args:
      settings: the checked settings.
      mesh: where it runs; None: on all devices, which are not known yet.
      entries: the operations, in the order they fire.
      stages: stage k is the run after k of them; a model's vocabulary is 0 until known from the
        corpus.
      total_steps: steps of the run; None until known from the corpus.
    """

    settings: Settings
    mesh: MeshShape | None
    entries: tuple[Entry, ...]
    stages: tuple[Stage, ...]
    total_steps: int | None

    @property
    def start(self) -> RunShape:
        """Return the shape the run starts with."""
        return self.stages[0].shape

    def completed(self, *, vocab_size: int, total: int, mesh: MeshShape | None = None) -> Plan:
        """Return the plan completed with facts about the corpus and the devices, and checked again.

        Args:
          vocab_size: of the tokenizer.
          total: steps of the run.
          mesh: where it runs; None: as planned.

        Raises:
          InputError: a batch that the mesh does not divide, or an operation that cannot be applied.
        """
        mesh = mesh or self.mesh or MeshShape()
        if (size := self.start.batch_size) % mesh.batch_parts:  # the devices were not known before
            wanted = f"a multiple of {mesh.batch_parts_in_words}"
            raise InputError("--batch_size", "", size, wanted)
        return _planned(self.settings, self.entries, mesh, vocab_size, total)

    @property
    def decisions(self) -> dict[str, Decided]:
        """Return what operations have decided when they fired, by the number of their entry."""
        return {str(e.number): e.decided for e in self.entries if e.decided is not None}

    def with_decisions(self, decisions: Mapping[str, Sequence[Sequence[int]]]) -> Plan:
        """Return a completed plan made again with what operations have decided.

        Args:
          decisions: by the number of the entry; those before stay.

        Raises:
          InputError: an operation that cannot be applied after that.
        """
        entries = tuple(
            replace(e, decided=decided(decisions[str(e.number)]))
            if str(e.number) in decisions
            else e
            for e in self.entries
        )
        vocab_size = self.start.model.vocab_size
        return _planned(self.settings, entries, self.mesh, vocab_size, self.total_steps)


def make_plan(
    settings: Settings,
    mesh: MeshShape | None,
    operations: Mapping[str, Operation] = OPERATIONS,
) -> Plan:
    """Return the plan for the settings; without a schedule it has a single stage.

    Anything that depends on the corpus or the devices is left open: see `Plan.completed`.

    Args:
      settings: the checked settings.
      mesh: the mesh they name; None: all devices on data.
      operations: what the schedule may contain, by name.

    Raises:
      InputError: a schedule that cannot be read, or an operation that cannot be applied.
    """
    file = settings.growth.scaling_schedule_file
    entries = () if file is None else load_schedule(Path(file), operations)
    return _planned(
        settings, entries, mesh, known_vocab_size(settings), total_steps(settings, None)
    )


def _planned(
    settings: Settings,
    entries: tuple[Entry, ...],
    mesh: MeshShape | None,
    vocab_size: int | None,
    total: int | None,
) -> Plan:
    start = start_shape(settings, vocab_size, total)
    if problem := overflow(start):  # the vocabulary may have been unknown before
        name, size, wanted = problem
        raise InputError(f"--{name}", "", size, wanted)
    where = str(settings.growth.scaling_schedule_file)
    limit = None if settings.optimizer.allow_warmup_past_end else total
    first, *later = walk(entries, start, mesh or MeshShape(), where, limit)
    most = max(stage.shape.model.n_heads for stage in (first, *later))
    if problem := limits_problem(settings.heads, most):
        name, got, wanted = problem
        raise InputError(f"--{name}", "", got, wanted)
    first = dataclasses.replace(first, warnings=tuple(start_warnings(settings, start)))
    return Plan(settings, mesh, entries, (first, *later), total)


def walk(
    entries: Sequence[Entry],
    start: RunShape,
    mesh: MeshShape,
    where: str,
    total: int | None = None,
) -> list[Stage]:
    """Return the stages of a run: the start, then one after each entry.

    Args:
      entries: the schedule.
      start: the shape the run starts with.
      mesh: the mesh that batches are sharded over.
      where: the file, for messages.
      total: steps of the run, to check that warmups are shorter; None: not checked.

    Raises:
      InputError: an operation that cannot be applied to the shape before it.
    """
    stages = [Stage(0, None, start)]
    for entry in entries:
        try:
            stage = _next_stage(stages[-1], entry, mesh)
            _check_batch(stages[-1].shape, stage.shape, entry, mesh)
            _check_warmup(stages[-1].shape, stage.shape, entry, total)
            if not any(each.decided for each in entries):  # what is left may be nothing by then
                _check_decides(stage, mesh)
        except OperationError as error:
            raise refusal(where, entry.number, entry.name, error) from None
        stages.append(stage)
    return stages


def _next_stage(before: Stage, entry: Entry, mesh: MeshShape) -> Stage:
    operation, shape = entry.operation, before.shape
    after = operation.next_shape(shape, entry.value, entry.options, entry.decided)
    if problem := overflow(after):
        name, size, wanted = problem
        raise OperationError(entry.value, f"a value after which {name} ({size}) has {wanted}")
    options = operation.with_defaults(entry.options)
    exact = operation.exact(shape, after, options)
    least, problem = _smallest(before, entry, after, mesh)
    same = shape == after and before.smallest == least
    warnings = entry.warnings + _warnings(entry, shape, after, exact=exact, same=same)
    open_ = operation.decision if entry.is_undecided else None
    return Stage(
        before.number + 1,
        entry,
        after,
        recompiles=open_ is not None
        or after.program_key != shape.program_key
        or least.program_key != before.smallest.program_key,
        exact=exact,
        warnings=(*warnings, problem) if problem else warnings,
        least=None if least == after else least,
        bounds="" if open_ is None else open_.bounds(least, after, mesh),
    )


def _smallest(
    before: Stage, entry: Entry, after: RunShape, mesh: MeshShape
) -> tuple[RunShape, str]:
    """Return the smallest shape that an entry can lead to, and why that may not be possible."""
    open_ = entry.operation.decision if entry.is_undecided else None
    if before.least is None:
        return after if open_ is None else open_.least(after, mesh), ""
    try:
        least = entry.operation.next_shape(before.least, entry.value, entry.options, entry.decided)
        return least if open_ is None else open_.least(least, mesh), ""
    except OperationError as error:
        heads = before.least.model.n_heads
        problem = f"{entry.title} may fail: with n_heads {heads} it takes {error.expected}"
        return after.with_model(n_heads=min(heads, after.model.n_heads)), problem


def meant_as_size(before: ModelConfig, after: ModelConfig, value: Given) -> str:
    """Return the hint that a factor was written like a size; "" if it was not.

    Args:
      before: the architecture before the operation.
      after: the architecture after it.
      value: the operation's.
    """
    if not isinstance(value, float | int):
        return ""
    for name, was in dataclasses.asdict(before).items():
        now = getattr(after, name)
        if isinstance(was, int) and was != now == was * value and 1 < was < value:
            factor, size = written(value / was), written(value)
            other = f", as does set_{name} {size}" if f"set_{name}" in OPERATIONS else ""
            return f"{size} is a factor here: {factor} gives {name} {size}{other}"
    return ""


def _warnings(
    entry: Entry, before: RunShape, after: RunShape, *, exact: bool, same: bool
) -> tuple[str, ...]:
    operation, value = entry.operation, entry.value
    said = f"{operation.name} {written(value)}"
    if operation.decision is not None and before.model == after.model:
        if entry.decided is not None:
            return (f"{operation.name} changes nothing: in some layer no head can leave",)
        if not (before.closed.most or before.closed.controlled):
            fix = "set_gates or prune_heads before it, or --enable_controller"
            return (f"{operation.name} changes nothing: no head is closed by then ({fix})",)
    if value is not None and same and not operation.heads:
        return (f"{said} changes nothing",)
    if not exact and operation.loss:
        return (f"{said} changes the function: {operation.loss}",)
    if operation.count and isinstance(value, float | int):
        old, new = getattr(before, operation.count), getattr(after, operation.count)
        if whole_product(old, value) != new:
            product = f"{old} × {written(value)} = {old * value:g}"
            return (f"{operation.count}: {product}, rounded to {new}",)
    hint = meant_as_size(before.model, after.model, value)
    large = isinstance(value, float | int) and value >= _LARGE_FACTOR
    return (f"{operation.name}: {hint}",) if hint and large else ()


def _check_decides(stage: Stage, mesh: MeshShape) -> None:
    """Check that the mesh lets an operation which decides later change anything, in the best case."""
    if stage.bounds and 1 < stage.shape.model.n_heads <= mesh.tensor:
        wanted = f"an operation that can change something; here {stage.bounds}"
        raise OperationError(stage.entry.name if stage.entry else "", wanted, "name")


def _check_batch(before: RunShape, after: RunShape, entry: Entry, mesh: MeshShape) -> None:
    size, parts = after.batch_size, mesh.batch_parts
    if size % parts == 0 or size == before.batch_size:
        return
    near = [n for n in (size // parts * parts, -(-size // parts) * parts) if n > 0]
    wanted = f"a batch that divides over {mesh.batch_parts_in_words}"
    if entry.operation.count:
        old = before.batch_size
        works = [f"{written(n / old)} gives {n}" for n in near]
        wanted += f", not {old} × {written(entry.value)} = {size}"
    else:
        works = [str(n) for n in near]
    raise OperationError(entry.value, f"{wanted}: {', '.join(works)}")


def _check_warmup(before: RunShape, after: RunShape, entry: Entry, total: int | None) -> None:
    warmup = after.warmup_steps
    if total is not None and warmup >= total and warmup != before.warmup_steps:
        raise OperationError(
            entry.value,
            f"a warmup shorter than the {total} steps of the run, not of {warmup} "
            "(--allow_warmup_past_end permits it)",
        )
