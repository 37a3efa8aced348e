"""The training loop: a run from its settings to its report, through any number of interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmorph.architecture import flops_per_token, parameter_count
from jaxmorph.checkpoint import CheckpointError, Checkpoints
from jaxmorph.config import ModelConfig, Settings
from jaxmorph.data import ExampleStream, TokenizedCorpus, load_tokens, validation_batches
from jaxmorph.errors import InputError
from jaxmorph.faults import crash_point
from jaxmorph.metrics import DivergedError, StepLog, make_trackers, peak_flops
from jaxmorph.programs import Programs, make_programs
from jaxmorph.progress import Progress, make_progress
from jaxmorph.report import write_report
from jaxmorph.resolve import (
    Sources,
    check_warmup,
    model_config,
    to_yaml,
    total_steps,
    values_of,
    warmup_steps,
)
from jaxmorph.resume import (
    CheckpointRecord,
    Position,
    check_unchanged,
    finite_or_none,
    restore_state,
    same_json,
    with_total_steps,
)
from jaxmorph.run_folder import JsonLines, RunLock, write_text_atomically
from jaxmorph.sharding import BATCH_AXES, make_mesh, place_batch
from jaxmorph.state import TrainState, leaves_by_path, new_state
from jaxmorph.stopping import StopSignals
from jaxmorph.summary import describe


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same while a stage runs."""

    settings: Settings
    config: ModelConfig
    corpus: TokenizedCorpus
    stream: ExampleStream
    validation: list[np.ndarray]
    total_steps: int
    mesh: Mesh
    programs: Programs
    checkpoints: Checkpoints
    run_dir: Path


def train(settings: Settings, sources: Sources) -> int:
    """Train as the settings say, from the start or from the run folder's newest sound checkpoint.

    Returns:
      The exit status: 0 done, 1 diverged, 143 or 130 stopped by a signal after saving.

    Raises:
      InputError: bad input, before the first step.
    """
    x64 = jax.enable_x64(True) if settings.model.dtype == "float64" else contextlib.nullcontext()
    run_dir = Path(str(settings.run.run_dir))
    _check_folder(run_dir)
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    with x64, RunLock(run_dir), StopSignals() as signals:
        setup = _prepare(settings, sources, run_dir)
        with contextlib.closing(setup.checkpoints):
            state, position, resumed = _begin_or_resume(setup)
            if position.step >= setup.total_steps:
                print(f"The run is finished: step {position.step} of {setup.total_steps}.")
                return 0
            try:
                status = _run(setup, state, position, signals, resumed)
            except CheckpointError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
        print(f"Report: {write_report(run_dir)}")
        return status


def _check_folder(run_dir: Path) -> None:
    """Refuse to write into a folder that holds someone's files rather than a run."""
    if (run_dir / "checkpoints").is_dir() or not run_dir.exists():
        return
    ours = ("config.yaml", "metrics.jsonl", "schedule.json", "tokenizer.json", "report.html")
    if taken := [name for name in ours if (run_dir / name).exists()]:
        raise InputError(
            "--run_dir", "", str(run_dir), f"a run's folder or a new one (it has a {taken[0]})"
        )


def _prepare(settings: Settings, sources: Sources, run_dir: Path) -> Setup:
    """Read the corpus and make the programs; nothing is compiled and no state is made yet."""
    data, run = settings.data, settings.run
    corpus = load_tokens(
        data.data,
        data.tokenizer,
        seq_len=data.seq_len,
        val_fraction=data.val_fraction,
        bpe_vocab_size=data.bpe_vocab_size,
        cache_dir=data.cache_dir,
    )
    stream = ExampleStream(corpus.train, seq_len=data.seq_len, seed=run.seed)
    total = total_steps(settings, stream.examples_per_epoch)
    assert total is not None
    check_warmup(settings, sources, total)
    config = model_config(settings, corpus.tokenizer.vocab_size)
    mesh = make_mesh(settings.scale.mesh)
    validation = validation_batches(
        corpus.val, seq_len=data.seq_len, batch_size=data.batch_size, n_batches=run.eval_iters
    )
    _check_batches(mesh, data.batch_size, validation)
    device = f"{mesh.devices.size} × {mesh.devices.flat[0].device_kind}"
    print(f"jaxmorph on jax {jax.__version__}, {device}")
    print(
        describe(
            settings,
            config,
            corpus=corpus.description,
            examples_per_epoch=stream.examples_per_epoch,
        )
    )
    programs = make_programs(
        config,
        settings.optimizer,
        mesh,
        lambda optimizer: new_state(
            config,
            settings,
            optimizer,
            warmup_steps=warmup_steps(settings, total),
            total_steps=total,
        ),
    )
    checkpoints = Checkpoints(run_dir / "checkpoints", run.keep_checkpoints, run.keep_best)
    return Setup(
        settings, config, corpus, stream, validation, total, mesh, programs, checkpoints, run_dir
    )


def _check_batches(mesh: Mesh, batch_size: int, validation: list[np.ndarray]) -> None:
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % parts:
        raise InputError("--batch_size", "", batch_size, f"a multiple of the {parts} data devices")
    if len(validation[0]) % parts:
        raise InputError(
            "--val_fraction",
            "",
            None,
            f"more validation text: its {len(validation[0])} windows do not divide over "
            f"{parts} data devices",
        )


