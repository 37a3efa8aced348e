"""What the documents say is so: their code runs, their files exist, their tables are the code's."""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import shape_of, small_config, small_tokens
from test_layers import RULES

from jaxmorph import evaluate, plot
from jaxmorph.cli.errors import InputError
from jaxmorph.config.fields import fields_of, values_of
from jaxmorph.config.mesh import parse_mesh
from jaxmorph.config.resolve import resolve
from jaxmorph.config.settings import Settings
from jaxmorph.growth.foreign import FOREIGN_OPERATIONS
from jaxmorph.growth.operations import OPERATIONS
from jaxmorph.growth.plan import make_plan
from jaxmorph.growth.schedule import load_schedule
from jaxmorph.morphs import Line, Report
from jaxmorph.morphs.gpt import MORPHS
from jaxmorph.step.metrics import DEFAULT, LM_METRICS, RUN_METRICS
from jaxmorph.step.parts import Parts
from jaxmorph.step.programs import make_programs
from jaxmorph.step.schedules import SCHEDULERS
from jaxmorph.step.sharding import make_mesh
from jaxmorph.step.state import VARIABLES, Start
from jaxmorph.storage.formats import FormatError, check_format
from jaxmorph.train import main as train_main
from jaxmorph.training.adjustments import ADJUSTMENTS
from jaxmorph.training.announcement import announcement
from jaxmorph.training.ending import stopped
from jaxmorph.training.loop import train
from jaxmorph.training.operate import OperationResult
from jaxmorph.training.position import Position
from jaxmorph.training.resume import CheckpointRecord, check_unchanged
from jaxmorph.training.tables import Tables
from jaxmorph.training.turns import TURNS, Turn

ROOT = Path(__file__).parent.parent
COMING_FROM = "docs/coming_from.md"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", COMING_FROM)
every_document = pytest.mark.parametrize("document", DOCUMENTS)
README = (ROOT / "README.md").read_text()
EXAMPLES = ROOT / "docs" / "examples" / "demo"  # what benchmarks/readme_outputs.py recorded

