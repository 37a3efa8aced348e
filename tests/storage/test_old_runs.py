"""Stopped runs of every checkpoint format there has been, as their own versions left them.

Those of a format that the present code reads go on as they did then; others are refused by name.
`make_old_run.py` makes one of the present format.
"""

import json
import shutil

import pytest
from make_old_run import LAST, OLD_RUNS, STOPPED, flags
from other_formats import all_bytes

from jaxmorph import evaluate
from jaxmorph.storage.formats import FormatError, check_format, current_format
from jaxmorph.storage.manifest import problem_of, read_manifest
from jaxmorph.train import main

FOLDERS = sorted(path.name for path in OLD_RUNS.iterdir())
# The same sums in another order, as another version of XLA takes them. A step of another batch, or
# without its moments, changes the loss by more than a thousandth.
TOLERANCE = 2e-5


def refusal(checkpoint) -> str | None:
    """What the present code says of a checkpoint's format; None: it reads it."""
    try:
        check_format(checkpoint, read_manifest(checkpoint))
    except FormatError as error:
        return str(error)
    return None


def test_there_is_a_run_of_the_present_format():
    assert f"format_{current_format()}" in FOLDERS, "commit what make_old_run.py makes"


@pytest.mark.parametrize("name", FOLDERS)
def test_an_old_run_goes_on_as_it_did_then_or_is_refused_by_name(name, tmp_path, capsys):
    folder = tmp_path / "old"
    shutil.copytree(OLD_RUNS / name, folder)
    checkpoint = folder / "run" / "checkpoints" / str(STOPPED)
    assert problem_of(checkpoint) is None
    before, words = all_bytes(checkpoint), refusal(checkpoint)
    status = main([*flags(folder, LAST), "--keep_checkpoints=9"])
    printed = capsys.readouterr()
    assert all_bytes(checkpoint) == before
    if words is not None:
        assert (status, printed.err) == (2, f"error: {words}\n")
        return
    assert status == 0, printed.err
    assert f"Resuming at step {STOPPED}." in printed.out
    assert "corrupt" not in printed.err
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(LAST + 1))
    then = [json.loads(line) for line in (folder / "later.jsonl").read_text().splitlines()]
    for was, now in zip(then, lines[STOPPED + 1 :], strict=True):
        compared = {name: now[name] for name in was if name != "step_seconds"}
        expected = {name: was[name] for name in compared}
        assert compared == pytest.approx(expected, rel=TOLERANCE), was["step"]
    sample = ["sample", str(folder / "run"), "--checkpoint", str(STOPPED), "--prompt", "green"]
    assert evaluate.main([*sample, "--max_new_tokens", "5"]) == 0
