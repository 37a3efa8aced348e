"""JSON values against declared types: what holds, and how what does not is named."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

import pytest

from jaxmorph.config.settings import Within
from jaxmorph.storage.declared import mismatch


@dataclasses.dataclass
class Inner:
    best: float | None
    name: Literal["loss", "plateau"] | None = None


class Open(TypedDict):
    size: int


@dataclasses.dataclass
class Outer:
    count: Annotated[int, Within(low=0)]
    inner: Inner
    leaves: dict[str, tuple[str, list[int]]]
    files: Mapping[str, Open]
    anything: dict[str, Any]
    flags: list[bool]


GOOD = {
    "count": 0,
    "inner": {"best": 2, "name": None},
    "leaves": {"w": ["int8", [2, 3]]},
    "files": {"a": {"size": 1, "later": "too"}},
    "anything": {"x": [None, {"y": 1.5}]},
    "flags": [True, False],
}


def test_a_value_of_its_type_holds():
    assert mismatch(GOOD, Outer) is None
    assert mismatch(GOOD | {"inner": {"best": None, "name": "loss"}}, Outer) is None
    assert mismatch(GOOD | {"leaves": {}, "flags": []}, Outer) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": -1}, "count is -1, not a whole number ≥ 0"),
        ({"count": True}, "count is True, not a whole number ≥ 0"),
        ({"count": 2.0}, "count is 2.0, not a whole number ≥ 0"),
        ({"inner": []}, "inner is [], not an object"),
        ({"inner": {"best": 1.0}}, "inner.name is missing, not one of loss, plateau or null"),
        ({"inner": {"best": "1", "name": None}}, "inner.best is '1', not a finite number or null"),
        (
            {"inner": {"best": float("nan"), "name": None}},
            "inner.best is nan, not a finite number or null",
        ),
        (
            {"inner": {"best": 1, "name": "loss", "\x07": 1}},
            r"inner['\x07'] is 1, not the name of a field",
        ),
        ({"inner": {"best": 1, "name": []}}, "inner.name is [], not one of loss, plateau or null"),
        ({"leaves": {"w": ["int8"]}}, "leaves['w'] is ['int8'], not a list of 2"),
        ({"leaves": {"w": ["int8", [1, None]]}}, "leaves['w'][1][1] is None, not a whole number"),
        ({"files": {"a": {"later": 1}}}, "files['a'].size is missing, not a whole number"),
        ({"anything": "x"}, "anything is 'x', not an object"),
        ({"flags": [True, 0]}, "flags[1] is 0, not true or false"),
        ({"more": 1}, "['more'] is 1, not the name of a field"),
    ],
)
def test_the_first_value_of_another_type_is_named_with_its_place(change, said):
    assert mismatch(GOOD | change, Outer) == said


def test_at_the_top_there_is_no_place():
    assert mismatch(None, Outer) == "it is None, not an object"


def test_what_does_not_hold_is_named_in_one_short_printable_line():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("\x1b[2J\n\x9b", "x" * 10**6, deep, {"k" * 100: list(range(10**5))}, "\ud800"):
        words = str(mismatch({**GOOD, "count": value}, Outer))
        assert words.startswith("count is ")
        assert len(words) < 400
        assert words.isprintable()
    while deep:  # dropped at once, it would be taken apart by a recursion of that depth
        deep = deep.pop()