def _begin_or_resume(setup: Setup) -> tuple[TrainState, Position, bool]:
    """Return state and position to go on from, and whether the run had begun before.

    The run folder's files are cut back to that position.
    """
    run_dir, checkpoints = setup.run_dir, setup.checkpoints
    checkpoints.remove_partial()
    step = checkpoints.latest_sound()
    if step is not None and not setup.settings.run.resume:
        raise InputError(
            "--no_resume", "", str(run_dir), "a folder without a run; give another --run_dir"
        )
    if step is None:
        state, position = setup.programs.init(), Position()
    else:
        state, position = _resume(setup, step)
    write_text_atomically(run_dir / "config.yaml", to_yaml(setup.settings))
    write_text_atomically(run_dir / "tokenizer.json", setup.corpus.tokenizer.to_json())
    kept = -1 if step is None else position.step
    (run_dir / "operations.jsonl").touch()
    for name in ("metrics.jsonl", "operations.jsonl"):
        with JsonLines(run_dir / name) as lines:
            lines.cut_back_to_step(kept)
    return state, position, step is not None


def _resume(setup: Setup, step: int) -> tuple[TrainState, Position]:
    record = CheckpointRecord.from_meta(setup.checkpoints.read_meta(step))
    now = same_json(values_of(setup.settings))
    changes = check_unchanged(record, now, setup.corpus.sha256, str(setup.run_dir))
    programs = setup.programs
    state = restore_state(
        setup.checkpoints, step, programs.abstract_state, programs.state_shardings
    )
    print(f"Resuming at step {step}." + "".join(f"\n  changed {line}" for line in changes))
    return with_total_steps(state, setup.total_steps), record.position


def _run(
    setup: Setup, state: TrainState, position: Position, signals: StopSignals, resumed: bool
) -> int:
    """Step until the run is done, diverges or is asked to stop; return the exit status."""
    run, total = setup.settings.run, setup.total_steps
    trackers = make_trackers(run, setup.run_dir, values_of(setup.settings))
    lines = JsonLines(setup.run_dir / "metrics.jsonl")
    peak = peak_flops(list(setup.mesh.devices.flat), setup.config.dtype)
    with make_progress(run.progress, position.step, total) as progress:
        log = StepLog(lines, trackers, progress, run, total, peak)
        log.resume_totals(position.tokens, position.flops)
        try:
            with contextlib.closing(log):
                if not resumed:
                    state, position = _evaluate(setup, state, position, log, progress)
                    _save(setup, state, position, log)
                _steps(setup, state, position, log, progress, signals)
        except DivergedError as error:
            setup.checkpoints.wait()
            good = setup.checkpoints.folder / str(setup.checkpoints.newest())
            print(f"error: {error}. The last good checkpoint is {good}", file=sys.stderr)
            return 1
    setup.checkpoints.wait()
    return 0 if signals.received is None else signals.exit_status


def _steps(
    setup: Setup,
    state: TrainState,
    position: Position,
    log: StepLog,
    progress: Progress,
    signals: StopSignals,
) -> None:
    run, data, programs = setup.settings.run, setup.settings.data, setup.programs
    save_interval = run.checkpoint_interval or run.eval_interval
    sums, micro_batches = programs.zero_sums(), np.int32(data.grad_accum_steps)
    with contextlib.closing(setup.stream.batches(position.examples, data.batch_size)) as batches:
        while position.step < setup.total_steps and signals.received is None:
            crash_point("step")
            for index in range(data.grad_accum_steps):
                batch = place_batch(setup.mesh, next(batches))
                sums = programs.accumulate(state, sums, batch, np.int32(index))
            state, sums, metrics = programs.update(state, sums, micro_batches)
            position = _advance(setup, position)
            log.step(_totals(setup, position), metrics)
            last = position.step == setup.total_steps
            if last or position.step % run.eval_interval == 0:
                state, position = _evaluate(setup, state, position, log, progress)
            if last or signals.received is not None or position.step % save_interval == 0:
                _save(setup, state, position, log)


def _advance(setup: Setup, position: Position) -> Position:
    data = setup.settings.data
    examples = data.batch_size * data.grad_accum_steps
    tokens = examples * setup.config.seq_len
    return dataclasses.replace(
        position,
        step=position.step + 1,
        examples=position.examples + examples,
        tokens=position.tokens + tokens,
        flops=position.flops + tokens * flops_per_token(setup.config),
    )


def _totals(setup: Setup, position: Position) -> dict[str, int]:
    return {
        "step": position.step,
        "stage": position.stage,
        "tokens": position.tokens,
        "flops": position.flops,
        "params": parameter_count(setup.config),
        "batch_size": setup.settings.data.batch_size,
        "grad_accum_steps": setup.settings.data.grad_accum_steps,
    }


def _evaluate(
    setup: Setup, state: TrainState, position: Position, log: StepLog, progress: Progress
) -> tuple[TrainState, Position]:
    """Evaluate on the validation batches; record it, and show it to the plateau schedule."""
    log.flush_to_held()
    programs = setup.programs
    results = [
        programs.evaluate(state.params, state.gates, place_batch(setup.mesh, batch))
        for batch in setup.validation
    ]
    means = {
        name: math.fsum(float(result[name]) for result in results) / len(results)
        for name in ("loss", "accuracy")
    }
    log.evaluation(position.step, {f"val/{name}": value for name, value in means.items()})
    loss, accuracy = means["loss"], means["accuracy"]
    progress.note(f"step {position.step}: validation loss {loss:.4f}, accuracy {accuracy:.1%}")
    state = programs.observe(state, np.asarray(loss, state.plateau.avg_value.dtype))
    return state, dataclasses.replace(position, val_loss=finite_or_none(loss))


def _save(setup: Setup, state: TrainState, position: Position, log: StepLog) -> None:
    """Start a checkpoint. Lines of metrics.jsonl up to its step are written before it can commit."""
    log.sync()
    record = CheckpointRecord(
        position, setup.config, values_of(setup.settings), setup.corpus.sha256
    )
    setup.checkpoints.save(
        position.step, leaves_by_path(state), record.to_meta(), score=position.val_loss
    )
