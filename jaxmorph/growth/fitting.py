"""Whether the stages of a run fit the memory there is.

Only what certainly cannot fit is refused: parameters, gradients and optimizer state of a stage, or
the states before and after a change of shape, beyond the limit. Activations are estimated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.wording import short
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.run_shape import OperationError
from jaxmorph.config.settings import OptimizerSettings
from jaxmorph.growth.plan import Plan, Stage, meant_as_size
from jaxmorph.growth.schedule import refusal
from jaxmorph.model.architecture import parameter_count
from jaxmorph.step.memory import Memory, activations, memory

_STATE = "parameters and optimizer state"


@dataclass(frozen=True)
class Room:
    """The memory there is.

    Args:
      device: bytes by what limits them, in words, of the memory the devices compute in.
      sharing: how many devices share it: all where they are a CPU's.
      host: likewise of a host that is not itself the device; it holds a copy of the state to save.
    """

    device: Mapping[str, int] = field(default_factory=dict)
    sharing: int = 1
    host: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs at one time, and the limit that concerns them."""

    bytes: int
    words: str
    limits: Mapping[str, int]

    @property
    def limit(self) -> int | None:
        """Return the least of the limits; None: not known."""
        return min(self.limits.values(), default=None)

    @property
    def fits(self) -> bool:
        """Return whether it is within the limit, or that is not known."""
        return self.limit is None or self.bytes <= self.limit

    def __str__(self) -> str:
        need = f"{in_bytes(self.bytes)} for {self.words}"
        if self.limit is None:
            return need
        name = min(self.limits, key=self.limits.__getitem__)
        return f"{need}, of {in_bytes(self.limit)}, {name}"


@dataclass(frozen=True)
class Forecast:
    """The memory of a stage.

    Args:
      held: on each device, throughout.
      activations: likewise during a step: an estimate.
      change: of the states before and after the operation that leads to it; 0 if it moves none.
      certain: what the stage needs at least.
      expected: what it needs according to the estimate.
    """

    held: Memory
    activations: int
    change: int
    certain: tuple[Need, ...]
    expected: Need

    @property
    def lacking(self) -> Need | None:
        """Return what certainly does not fit; None if there is no such thing."""
        return next((need for need in self.certain if not need.fits), None)

    @property
    def verdict(self) -> str:
        """Return whether the stage fits, in a word."""
        if self.lacking:
            return "no"
        if self.expected.limit is None:
            return "-"
        return "yes" if self.expected.fits else "hardly"


def forecasts(
    stages: Sequence[Stage], optimizer: OptimizerSettings, mesh: MeshShape, room: Room
) -> list[Forecast]:
    """Return the memory of every stage; counted only where a stage has other programs."""
    sizes: list[_Sizes] = []
    for stage in stages:
        if not sizes or stage.recompiles:
            held, whole = memory(stage.shape, optimizer, mesh), memory(stage.shape, optimizer)
            sizes.append(_Sizes(held, whole, activations(stage.shape, mesh)))
        else:
            sizes.append(sizes[-1])
    return [
        _forecast(sizes[k - 1] if _moves(stage) else None, sizes[k], room)
        for k, stage in enumerate(stages)
    ]


def check_fits(plan: Plan, room: Room) -> list[str]:
    """Refuse a plan with a stage that certainly cannot fit; return warnings of what hardly will.

    Args:
      plan: completed.
      room: the memory there is.

    Raises:
      InputError: names the stage's entry, its sizes, what it needs, what there is, and the fix.
    """
    settings, warnings = plan.settings, []
    mesh = plan.mesh or MeshShape()
    for forecast, before, stage in zip(
        forecasts(plan.stages, settings.optimizer, mesh, room),
        [None, *plan.stages],
        plan.stages,
        strict=False,
    ):
        place = f"stage {stage.number}" + (f" ({stage.entry.name})" if stage.entry else "")
        if before is not None and not (stage.recompiles or forecast.change):
            continue  # as before
        if forecast.verdict == "hardly":
            warnings.append(f"{place} may not fit: {forecast.expected}")
        elif (lacking := forecast.lacking) and settings.scale.allow_oversized:
            warnings.append(f"{place} cannot fit: it needs {lacking}")
        elif lacking:
            raise _refusal(plan, before, stage, lacking)
    return warnings


def in_bytes(number: int) -> str:
    """Return a number of bytes as "1.23GB"."""
    return f"{short(number, 'kMGTPEZY')}B"


@dataclass(frozen=True)
class _Sizes:
    """What a stage holds on each device and over all of them, and its activations on each."""

    held: Memory
    whole: Memory
    activations: int


def _moves(stage: Stage) -> bool:
    """Return whether the operation that leads to a stage makes another state."""
    return stage.entry is not None and stage.entry.operation.kind == "morph"


def _forecast(before: _Sizes | None, now: _Sizes, room: Room) -> Forecast:
    """Return the forecast of a stage; `before` is None if its operation moves no state."""
    every, held, active = room.sharing, now.held, now.activations
    certain = [
        Need(every * held.total, "parameters, gradients and optimizer state", room.device),
        Need(now.whole.state, f"the copy of {_STATE} to save", room.host),
    ]
    change = 0 if before is None else before.held.state + held.state
    if change:
        words = f"{_STATE} before and after the operation"
        certain.append(Need(every * change, words, room.device))
    words = f"parameters, gradients, optimizer state and about {in_bytes(every * active)} of activations"
    step = Need(every * (held.total + active), words, room.device)
    expected = max(step, certain[-1] if change else step, key=lambda need: need.bytes)
    return Forecast(held, active, change, tuple(certain), expected)


def _refusal(plan: Plan, before: Stage | None, stage: Stage, lacking: Need) -> InputError:
    count = parameter_count(stage.shape.model)
    permits = "--allow_oversized permits it"
    if before is None or stage.entry is None:
        wanted = f"a model that fits: it needs {lacking}; {permits}"
        return InputError("the model at the start", "", f"{short(count)} parameters", wanted)
    entry = stage.entry
    sizes = ", ".join(
        f"{name} {was:,} -> {now:,}"
        for name, was in dataclasses.asdict(before.shape.model).items()
        if isinstance(was, int) and was != (now := getattr(stage.shape.model, name))
    )
    counts = f"{short(parameter_count(before.shape.model))} -> {short(count)} parameters"
    wanted = f"a model that fits ({sizes + '; ' if sizes else ''}{counts}): it needs {lacking}"
    hint = meant_as_size(before.shape.model, stage.shape.model, entry.value)
    error = OperationError(entry.value, "; ".join(filter(None, [wanted, hint, permits])))
    where = str(plan.settings.growth.scaling_schedule_file)
    return refusal(where, entry.number, entry.name, error)
