"""The train command end to end: what a run leaves behind, and how it goes on after anything."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TINY_GPT, write_text

from jaxmorph import evaluate
from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model.architecture import flops_per_token
from jaxmorph.train import main

TINY = [
    *(*TINY_GPT, "--learning_rate", "1e-2", "--progress", "lines"),
    *("--eval_interval", "4", "--eval_iters", "2", "--dropout", "0.1"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("corpus") / "text.txt")


def _argv(text, run_dir, steps=12, *more):
    return [*TINY, "--data", text, "--run_dir", str(run_dir), "--max_steps", str(steps), *more]


def _lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _losses(run_dir: Path) -> list[tuple]:
    names = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "val/loss", "tokens")
    return [tuple(line.get(name) for name in names) for line in _lines(run_dir)]


def _manifest(run_dir: Path, step: int) -> dict:
    return json.loads((run_dir / "checkpoints" / str(step) / "manifest.json").read_text())


def _start(argv: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxmorph.train", *argv],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """An uninterrupted run of 12 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert main(_argv(text, run_dir)) == 0
    return run_dir


def test_run_folder_holds_what_the_contract_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "operations.jsonl", "checkpoints"} <= names
    assert {"report.html", "loss.png", "learning_rate.png", "tokenizer.json"} <= names
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert steps[0] == 0
    assert steps[-1] == 12


def test_metrics_have_one_line_a_step_and_evaluations_where_they_belong(finished):
    lines = _lines(finished)
    assert [line["step"] for line in lines] == list(range(13))
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 4, 8, 12]
    tokens = 4 * 16
    config = ModelConfig(**_meta(finished, 12)["model"])
    for line in lines[1:]:
        assert line["tokens"] == line["step"] * tokens
        assert line["flops"] == line["step"] * tokens * flops_per_token(config)
        assert (line["batch_size"], line["stage"]) == (4, 0)
        assert line["step_seconds"] > 0
    assert lines[-1]["val/loss"] < lines[0]["val/loss"] - 0.3
    assert abs(lines[0]["val/loss"] - math.log(256)) < 0.5


def _meta(run_dir, step):
    return json.loads((run_dir / "checkpoints" / str(step) / "meta.json").read_text())


def test_learning_rate_is_the_documents_formula_at_every_step(finished):
    peak, warmup, total = 1e-2, 0, 12  # 5 % of 12, floored
    for line in _lines(finished)[1:]:
        t = line["step"] - 1
        cosine = 0.5 * (1 + math.cos(math.pi * (t - warmup) / (total - warmup)))
        assert abs(line["train/learning_rate"] - peak * (0.1 + 0.9 * cosine)) < 1e-6 * peak


def test_written_config_reproduces_the_run(finished, tmp_path):
    run_dir = tmp_path / "again"
    argv = ["--config", str(finished / "config.yaml"), "--run_dir", str(run_dir)]
    assert main(argv) == 0
    assert _manifest(run_dir, 12)["state_sha256"] == _manifest(finished, 12)["state_sha256"]
    assert _losses(run_dir) == _losses(finished)


def test_written_config_goes_on_with_the_run_wherever_its_folder_lies(text, tmp_path, capsys):
    schedule, made = tmp_path / "schedule.yaml", tmp_path / "made"
    schedule.write_text(
        "- {name: set_lr, value: 0.02, trigger_loss: null, max_wait_iters: 2, reevaluate: false}\n"
    )
    assert main(_argv(text, made, 4, "--scaling_schedule_file", str(schedule))) == 0
    schedule.unlink()
    moved = made.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["--config", str(moved / "config.yaml"), "--max_steps", "6"]) == 0
    said = capsys.readouterr().out
    assert re.findall("  changed (.*)", said) == ["max_steps: 4 -> 6"]
    assert [line["step"] for line in _lines(moved)] == list(range(7))
    assert not made.exists()


def test_written_config_goes_on_and_permits_nothing_that_was_permitted_once(text, tmp_path, capsys):
    run_dir, once = tmp_path / "run", ("--no_resume", "--accept_damaged_log")
    assert main(_argv(text, run_dir, 2, *once, "--allow_schedule_change")) == 0
    written = ["--config", str(run_dir / "config.yaml"), "--max_steps", "4"]
    assert main(written) == 0
    log = run_dir / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert main(written) == 2
    assert "--accept_damaged_log" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(finished, capsys):
    assert evaluate.main(["sample", str(finished), "--checkpoint", "77"]) == 2
    assert "--checkpoint: got 77, expected the step of a checkpoint: 0, 8, 12" in (
        capsys.readouterr().err
    )


