"""The message about an operation."""

import dataclasses
from pathlib import Path

from jaxmorph.config.resolve import resolve
from jaxmorph.growth.plan import make_plan
from jaxmorph.morphs import Report
from jaxmorph.training.announcement import announcement
from jaxmorph.training.operate import OperationResult
from jaxmorph.training.position import Position

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_a_description_stays_in_its_line_and_acts_on_no_terminal():
    plan = make_plan(resolve(["--config", str(DEMO)])[0], None).completed(vocab_size=256, total=500)
    before, after = plan.stages[:2]
    assert after.entry is not None
    said = "\x1b[2J\r\n=== Done in 0.00 s ===\u202e" + "x" * 100_000
    entry = dataclasses.replace(after.entry, desc=said)
    done = OperationResult(
        before=before,
        after=dataclasses.replace(after, entry=entry),
        position=Position(step=100, val_loss=2.0),
        reason="loss",
        report=Report(()),
        function_delta=0.0,
        seconds=0.1,
        waited=0.0,
    )
    lines = announcement(done, 3).splitlines()
    assert [line for line in lines if line.startswith("=== Done")] == lines[-1:]
    assert lines[1].startswith(r"  \x1b[2J\r\n=== Done in 0.00 s ===\u202exxx")
    assert lines[1].isprintable()
    assert len(lines[1]) < 1000
