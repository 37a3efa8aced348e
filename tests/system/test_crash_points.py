"""The named moments at which tests kill a run."""

import os
import signal

import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.system import crash_points
from jaxmorph.system.crash_points import crash_point


@pytest.fixture
def kills(monkeypatch):
    """The signals this process would have been sent."""
    sent = []
    monkeypatch.setattr(crash_points.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(crash_points, "_passed", type(crash_points._passed)())
    return sent


@pytest.mark.parametrize(("wanted", "passing"), [("step", 1), ("step:1", 1), ("step:3", 3)])
def test_crash_point_kills_at_the_named_passing_only(monkeypatch, kills, wanted, passing):
    monkeypatch.setenv("JAXMORPH_CRASH_AT", wanted)
    for number in range(1, 6):
        crash_point("before_save")
        crash_point("step")
        assert len(kills) == (number >= passing)
    assert kills == [(os.getpid(), signal.SIGKILL)]


def test_crash_point_is_inert_by_default(monkeypatch, kills):
    monkeypatch.delenv("JAXMORPH_CRASH_AT", raising=False)
    for name in crash_points.POINTS:
        crash_point(name)
    assert kills == []


@pytest.mark.parametrize(
    "wanted", ["stepp", "step:0", "step:x", "step:", "step:-1", ":2", "step:²"]
)
def test_unknown_crash_point_is_refused(monkeypatch, kills, wanted):
    monkeypatch.setenv("JAXMORPH_CRASH_AT", wanted)
    with pytest.raises(InputError, match="JAXMORPH_CRASH_AT"):
        crash_point("step")
    with pytest.raises(AssertionError):
        crash_point("nowhere")
    assert kills == []
