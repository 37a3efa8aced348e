"""TensorBoard and W&B through a kill and a resume: one run, every step once, operations as events."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TINY_GPT, train_until_killed, write_text

from jaxmorph.train import main

SCHEDULE = [{"name": "change_lr", "value": 0.5, "max_wait_iters": 6, "reevaluate": False}]
STEPS, WENT_ON = 12, 4


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Path:
    """A run killed before the checkpoint of step 8, after its operation, that went on from step 4."""
    folder = tmp_path_factory.mktemp("tracked")
    text, schedule, run_dir = folder / "text.txt", folder / "schedule.json", folder / "run"
    write_text(text)
    schedule.write_text(json.dumps(SCHEDULE))
    argv = [
        *(*TINY_GPT, "--eval_interval", "4", "--eval_iters", "2"),
        *("--progress", "off", "--max_steps", str(STEPS)),
        *("--data", str(text), "--run_dir", str(run_dir), "--scaling_schedule_file", str(schedule)),
        *("--tensorboard", "--wandb", "offline"),
    ]
    train_until_killed(argv, "before_save:3")
    assert main(argv) == 0
    starts = (run_dir / "runs.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] for start in starts] == [0, WENT_ON]
    return run_dir


def events(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """(step, value) by tag, as TensorBoard reads them: a start drops its step and later ones.

    A file is a row of records: length, a checksum of it, the content, a checksum of that.
    """
    from tensorboardX.proto import event_pb2

    proto: Any = event_pb2
    shown: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = proto.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.session_log.status == proto.SessionLog.START:
                for tag, rows in shown.items():
                    shown[tag] = [row for row in rows if row[0] < event.step]
            for row in event.summary.value:
                value = (
                    row.tensor.string_val[0].decode()
                    if row.HasField("tensor")
                    else row.simple_value
                )
                shown.setdefault(row.tag, []).append((event.step, value))
    return shown


def history(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (run id, step, values) of an offline W&B file, which is a LevelDB log of messages.

    Blocks of 32 KiB hold records, cut where a block ends: checksum, length, and kind (1 whole, 2
    first part, 3 middle, 4 last).
    """
    from wandb.proto import wandb_internal_pb2

    proto: Any = wandb_internal_pb2
    content, at, message, name = path.read_bytes(), 7, b"", ""
    while at + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0:  # the rest of a block is too short for a record
            at = (at // 32768 + 1) * 32768
            continue
        part = content[at + 7 : at + 7 + length]
        message = part if kind in (1, 2) else message + part
        at += 7 + length
        if 32768 - at % 32768 < 7:
            at = (at // 32768 + 1) * 32768
        if kind not in (1, 4):
            continue
        record = proto.Record.FromString(message)
        name = record.run.run_id or name
        if record.HasField("history"):
            items = record.history.item
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            yield name, record.history.step.num, values


def test_tensorboard_shows_every_step_once_as_the_log_has_it(tracked):
    shown = events(tracked / "tensorboard")
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "val/loss", "tokens", "stage"):
        logged = [(line["step"], line[name]) for line in lines if name in line]
        assert [step for step, _ in shown[name]] == [step for step, _ in logged]
        assert [value for _, value in shown[name]] == pytest.approx([value for _, value in logged])
    killed, _ = sorted((tracked / "tensorboard").iterdir())
    assert b"announcement" in killed.read_bytes()  # what had to be dropped was there


def test_tensorboard_shows_operations(tracked):
    shown = events(tracked / "tensorboard")
    assert shown["operation/number"] == [(6, 1)]
    [(step, words)] = shown["operation/announcement/text_summary"]
    assert step == 6
    assert "=== Operation 1 of 1 at step 6: change_lr 0.5 ===" in words


def test_wandb_sees_one_run_that_goes_on_and_its_operation(tracked):
    name = (tracked / "wandb_id").read_text().strip()
    files = sorted((tracked / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    after = list(history(files[1]))  # of a kill W&B's own process keeps what fills a block
    assert {(run, step) for run, step, _ in after} == {(name, s) for s in range(5, STEPS + 1)}
    assert len(after) == STEPS - WENT_ON
    [values] = [values for _, step, values in after if step == 6]
    assert values["operation/number"] == 1
    assert "Operation 1 of 1 at step 6: change_lr 0.5" in values["operation/announcement"]
    assert values["train/loss"] > 0


def test_a_damaged_wandb_id_is_named(tracked, capsys):
    path = tracked / "wandb_id"
    path.write_text("two words\n")
    more = ["--max_steps", "13", "--wandb", "offline"]
    assert main(["--config", str(tracked / "config.yaml"), *more]) == 2
    assert "wandb_id: got 'two words', expected the id of a W&B run" in capsys.readouterr().err
