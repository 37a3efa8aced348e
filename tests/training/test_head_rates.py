"""Rates of heads in whole runs: through changes of shape in the cooldown, and through resumes."""

import json
from pathlib import Path

import numpy as np
import pytest
from schedule_entries import entry
from tiny_runs import TINY_GPT, write_text

from jaxmorph.train import main

BOOST, DECAY, WARMUP, COOLDOWN, LAST = 5.0, 0.9, 3, 12, 20
CLOSED_AT, OPENED_AT, DEEPER_AT, WIDER_AT = 2, 4, 7, 9
ENTRIES = [
    entry("set_gates", 0.0, max_wait_iters=CLOSED_AT, options={"heads": [[0, 1]]}),
    entry("set_gates", 1.0, max_wait_iters=OPENED_AT - CLOSED_AT, options={"heads": [[0, 1]]}),
    entry("stack_layers", 2, max_wait_iters=DEEPER_AT - OPENED_AT),
    entry("widen_heads", 2, max_wait_iters=WIDER_AT - DEEPER_AT, options={"recipe": "even"}),
    entry("merge_lora_weights", None, max_wait_iters=2),
]
RESUMED_AT = (6, 8, 10, 12, 15)  # in the warmup, after each change of shape, in the cooldown


def train(folder: Path, run: str, steps: int) -> Path:
    """Train a run up to a step, from where it is; return its folder."""
    flags = [*TINY_GPT, f"--data={folder / 'text.txt'}", f"--run_dir={folder / run}"]
    flags += [f"--scaling_schedule_file={folder / 'entries.json'}", f"--max_steps={steps}"]
    flags += [
        "--scheduler=constant",
        "--warmup_steps=0",
        "--eval_interval=1",
        "--eval_iters=1",
        "--progress=off",
    ]
    flags += ["--attn_lora_rank_divisor=4", "--enable_head_lr", f"--head_lr_boost={BOOST}"]
    flags += [f"--head_lr_warmup={WARMUP}", f"--head_lr_cooldown={COOLDOWN}"]
    assert main(flags) == 0
    return folder / run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("rates")
    write_text(made / "text.txt")
    (made / "entries.json").write_text(json.dumps(ENTRIES))
    return made


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    return train(folder, "whole", LAST)


def lines_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def expected(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The status and the multiplier of each head after so many updates."""
    status = 0
    if CLOSED_AT < step <= OPENED_AT:
        status = -1
    elif OPENED_AT < step <= OPENED_AT + COOLDOWN:
        status = step - OPENED_AT
    t, multiplier = status - 1, float(status >= 0)
    if status > 0:
        past = (t - WARMUP) / (COOLDOWN - WARMUP)
        part = t / WARMUP if t < WARMUP else DECAY ** (100 * past)
        multiplier = 1 + (BOOST - 1) * part
    layers, widths = 1 + (step > DEEPER_AT), 1 + (step > WIDER_AT)
    of_copies = np.tile([False, True], (layers, widths))  # head 0, which never closes, and head 1
    return np.where(of_copies, status, 0), np.where(of_copies, multiplier, 1.0)


def test_a_heads_clock_goes_on_in_its_copies_and_through_a_merge(whole):
    lines = lines_of(whole, "heads.jsonl")
    assert [line["step"] for line in lines] == list(range(LAST + 1))
    for line in lines:
        status, multiplier = expected(line["step"])
        np.testing.assert_array_equal(line["heads"]["status"], status, err_msg=str(line["step"]))
        np.testing.assert_allclose(line["heads"]["multiplier"], multiplier, rtol=1e-5)
    fired = [(line["name"], line["step"]) for line in lines_of(whole, "operations.jsonl")]
    assert fired == list(zip([e["name"] for e in ENTRIES], [2, 4, 7, 9, 11], strict=True))


def test_five_metrics_are_those_of_the_heads(whole):
    before = np.zeros((1, 2), int)
    for line in lines_of(whole, "metrics.jsonl")[1:]:
        status, multiplier = expected(line["step"])
        was = before if before.shape == status.shape else status  # nothing opens in these morphs
        assert line["newly_activated_heads"] == ((status == 1) & (was == -1)).sum()
        assert line["newly_pruned_heads"] == ((status == -1) & (was != -1)).sum()
        assert line["cooling_down_heads"] == (status > 0).sum()
        assert line["max_head_lr_multiplier"] == pytest.approx(multiplier.max())
        assert line["avg_head_lr_multiplier"] == pytest.approx(multiplier.mean())
        before = status


def test_five_resumes_give_the_same_run(folder, whole):
    for step in RESUMED_AT:
        train(folder, "resumed", step)
    resumed = train(folder, "resumed", LAST)
    for name in ("metrics.jsonl", "heads.jsonl"):
        found, wanted = ([{**line, "step_seconds": 0} for line in lines_of(run, name)]
                         for run in (resumed, whole))  # fmt: skip
        assert found == wanted
    digests = [
        json.loads((run / "checkpoints" / str(LAST) / "manifest.json").read_text())["state_sha256"]
        for run in (resumed, whole)
    ]
    assert digests[0] == digests[1]
