"""A run met by another version of the software: refused untouched, or gone on with and said so."""

import json
import shutil

import pytest
from other_formats import all_bytes, rewrite

from jaxmorph import evaluate
from jaxmorph.storage.formats import current_format
from jaxmorph.train import main

TINY = [
    *("--n_layers", "1", "--d_model", "8", "--n_heads", "1", "--seq_len", "8", "--batch_size", "2"),
    *("--mesh", "data=1", "--eval_iters", "1", "--eval_interval", "2", "--max_steps"),
]


def argv(run_dir, steps):
    data = run_dir.parent / "text.txt"
    data.write_text("green bottles hanging on the wall. " * 40)
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
