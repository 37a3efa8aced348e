"""A run met by another version of the software: refused untouched, or gone on with and said so."""

import json
import os
import shutil

import pytest
from other_formats import OTHER_TYPES, all_bytes, at, places, replaced, rewrite
from tiny_runs import SMALLEST_GPT, write_text

from jaxmorph import evaluate
from jaxmorph.storage.formats import current_format
from jaxmorph.train import main
from jaxmorph.training.resume import CheckpointRecord, open_checkpoints

TINY = [*SMALLEST_GPT, "--eval_interval", "2", "--max_steps"]


def argv(run_dir, steps):
    data = run_dir.parent / "text.txt"
    write_text(data, bottles=40)
    return [*TINY, str(steps), "--data", str(data), "--run_dir", str(run_dir)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert main(argv(run_dir, 2)) == 0
    return run_dir


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None, "jaxmorph": None}, ["got 1, ", "had other names", "--run_dir"]),
        ({"format": 99, "jaxmorph": "9.1"}, ["got 99, ", "newer jaxmorph (format 99", "update"]),
    ],
)
def test_a_run_of_another_format_is_refused_untouched(trained, tmp_path, capsys, changes, words):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        rewrite(folder, **changes)
    (run_dir / "checkpoints" / "3.partial").mkdir()
    (run_dir / "checkpoints" / "3.partial" / "meta.json").write_text("{")
    before = all_bytes(run_dir)
    capsys.readouterr()
    for command in (
        lambda: main(argv(run_dir, 4)),
        lambda: evaluate.main(["sample", str(run_dir)]),
        lambda: evaluate.main(["sample", str(run_dir), "--checkpoint", "0"]),
    ):
        assert command() == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        wanted = [str(run_dir / "checkpoints"), "format: ", str(current_format()), *words]
        assert [word for word in wanted if word not in message] == []
    assert all_bytes(run_dir) == before


def meta_of(run_dir):
    return json.loads((run_dir / "checkpoints" / "2" / "meta.json").read_text())


NUMBERS = {"val_loss", "best", "dropout", "init_std"}  # whole ones too
NULLABLE = {"val_loss", "best", "loss_chunk", "pending"}


def test_every_field_of_a_checkpoints_record_has_a_type(trained):
    """Each value in turn by one of every other JSON type, left out, and joined by an unknown one."""
    meta, tried = meta_of(trained), 0
    meta["schedule"] = [{"name": "widen_mlp", "sha256": "0" * 64}]
    assert CheckpointRecord.problem_of(meta) is None
    of_any_value = {path for path in places(meta) if path[0] == "settings" and len(path) > 1}
    for path in set(places(meta)) - of_any_value:
        old, name = at(meta, path), path[-1]
        for new in OTHER_TYPES:
            same = type(new) is type(old) or (name in NUMBERS and type(new) in (int, float))
            same = same or (name in NULLABLE and new is None)
            problem = CheckpointRecord.problem_of(replaced(meta, path, new))
            if not same and not (name == "loss_chunk" and type(new) is int):
                assert problem is not None, (path, new)
                assert str(name) in problem
            tried += 1
        if type(name) is str and path[:2] != ("schedule", 0):
            beside = at(meta, path[:-1])
            more = replaced(meta, path[:-1], beside | {"odd": 1})
            less = replaced(meta, path[:-1], {k: v for k, v in beside.items() if k != name})
            assert "odd" in str(CheckpointRecord.problem_of(more))
            assert path[0] == "logs" or f"{name} is missing" in str(
                CheckpointRecord.problem_of(less)
            )
    assert tried > 400


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ([], "it is [], not an object"),
        ({"position": {}}, "position.step is missing, not a whole number ≥ 0"),
        ({"position": {"step": "2"}}, "position.step is '2', not a whole number ≥ 0"),
        ({"position": {"step": -1}}, "position.step is -1, not a whole number ≥ 0"),
        ({"position": {"turns": [1]}}, "position.turns is [1], not an object"),
        ({"position": {"next_operation": 9}}, "position.next_operation is 9, of 0"),
        ({"position": {"pending": "\x1b[2J"}}, r"position.pending is '\x1b[2J', not one of loss, "),
        ({"position": {"trend": {"best": "low"}}}, "position.trend.best is 'low', not a finite nu"),
        ({"model": {"n_heads": 0}}, "model.n_heads is 0, not a whole number ≥ 1"),
        ({"corpus_sha256": 7}, "corpus_sha256 is 7, not a text"),
        ({"schedule": [{"name": 7}]}, "schedule[0]['name'] is 7, not a text"),
    ],
)
def test_a_meta_of_wrong_types_is_a_corrupt_checkpoint_passed_over(
    trained, tmp_path, capsys, meta, said
):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    whole = meta_of(run_dir)
    if isinstance(meta, dict) and meta != {"position": {}}:
        merged = {
            name: whole[name] | value if isinstance(value, dict) else value
            for name, value in meta.items()
        }
        meta = whole | merged
    rewrite(run_dir / "checkpoints" / "2", meta)
    capsys.readouterr()
    assert open_checkpoints(run_dir).latest_sound() == 0
    message = capsys.readouterr().err
    assert message.startswith(f"checkpoint 2 is corrupt: meta.json is damaged ({said}")
    assert message.count("\n") == 1
    assert evaluate.main(["sample", str(run_dir), "--checkpoint", "2"]) == 2
    message = capsys.readouterr().err
    assert "checkpoints/2: got" in message
    assert "meta.json is damaged" in message
    assert message.count("\n") == 1


def test_a_run_goes_on_before_a_checkpoint_of_wrong_types(trained, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    rewrite(run_dir / "checkpoints" / "2", meta_of(run_dir) | {"schedule": None})
    capsys.readouterr()
    assert main(argv(run_dir, 2)) == 0
    printed = capsys.readouterr()
    said = "checkpoint 2 is corrupt: meta.json is damaged (schedule is None, not a list)\n"
    assert printed.err == said
    assert "Resuming at step 0." in printed.out
    names = sorted(os.listdir(run_dir / "checkpoints"))
    assert names == ["0", "2", "2.corrupt"]


def test_every_start_is_logged_and_other_software_is_said(trained, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    log = run_dir / "runs.jsonl"
    first = json.loads(log.read_text())
    assert (first["step"], first["resumed"], first["device_count"]) == (0, False, 1)
    log.write_text(json.dumps(first | {"jax": "0.1.2"}) + "\n")
    assert main(argv(run_dir, 4)) == 0
    said = (
        f"This run continues with other software: jax 0.1.2 -> {first['jax']}; results may differ"
    )
    assert said in capsys.readouterr().out
    assert main(argv(run_dir, 6)) == 0
    assert "other software" not in capsys.readouterr().out
    starts = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(start["step"], start["resumed"]) for start in starts] == [
        *((0, False), (2, True), (4, True))
    ]
