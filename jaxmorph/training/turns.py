"""What happens after a step: a list of named turns, taken in this order if they are due.

A turn sees the whole run and may change what it declares. What it must remember between calls is
stored in the state (a variable) or in the position (`run.remember`), both part of every checkpoint,
so that a resumed run continues exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from jaxmorph.training.control import (
    control,
    control_is_due,
    layer_boosts_are_due,
    set_layer_boosts,
)
from jaxmorph.training.run import Run

CHANGEABLE = ("state", "position", "stage")  # the parts of a run that a turn may change


@dataclass(frozen=True)
class Turn:
    """Something the loop does after a step, and before the first.

    Args:
      name: of the turn.
      due: whether to run it now.
      act: runs it.
      changes: the parts of the run it may change, from `CHANGEABLE`; the loop checks the rest.
    """

    name: str
    due: Callable[[Run], bool]
    act: Callable[[Run], None]
    changes: Collection[str] = ()

    def __post_init__(self) -> None:
        assert set(self.changes) <= set(CHANGEABLE), self.changes


TURNS = (
    Turn(  # first: evaluations and triggers judge the gates that training goes on with
        "control",
        due=control_is_due,
        act=control,
        changes=("state",),
    ),
    Turn(
        "evaluate",
        due=lambda run: run.is_last or run.step % run.stage.shape.eval_interval == 0,
        act=lambda run: run.evaluate(),
        changes=("state", "position"),
    ),
    Turn(
        "operate",
        due=lambda run: run.operation_due() is not None,
        act=lambda run: run.operate_while_due(),
        changes=CHANGEABLE,
    ),
    Turn(
        "boost",
        due=layer_boosts_are_due,
        act=set_layer_boosts,
        changes=("state",),
    ),
    Turn(
        "save",
        due=lambda run: run.is_stopping or run.step % run.checkpoint_interval == 0,
        act=lambda run: run.save(),
    ),
)


def take_turns(run: Run, turns: Sequence[Turn]) -> None:
    """Run the turns that are due after a step, in order."""
    for turn in turns:
        if not turn.due(run):
            continue
        before = {name: getattr(run, name) for name in CHANGEABLE if name not in turn.changes}
        turn.act(run)
        changed = [name for name, value in before.items() if getattr(run, name) is not value]
        if changed:
            raise RuntimeError(f"turn {turn.name!r} changed what it does not name: {changed}")


def retry_operation(run: Run, turns: Sequence[Turn]) -> None:
    """Go on after a step whose operation failed, from the turn that failed."""
    names = [turn.name for turn in turns]
    run.look_again()
    take_turns(run, turns[names.index("operate") : -1])
    run.save()


def catch_up(run: Run, turns: Sequence[Turn]) -> None:
    """Perform the operations that are due where a run goes on: an edited schedule may have some.

    With the schedule as it was nothing is due, as it was all done before the checkpoint was saved.
    """
    run.look_again()
    take_turns(run, [turn for turn in turns if turn.name == "operate"])
    run.new_loss = None


def check_turns(turns: Sequence[Turn]) -> None:
    """Check that a run with these turns can be resumed exactly.

    Raises:
      ValueError: the last one is not "save", so that what follows it would be lost; or two share a
        name.
    """
    names = [turn.name for turn in turns]
    if not names or names[-1] != "save" or len(set(names)) < len(names):
        raise ValueError(f"turns {names}: expected different names, the last one 'save'")