# Commands whose output README shows, run in a folder with FILES.
SHOWN = [
    (train_main, "--config my.yaml"),
    (train_main, "--n_heads 5"),
    (train_main, "--epsilon 1e-300"),
    (
        train_main,
        "--n_layers 1 --d_model 16 --n_heads 2 --scaling_schedule_file my_schedule.yaml --dry_run",
    ),
    (
        plot.main,
        "schedule --warmup_steps 500 --total_steps 5000 --max_lr 6e-4 --min_lr_ratio 0.1 --save lr.png",
    ),
    (plot.main, f"run {EXAMPLES} --save losses.png"),
]
FILES = {
    "my.yaml": "n_layer: 4\n",
    "my_schedule.yaml": "- {name: widen_mlp, value: 1.013, trigger_loss: 2, reevaluate: true}\n",
}


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language, in the order they stand."""
    text = (ROOT / document).read_text()
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{match[1]}", "", match[2], flags=re.MULTILINE) for match in found]


def block_with(document: str, language: str, words: str) -> str:
    """The one block that has these words."""
    [found] = [block for block in blocks(document, language) if words in block]
    return found


def folders() -> str:
    """The table of folders as the rules and the folders' own first lines have it."""
    lines = ["| folder | what it is | imports |", "|---|---|---|"]
    for folder, imports in RULES.items():
        module = ast.parse((ROOT / "jaxmorph" / folder / "__init__.py").read_text())
        said = (ast.get_docstring(module) or "").splitlines()[0].removesuffix(".")
        names = " ".join(f"`{name}`" for name in imports.split()) or "nothing"
        lines.append(f"| `{folder}` | {said} | {names} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_tables_of_folders_are_the_rules(document):
    assert folders() in (ROOT / document).read_text(), f"{document} is to have\n\n{folders()}"


@every_document
def test_files_that_a_document_names_exist(document):
    text = (ROOT / document).read_text()
    not_ours = {"utils.py", "my_train.py", "morphs/gpt/restart.py"}
    not_ours |= {"config/train_shakespeare_char.py", "sample.py"}  # nanoGPT's
    for name in set(re.findall(r"[\w./]+\.py\b", text)) - not_ours:
        if not re.search(r"[A-Z]{2}", name):  # else it stands for a name
            places = [base / name for base in (ROOT, ROOT / "jaxmorph", ROOT / "benchmarks")]
            assert any(place.is_file() for place in places), f"{document}: {name}"


@every_document
def test_links_of_a_document_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{document}: {target}"
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, f"{document}: {target}"


@pytest.mark.parametrize("document", ["README.md", COMING_FROM])
def test_flags_that_a_document_names_exist(document):
    commands = (plot.Schedule, plot.Run, plot.Report, evaluate.Sample)
    known = {*fields_of(Settings), "config", "help", "help_operations"}
    known |= {field.name for command in commands for field in dataclasses.fields(command)}
    known |= {f"no_{name}" for name in known}
    others = {"check", "xla_force_host_platform_device_count"}  # of ruff and of XLA
    named = set(re.findall(r"--([a-z]\w+)", (ROOT / document).read_text()))
    assert named - others <= known


def test_readme_names_every_operation_scheduler_optimizer_and_config():
    optimizers = fields_of(Settings)["optimizer"].types[0].__args__
    configs = [f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")]
    for name in (*OPERATIONS, *SCHEDULERS, *optimizers, *configs):
        assert f"`{name}`" in README, name


def rows_of(document: str, section: str) -> list[list[str]]:
    """The cells of the tables below a title of the second level."""
    [text] = re.findall(
        rf"^## {section}$(.*?)(?=^## |\Z)", (ROOT / document).read_text(), re.M | re.S
    )
    return [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def test_configs_of_coming_from_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("text")
    nano, face = (b for b in blocks(COMING_FROM, "yaml") if "batch_size" in b)
    for name, block in (("nano.yaml", nano), ("face.yaml", face)):
        (tmp_path / name).write_text(block)
    found = values_of(resolve(["--config", "nano.yaml"])[0])
    names = ("tokenizer", "biases", "seq_len", "batch_size", "max_steps", "beta2", "grad_clip")
    assert [found[name] for name in names] == ["char", False, 256, 64, 5000, 0.99, 1.0]
    found = values_of(resolve(["--config", "face.yaml"])[0])
    [arguments] = (b for b in blocks(COMING_FROM, "python") if "TrainingArguments" in b)
    call: Any = ast.parse(arguments.strip(), mode="eval").body
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert given.pop("output_dir") == "runs/small"
    table = {row[0]: row[1] for row in rows_of(COMING_FROM, "Hugging Face Trainer")}
    for name, value in given.items():
        [cells] = [cells for left, cells in table.items() if f"`{name}`" in left]
        flags = re.findall(r"--(\w+)", cells)
        assert value in [found[flag] for flag in flags], name


def test_schedules_of_coming_from_are_what_they_say(tmp_path):
    [theirs] = blocks(COMING_FROM, "json")
    [ours] = (block for block in blocks(COMING_FROM, "yaml") if "stack_layers" in block)
    path = tmp_path / "ours.yaml"
    path.write_text(ours)
    flags = ["--n_layers", "2", "--d_model", "768", "--n_heads", "12", "--d_ff", "1536"]
    flags += ["--vocab_lora_rank_divisor", "24", "--scaling_schedule_file", str(path)]
    plan = make_plan(resolve(flags)[0], None)
    end = plan.stages[-1].shape.model
    assert (end.n_layers, end.d_ff, end.vocab_lora_rank) == (4, 3072, 64)
    assert [stage.exact for stage in plan.stages] == [True] * 5
    rows = json.loads(theirs)
    assert [row["value"] for row in rows] == [
        list(one.value) if isinstance(one.value, tuple) else one.value for one in plan.entries
    ]
    for row, one in zip(rows, plan.entries, strict=True):
        # A wait of 0 is over at once there: `iterations since the last >= max_wait_iters`.
        pair = (row["trigger_loss"] or None, max(row["max_wait_iters"], 1))
        assert pair == (one.trigger_loss, one.max_wait_iters)
    path = tmp_path / "schedule.json"
    path.write_text(
        json.dumps([rows[0] | {"name": "set_layer_lora_rank", "value": ["attn.3", 16]}])
    )
    with pytest.raises(InputError) as refused:
        load_schedule(path)
    [shown] = (block for block in blocks(COMING_FROM, "text") if "set_layer_lora_rank" in block)
    assert f"error: {str(refused.value).replace(f'{tmp_path}/', '')}\n" == shown


def test_operations_of_coming_from_are_those_that_are_refused_with_a_hint():
    text = (ROOT / COMING_FROM).read_text()
    for name in FOREIGN_OPERATIONS:
        assert f"`{name}`" in text, name
    there = {
        w
        for row in rows_of(COMING_FROM, "nano_gpt's scaling schedules")
        for w in re.findall(r"`(\w+)", row[1])
    }
    operations = {w for w in there if w.startswith(("set_", "change_", "widen_", "stack_"))}
    assert operations <= set(OPERATIONS)


def test_readmes_schedule_can_be_read(tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text(block_with("README.md", "yaml", "trigger_plateau"))
    entries = load_schedule(path)
    assert [(e.name, e.trigger_plateau) for e in entries] == [
        ("widen_mlp", 5),
        ("stack_layers", None),
    ]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    """All that README may show: what is printed now, and what the demo printed."""
    folder = tmp_path_factory.mktemp("shown")
    outputs = []
    for name, content in FILES.items():
        (folder / name).write_text(content)
    with contextlib.chdir(folder):
        for command, words in SHOWN:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                command(words.split())
            outputs.append(said.getvalue().replace(f"{folder}/", ""))
    record = CheckpointRecord(Position(), small_config(), {"learning_rate": 0.002}, "", [], {}, {})
    with pytest.raises(InputError) as changed:
        check_unchanged(record, {"learning_rate": 0.001}, "", "runs/demo")
    with pytest.raises(FormatError) as old:
        check_format(Path("runs/old/checkpoints/900"), {"format": 1, "jaxmorph": ""})
    outputs += [f"error: {error.value}\n" for error in (changed, old)]
    return outputs + [(EXAMPLES / name).read_text() for name in ("stopped.txt", "resumed.txt")]


@pytest.mark.parametrize("block", blocks("README.md", "text"))
def test_readmes_outputs_are_those_of_the_programs(block, printed):
    """Dots stand for lines left out; the lines of one part stand together in an output."""
    for part in block.split("...\n"):
        for error in [line for line in part.splitlines() if line.startswith("error:")] or [part]:
            assert any(error in f"\n{output}" for output in printed), error


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


def test_the_recorded_lines_are_what_a_run_prints_now():
    """Of the demo, which takes minutes: its own functions on its own numbers."""
    said = "".join((EXAMPLES / name).read_text() for name in ("stopped.txt", "resumed.txt"))
    for line in recorded("metrics.jsonl"):
        means = [(m, line[m.name]) for m in LM_METRICS if m.name in ("val/loss", "val/accuracy")]
        words = [f"{metric.label} {metric.written(mean)}" for metric, mean in means]
        assert f"step {line['step']}: {', '.join(words)}\n" in said
    found = re.search(r"Stopped .* at step (\d+) (?s:.*)", said.partition("Report:")[0])
    assert found
    words = stopped(
        "Ctrl-C", int(found[1]), 500, "python -m jaxmorph.train --config configs/demo.yaml"
    )
    assert found[0] == "".join(f"{line}\n" for line in words)
    assert f"Resuming at step {found[1]}.\n" in said


@pytest.mark.parametrize("line", recorded("operations.jsonl"), ids=lambda line: line["name"])
def test_the_recorded_announcements_are_what_an_operation_says_now(line):
    settings, _ = resolve(["--config", str(ROOT / "configs" / "demo.yaml")])
    plan = make_plan(settings, None).completed(vocab_size=256, total=500)
    index, fired = line["index"], [one["step"] for one in recorded("operations.jsonl")]
    done = OperationResult(
        before=plan.stages[index],
        after=plan.stages[index + 1],
        position=Position(
            step=line["step"],
            val_loss=line["val_loss_before"],
            last_operation_step=([0, *fired])[index],
        ),
        reason=line["reason"],
        report=Report(tuple(Line("", "mu", fate, n) for fate, n in line["moments"].items())),
        function_delta=line["function_delta"],
        seconds=line["seconds"],
        waited=line["compile_wait_seconds"],
    )
    said = "".join((EXAMPLES / name).read_text() for name in ("stopped.txt", "resumed.txt"))
    assert f"{announcement(done, 3)}\n" in said


def test_readmes_line_of_a_log_is_one_of_the_demos():
    [line] = blocks("README.md", "json")
    assert line in (EXAMPLES / "metrics.jsonl").read_text()
    assert set(json.loads(line)) <= {"step", *(metric.name for metric in DEFAULT)}


def test_readme_grows_a_model_of_ones_own():
    before, growth = block_with("README.md", "python", "morphs.widen").split("\nparams, opt_state,")
    names: dict[str, Any] = {}
    exec(before, names)
    images = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    old = names["Net"](hidden=64).apply({"params": names["params"]}, images)
    exec(f"params, opt_state,{growth}", names)
    wide = names["Net"](hidden=96)
    np.testing.assert_allclose(wide.apply({"params": names["params"]}, images), old, atol=1e-5)
    assert names["opt_state"][0].nu["Dense_0"]["kernel"].shape == (96, 10)


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    """The flags of a run of four steps, and `run` as its folder."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall. " for n in range(200)))
    return [
        *("--n_layers", "1", "--d_model", "8", "--n_heads", "1", "--seq_len", "8"),
        *("--batch_size", "2", "--mesh", "data=1", "--progress", "lines", "--max_steps", "4"),
        *("--eval_interval", "4", "--eval_iters", "1", "--log_interval", "1"),
        *("--data", str(text), "--run_dir", str(tmp_path / "run")),
    ]


def written(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_readme_extends_a_run_from_outside(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["my_train.py", *tiny])
    with pytest.raises(SystemExit) as finished:
        exec(block_with("README.md", "python", "Tables("), {})
    assert finished.value.code == 0
    assert all(line["train/weight_norm"] > 1 for line in written(tmp_path / "run")[1:])
    assert (tmp_path / "run" / "weight_norm.png").exists()
    assert f"{tmp_path / 'run'}: 5." in capsys.readouterr().out


def test_architectures_examples_run_and_make_a_training_step():
    names: dict[str, Any] = {}
    for block in blocks("docs/architecture.md", "python"):
        exec(block, names)
    assert names["view"]["blocks"]["up"].shape == (2, 8, 16)
    assert list(names["view"]) == ["blocks"]
    assert (names["loss"], names["step"]) == (1.5, 100)
    assert [turn.name for turn in names["turns"]] == ["older", *(t.name for t in TURNS)]
    start = Start(Settings(), shape_of(small_config()), 40)
    programs = make_programs(start, make_mesh(parse_mesh("data=1")), names["parts"])
    state, sums = programs.abstract_state, jax.eval_shape(programs.zero_sums)
    assert (state["head_age"].shape, state["head_age"].dtype) == ((3, 4), jnp.int32)
    sums = jax.eval_shape(programs.accumulate, state, sums, small_tokens(2, 9), np.int32(0))
    _, _, metrics = jax.eval_shape(programs.update, state, sums)
    assert {"train/loss", "train/z_loss", "train/oldest"} <= set(metrics)


def additions(file: str, table: str) -> list[str]:
    """The lines that CONTRIBUTING adds to a table of a module, in the order they stand."""
    head = f"# {file}, in {table}"
    return [
        block.partition("\n")[2]
        for block in blocks("CONTRIBUTING.md", "python")
        if re.match(rf"{re.escape(head)}\b", block)
    ]


def added(file: str, table: str, brackets: str = "[]", names: dict[str, Any] | None = None) -> Any:
    """What CONTRIBUTING adds to a table of a module, evaluated as if it stood there."""
    name = ".".join(["jaxmorph", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
    there = {**vars(importlib.import_module(name)), **(names or {})}
    left, right = brackets
    return eval(f"{left}\n{''.join(additions(file, table))}\n{right}", there)


def test_what_contributing_adds_works_through_the_tables(tiny, tmp_path, capsys):
    names: dict[str, Any] = {}
    exec(block_with("CONTRIBUTING.md", "python", "morphs/gpt/restart.py"), names)
    operations = added("growth/operations.py", "_HYPERPARAMETERS")
    operations += added("growth/operations.py", "_MORPHS")
    leaf = added("step/state.py", "VARIABLES", "{}")
    metrics = added("step/metrics.py", "RUN_METRICS")
    age = Turn(  # in the package it is a line of the compiled step
        "age",
        due=lambda run: run.step > 0,
        act=lambda run: setattr(
            run, "state", run.state.with_variables(layer_age=run.state["layer_age"] + 1)
        ),
        changes=("state",),
    )
    tables = Tables(
        step=Parts(variables={**VARIABLES, **leaf}, run_metrics=(*RUN_METRICS, *metrics)),
        operations={**OPERATIONS, **{operation.name: operation for operation in operations}},
        morphs={**MORPHS, **added("morphs/gpt/__init__.py", "MORPHS", "{}", names)},
        adjustments={**ADJUSTMENTS, **added("training/adjustments.py", "ADJUSTMENTS", "{}")},
    )
    masked = {"recipe": "masked", "anneal_steps": 100}
    rows: list[tuple[str, Any, dict[str, Any]]] = [
        ("stack_layers", 2, masked),
        ("reset_plateau", None, {}),
        ("reset_moments", None, {}),
        ("set_lr_multiplier", 0.5, {}),
    ]
    schedule = tmp_path / "schedule.json"
    entries = [
        {"name": name, "value": value, "max_wait_iters": 1, "reevaluate": False, "options": options}
        for name, value, options in rows
    ]
    schedule.write_text(json.dumps(entries))
    settings, sources = resolve([*tiny, "--scaling_schedule_file", str(schedule)])
    plan = make_plan(settings, parse_mesh(settings.scale.mesh), tables.operations)
    turns = (age, *added("training/turns.py", "TURNS"), *TURNS)
    assert train(plan, sources, tables, turns) == 0

    lines = written(tmp_path / "run")
    gates = [line["train/layer_gate"] for line in lines[1:]]
    np.testing.assert_allclose(gates, [1, 1.01 / 2, 1.02 / 2, 1.03 / 2])  # one layer fades in
    assert (tmp_path / "run" / "layer_gate.png").exists()
    fired = (tmp_path / "run" / "operations.jsonl").read_text().splitlines()
    moments = [json.loads(line)["moments"] for line in fired]
    assert [json.loads(line)["name"] for line in fired] == [name for name, _, _ in rows]
    assert moments[2]["reset"] > 0
    assert moments[2]["transported"] == 0
    manifest = (tmp_path / "run" / "checkpoints" / "4" / "manifest.json").read_text()
    assert json.loads(manifest)["leaves"]["variables/layer_age"] == ["int32", [2]]
    assert "The last step." in capsys.readouterr().out


def test_what_contributing_writes_into_the_package_fits_there():
    for block in blocks("CONTRIBUTING.md", "python"):
        head, _, code = block.partition("\n")
        found = re.match(r"# (\S+\.py), (in|below|a new file)\s?([\w.]*)", head)
        assert found, f"CONTRIBUTING.md: {head!r} is to say where the lines belong"
        file, how, place = found.groups()
        assert (ROOT / "jaxmorph" / file).exists() == (how != "a new file")
        if place:
            text = (ROOT / "jaxmorph" / file).read_text()
            for name in place.split("."):
                assert re.search(rf"\b{name}\b", text), f"{file}: {name}"
        assert any(compiles(shape.format(textwrap.indent(code, "  "))) for shape in SHAPES), block


# A block may be statements, or lines of a tuple, a dict, a call or a match.
SHAPES = ("if True:\n{}", "(\n{})", "{{\n{}}}", "call(\n{})", "match 0:\n{}")


def compiles(code: str) -> bool:
    """Whether it is Python, though a `return` may stand outside of its function."""
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True
