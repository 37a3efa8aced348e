"""Hostile and unlucky inputs, written down and generated: accepted, or refused in one clean line."""

import json
import math
import os
import re
import struct
import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import odd_inputs
import pytest
import yaml
from dry_runs import planned, told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmorph.cli.errors import InputError
from jaxmorph.config.fields import fields_of, values_of
from jaxmorph.config.settings import Settings
from jaxmorph.config.settings_file import to_yaml
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.schedule import load_schedule, schedule_json
from jaxmorph.train import main

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SECONDS = 3  # of this process; a machine that does other things too makes them no longer


def test_two_hundred_inputs_are_written_down():
    tables = (odd_inputs.CONFIGS, odd_inputs.SCHEDULES, odd_inputs.CURVES, odd_inputs.FLAGS)
    assert sum(map(len, tables)) >= 200


def test_written_files_are_accepted_or_refused_with_the_reason(tmp_path):
    odd_inputs.make_places(tmp_path)
    wrong = {}
    for argv, said, path in odd_inputs.rows(tmp_path):
        if path is None:
            continue
        flags = dict(zip(argv[::2], argv[1::2], strict=True))
        config = Path(flags["--config"]) if "--config" in flags else None
        names = ("scaling_schedule_file", "simulate_loss")
        given = {name: flags[f"--{name}"] for name in names if f"--{name}" in flags}
        curve, start = flags.get("--simulate_loss"), time.process_time()
        before = path.read_bytes()
        try:
            shown = told(planned(config, dry_run=True, **given), Path(curve) if curve else None)
            wrong[str(path)] = "accepted" if said is not None else clean(shown)
        except InputError as error:
            shown = str(error)
            fits = said is not None and said.lower() in shown.lower()
            wrong[str(path)] = clean(shown, 1) if fits else f"{said!r} not in {shown!r}"
            assert str(path.parent) in shown or shown.startswith("--")
        assert time.process_time() - start < SECONDS, path
        assert path.read_bytes() == before
    assert {path: problem for path, problem in wrong.items() if problem} == {}


def clean(shown: str, lines: int | None = None) -> str:
    """What is wrong with a printed text; "" for nothing."""
    if found := CONTROL.search(shown):
        return f"prints {found[0]!r}"
    return "" if lines in (None, shown.count("\n") + 1) and len(shown) < 50_000 else "too long"


@pytest.mark.parametrize("number", range(len(odd_inputs.FLAGS)))
def test_written_flags_are_accepted_or_refused_with_the_reason(
    number, tmp_path, capsys, monkeypatch
):
    argv, said = odd_inputs.FLAGS[number]
    odd_inputs.make_places(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    status = main([*(word.replace("{tmp}", str(tmp_path)) for word in argv), "--dry_run"])
    out, err = capsys.readouterr()
    assert clean(out + err) == ""
    assert status == (0 if said is None else 2)
    assert sorted(os.listdir(tmp_path)) == before
    if said is not None:
        assert (out, err.count("\n")) == ("", 1)
        assert said in err
        assert len(err) < 3000


# --------------------------------------------------------------- generated ones

FIELDS = fields_of(Settings)
PATHS = {name for name, field in FIELDS.items() if field.path}
EDGES = [0, -0.0, 1e-300, 5e-324, 1.1e-38, 1.2e-38, 1e38, 1e39, 1e308, 2**31 - 1, 2**31, 10**399]
EDGES += [math.inf, -math.inf, math.nan, 0.9999999999, 1.0000000001, -1, 1, 2, 0.5]
text = st.text(max_size=12) | st.sampled_from(
    ["\x1b[31m", "\u202e", "", "~", "1_0", "١٢", "x" * 999]
)
odd = st.sampled_from(EDGES) | st.floats() | st.integers() | text | st.booleans() | st.none()
odd |= st.lists(odd, max_size=2) | st.dictionaries(text, odd, max_size=2)
rarely = st.sampled_from([True] + [False] * 5)


def fitting(kinds: tuple[Any, ...]) -> st.SearchStrategy:
    """Values of a setting's types, most of them in its range."""
    plain = {bool: st.booleans(), int: st.sampled_from([1, 2, 3, 6, 12, 384, 1000])}
    plain |= {float: st.floats(1e-6, 4.0) | st.sampled_from([0.5, 1.0, 2.0]), str: st.just("")}
    found = [st.sampled_from(get_args(k)) for k in kinds if get_origin(k) is Literal]
    return st.one_of([*found, *(plain[k] for k in kinds if k in plain)])


@st.composite
def some_settings(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(FIELDS.keys() - PATHS)), max_size=5, unique=True))
    found = {name: draw(odd if draw(rarely) else fitting(FIELDS[name].types)) for name in names}
    return found | draw(st.dictionaries(text, odd, max_size=1)) if draw(rarely) else found