def test_a_finished_run_says_so_and_changes_nothing(finished, text, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert main(_argv(text, finished)) == 0
    assert "finished: step 12 of 12" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def _report_of_another_run(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    digest = page.split('<meta name="jaxmorph" content="')[1].split()[0]
    (run_dir / "report.html").write_text(page.replace(digest, "0" * 64))


@pytest.mark.parametrize(
    "lose",
    [
        lambda run_dir: (run_dir / "report.html").unlink(),
        lambda run_dir: (run_dir / "loss.png").unlink(),
        lambda run_dir: (run_dir / "report.html").write_text(""),
        _report_of_another_run,
    ],
)
def test_a_finished_run_writes_the_report_that_is_missing(finished, text, tmp_path, capsys, lose):
    """As after a kill between the last checkpoint and the report, or on a disk that was full there."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    written = (run_dir / "report.html").read_text()
    lose(run_dir)
    capsys.readouterr()
    assert main(_argv(text, run_dir)) == 0
    assert "finished: step 12 of 12" in (said := capsys.readouterr().out)
    assert said.endswith(f"Report: {run_dir / 'report.html'}\n")
    assert (run_dir / "loss.png").exists()
    meta = '<meta name="jaxmorph" content='
    lines = [line for line in written.splitlines() if line.startswith(meta)]
    assert lines[0] in (run_dir / "report.html").read_text()
    before = (run_dir / "report.html").stat().st_mtime_ns
    assert main(_argv(text, run_dir)) == 0
    assert "Report" not in capsys.readouterr().out
    assert (run_dir / "report.html").stat().st_mtime_ns == before


def test_a_run_killed_before_its_report_writes_it_when_it_is_started_again(text, tmp_path, capsys):
    run_dir = tmp_path / "run"
    process = _start(_argv(text, run_dir, 4), JAXMORPH_CRASH_AT="after_save:2")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (run_dir / "report.html").exists()
    assert main(_argv(text, run_dir, 4)) == 0
    assert "finished: step 4 of 4" in capsys.readouterr().out
    assert (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--no_resume"], ["--no_resume"]),
        (["--d_model", "32"], ["d_model", "16 -> 32"]),
        (["--seed", "1"], ["seed", "0 -> 1"]),
        (["--learning_rate", "1e-3"], ["learning_rate", "0.01 -> 0.001"]),
    ],
)
def test_a_run_is_not_resumed_with_settings_that_change_what_has_happened(
    more, words, finished, text, capsys
):
    before = (finished / "metrics.jsonl").read_bytes()
    assert main(_argv(text, finished, 12, *more)) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_is_not_resumed_on_another_corpus(finished, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("something else entirely. " * 500)
    assert main(_argv(str(other), finished)) == 2
    assert "the corpus the run began with" in capsys.readouterr().err


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_used(finished, text, tmp_path, capsys):
    run_dir = tmp_path / "corrupt"
    assert main(_argv(text, run_dir, 8)) == 0
    victim = next(p for p in (run_dir / "checkpoints" / "8").rglob("*") if p.stat().st_size > 1000)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    capsys.readouterr()
    assert main(_argv(text, run_dir, 8)) == 0
    printed = capsys.readouterr()
    assert "checkpoint 8 is corrupt" in printed.err
    assert "Resuming at step 4" in printed.out
    assert [line["step"] for line in _lines(run_dir)] == list(range(9))
    for step in (0, 4, 8):
        (run_dir / "checkpoints" / str(step) / "manifest.json").unlink()
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert main(_argv(text, run_dir, 8)) == 2
    assert "corrupt" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_goes_on_and_its_schedule_ends_at_the_new_end(text, tmp_path, capsys):
    run_dir = tmp_path / "longer"
    assert main(_argv(text, run_dir, 4)) == 0
    assert main(_argv(text, run_dir, 10, "--eval_interval", "5")) == 0
    printed = capsys.readouterr().out
    assert "changed max_steps: 4 -> 10" in printed
    assert "changed eval_interval: 4 -> 5" in printed
    lines = _lines(run_dir)
    assert [line["step"] for line in lines] == list(range(11))
    last = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 9 / 10)))
    assert abs(lines[-1]["train/learning_rate"] - last) < 1e-8


def _wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) > step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the run did not get going")


def test_a_signal_saves_and_a_second_process_is_refused(text, tmp_path, capsys):
    """SIGTERM; SIGINT and SIGHUP are in test_stopping.py."""
    run_dir = tmp_path / "signalled"
    argv = _argv(text, run_dir, 100_000)
    process = _start(argv)
    _wait_for_step(run_dir, 20, process)
    assert main(argv) == 2
    assert f"process {process.pid}" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    steps = [line["step"] for line in _lines(run_dir)]
    assert steps == list(range(len(steps)))
    assert (run_dir / "checkpoints" / str(steps[-1]) / "manifest.json").is_file()
    assert (run_dir / "report.html").is_file()


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(text, tmp_path, capsys):
    run_dir = tmp_path / "diverged"
    argv = [*_argv(text, run_dir, 60), "--optimizer", "sgd", "--grad_clip", "0"]
    argv += ["--max_nonfinite_steps", "5", "--learning_rate", "1e30"]
    assert main(argv) == 1
    message = capsys.readouterr().err
    assert "not finite in 5 steps in a row" in message
    good = Path(message.split("last good checkpoint is ")[1].partition(":")[0])
    assert (good / "manifest.json").is_file()
    skipped = [line["train/skipped"] for line in _lines(run_dir) if "train/skipped" in line]
    assert skipped[-1] == 5
    assert _lines(run_dir)[-1]["train/loss"] in ("NaN", "Infinity")


def test_someones_folder_is_left_alone(text, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("mine: true")
    assert main(_argv(text, tmp_path)) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_short_corpus_is_refused_before_the_first_step(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("too short")
    assert main(_argv(str(tmp_path / "text.txt"), tmp_path / "run")) == 2
    assert "tokens" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_float64_and_epochs_train(text, tmp_path):
    run_dir = tmp_path / "wide"
    argv = [*TINY, "--data", text, "--run_dir", str(run_dir), "--num_epochs", "0.02"]
    assert main([*argv, "--dtype", "float64", "--grad_accum_steps", "2"]) == 0
    lines = _lines(run_dir)
    leaves = _manifest(run_dir, lines[-1]["step"])["leaves"]
    assert leaves["params/embed/tokens"] == ["float64", [256, 16]]
    windows = int(0.9 * len(Path(text).read_text())) // 16 - 1
    assert lines[-1]["step"] == max(1, int(0.02 * windows / 8))


def test_sampling_repeats_itself_and_follows_the_prompt(finished, capsys):
    argv = [
        "sample",
        str(finished),
        "--prompt",
        "12 green",
        "--max_new_tokens",
        "40",
        "--seed",
        "3",
    ]
    outputs = []
    for more in ([], [], ["--seed", "4"], ["--temperature", "0"], ["--top_k", "1"]):
        assert evaluate.main([*argv, *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("12 green")
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]
    assert outputs[3] == outputs[4]


def test_sampled_text_has_its_control_characters_escaped(finished, capsys):
    """At this temperature every byte is as likely as the others."""
    argv = ["sample", str(finished), "--prompt", "\x1b[31m\ta\nb", "--temperature", "1e6"]
    assert evaluate.main([*argv, "--max_new_tokens", "300"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("\\x1b[31m\ta\nb")
    assert re.findall(r"\\x[01][0-9a-f]", shown)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sample", "\x1b"], [r"'\x1b'", "run folder"]),
        (["sample", "x" * 300], ["name too long"]),
        (["sample", ".", "--temperature", "1e-50"], ["--temperature", "is 0"]),
        (["sample", ".", "--temperature", "1e-20"], ["--temperature", "0, or a number ≥ 1e-06"]),
        (["sample", ".", "--temperature", "nan"], ["--temperature", "finite"]),
        (["sample", ".", "--top_k", "1_0"], ["--top_k", "the digits 0 to 9"]),
        (["sample", ".", "--seed", "2147483648"], ["--seed", "≤"]),
        (["sample", "nowhere"], ["nowhere", "run folder"]),
        (["sample", ".", "--temperature", "-1"], ["--temperature", "-1"]),
        (["sample", ".", "--max_new_token", "3"], ["--max_new_tokens"]),
        (["smaple", "."], ["sample"]),
    ],
)
def test_bad_words_to_evaluate_are_refused(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(argv) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message
