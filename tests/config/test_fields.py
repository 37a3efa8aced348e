"""What is true of a setting is read from its annotation, and nowhere else said."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from jaxmorph.cli.errors import InputError
from jaxmorph.config.fields import changeable, fields_of, values_of
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings import (
    Changeable,
    ExistingFile,
    PathTo,
    RunSettings,
    Settings,
    Within,
)


@dataclasses.dataclass(frozen=True)
class MoreRunSettings(RunSettings):
    """Settings as this test adds them; nothing else knows of them."""

    plain: int = 1
    """Nothing is said of it."""
    share: Annotated[float, Within(above=0, high=1)] | None = None
    """A range inside a union."""
    words: Changeable[ExistingFile | None] = None
    """A file a resumed run may name another one of."""
    sink: Annotated[str, PathTo("a folder", Path.is_dir, ("none", "screen"))] = "none"
    """A folder, or a word."""


@dataclasses.dataclass(frozen=True)
class MoreSettings(Settings):
    """All of them, and those above."""

    run: MoreRunSettings = dataclasses.field(default_factory=MoreRunSettings)


def more(*argv: str) -> dict:
    return values_of(resolve(argv, defaults=MoreSettings())[0])


def test_a_field_added_to_the_settings_is_known_to_every_check(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "words.txt").write_text("words")
    file = tmp_path / "configs" / "settings.yaml"
    file.write_text("words: ../words.txt\nsink: screen\nshare: 1\nplain: 7\n")
    monkeypatch.chdir(tmp_path)
    values = more("--config", str(file))
    assert values["words"] == str(tmp_path / "words.txt")
    assert (values["sink"], values["share"], values["plain"]) == ("screen", 1.0, 7)
    assert more("--config", str(file), "--sink", "configs")["sink"] == str(tmp_path / "configs")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--share", "1.5"], "--share: got 1.5, expected a number > 0 and ≤ 1"),
        (["--share", "nan"], "--share: got nan, expected a finite number"),
        (["--words", "nowhere"], "expected an existing file$"),
        (["--sink", "scren"], r"none, screen or a folder \(did you mean 'screen'\?\)"),
    ],
)
def test_a_field_added_to_the_settings_is_refused_by_every_check(argv, said):
    with pytest.raises(InputError, match=said):
        more(*argv)


@pytest.mark.parametrize("name", [n for n, f in fields_of(Settings).items() if float in f.types])
def test_every_number_is_refused_where_float32_cannot_hold_it(name):
    """The oracle is NumPy's float32, whose smallest normal number is the smallest that is kept."""
    field = fields_of(Settings)[name]
    for value in (1e-300, 1e-46, 1e-39, 1e39, 1e300, 10**400, math.inf, math.nan):
        assert field.problem(value), value
    tiny, small = (float(n) for n in (np.finfo(np.float32).tiny, np.finfo(np.float32).eps))
    for value in (tiny, 0.5, 1 - small):
        assert np.float32(value) != 0
        assert field.problem(value) is None, value
    below_one = 1 - small / 8
    assert np.float32(below_one) == 1
    assert field.within is not None
    assert (field.problem(below_one) is None) == (field.within.below > 1)


def test_a_run_is_resumed_with_another_value_only_where_the_field_says_so():
    fields = fields_of(MoreSettings)
    names = ("plain", "share", "words", "sink", "max_steps", "seed")
    assert {name: fields[name].changeable for name in names} == {
        "plain": False,
        "share": False,
        "words": True,
        "sink": False,
        "max_steps": True,
        "seed": False,
    }
    assert changeable("eval_interval")
    assert not changeable("learning_rate")


def test_what_decides_the_next_step_is_not_changeable():
    """Groups in which nothing may change, whatever is added to them; and those that only look on."""
    changing = {name for name, field in fields_of(Settings).items() if field.changeable}
    groups = {name: fields_of(Settings)[name].group for name in changing}
    assert {group for group in groups.values() if group == "model"} == set()
    assert {name for name in changing if groups[name] == "optimizer"} == {"allow_warmup_past_end"}
    assert {name for name in changing if groups[name] == "data"} == {"data", "cache_dir"}