@st.composite
def an_entry(draw: st.DrawFn) -> Any:
    operation = OPERATIONS[draw(st.sampled_from(sorted(OPERATIONS)))]
    kind = operation.value.kind
    numbers = {int: st.sampled_from([1, 2, 16, 100]), float: st.sampled_from([0.5, 1.5, 2, 2.0, 3])}
    found = {"name": operation.name, "value": draw(numbers[kind]) if kind else None}
    found |= {"trigger_loss": draw(st.sampled_from([None, 2.5])), "max_wait_iters": 100}
    found |= {"reevaluate": draw(st.booleans()), "desc": draw(text)}
    if operation.options and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(operation.options)))
        option = operation.options[name]
        found["options"] = {name: draw(st.sampled_from(option.choices or (option.default,)))}
    if draw(rarely):
        found[draw(st.sampled_from([*found, "trigger_plateau"]))] = draw(odd)
    return draw(odd) if draw(rarely) and draw(rarely) else found


NOTATION = [
    "!!bool ",
    "&a ",
    "*a",
    "\x00",
    "\x1b",
    "\t",
    "\r",
    "\n---\n",
    "[",
    "{",
    "'",
    ": ",
    "\ufeff",
]


@st.composite
def written(draw: st.DrawFn, content: st.SearchStrategy, kind: str) -> bytes:
    """The content as YAML or JSON, sometimes with something put into the text."""
    value = draw(content)
    dumped = json.dumps(value) if kind == "json" else yaml.safe_dump(value, sort_keys=False)
    data = dumped.encode("utf-8", "surrogatepass")
    if draw(rarely):
        at = draw(st.integers(0, len(data)))
        more = draw(st.sampled_from(NOTATION).map(str.encode) | st.binary(max_size=3))
        data = data[:at] + more + data[at:]
    return data


thousand = settings(
    max_examples=1050,
    deadline=None,  # SECONDS says how long a case may take
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def judged(path: Path, **flags: Any) -> Any:
    """The plan of a file, or None if it was refused as it should be."""
    start = time.process_time()
    try:
        config = None if "scaling_schedule_file" in flags else path
        plan = planned(config, dry_run=True, **flags)
    except InputError as error:
        plan, shown = None, str(error)
    else:
        shown = told(plan)
    assert time.process_time() - start < SECONDS
    assert clean(shown, None if plan else 1) == ""
    if plan is None:
        assert shown.startswith((f"{path}: ", "--"))
        return None
    assert_computable(plan)
    return plan


def assert_computable(plan: Any) -> None:
    """Every number of every stage can be computed with: in 32 bits, and neither 0 nor infinite."""
    for stage in plan.stages:
        shape, model = stage.shape, stage.shape.model
        peak = struct.unpack("f", struct.pack("f", shape.learning_rate * shape.lr_multiplier))[0]
        assert 2.0**-126 <= peak < math.inf
        sizes = (model.d_model, model.n_heads, model.d_ff, model.seq_len, shape.batch_size)
        assert all(type(size) is int and 1 <= size < 2**31 for size in sizes)
        assert 0 <= model.n_layers < 2**31
        assert model.n_layers * model.d_model * max(model.d_ff, model.d_model) < 2**60


@thousand
@given(content=written(some_settings(), "yaml"))
def test_generated_settings_resolve_or_are_refused(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    path.write_bytes(content)
    plan = judged(path)
    assert path.read_bytes() == content
    if plan is None:
        return
    values = values_of(plan.settings)
    for name, value in (yaml.safe_load(content.lstrip(b"\xef\xbb\xbf")) or {}).items():
        if name != "dry_run":  # what PyYAML reads as text is a number here: 1e-3
            number = type(values[name]) in (int, float) and isinstance(value, str)
            assert values[name] == (float(value) if number else value)
    path.write_text(to_yaml(plan.settings))
    assert values_of(planned(path).settings) == values


@thousand
@given(
    content=st.sampled_from(["yaml", "json"]).flatmap(
        lambda kind: st.tuples(st.just(kind), written(st.lists(an_entry(), max_size=3), kind))
    )
)
def test_generated_schedules_are_walked_or_refused(content, tmp_path_factory):
    kind, data = content
    path = tmp_path_factory.getbasetemp() / f"schedule.{kind}"
    path.write_bytes(data)
    start = {"attn_lora_rank_divisor": 8.0, "vocab_lora_rank_divisor": 8.0, "max_steps": 5000}
    plan = judged(path, scaling_schedule_file=str(path), positions="rotary", **start)
    assert path.read_bytes() == data
    if plan is not None and plan.entries:
        copy = path.with_name("copy.json")
        copy.write_text(schedule_json(plan.entries))
        names = [(one.name, one.value, one.options) for one in load_schedule(copy)]
        assert names == [(one.name, one.value, one.options) for one in plan.entries]
