"""Set up a run before its first step: its corpus, plan, programs and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxmorph.cli.errors import InputError
from jaxmorph.cli.printing import say
from jaxmorph.cli.typed_command import typed_command
from jaxmorph.config.checks import checked_total
from jaxmorph.config.mesh import MeshShape
from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import Settings
from jaxmorph.config.sources import Sources
from jaxmorph.config.start import passes_warnings
from jaxmorph.data.loading import TokenizedCorpus, load_tokens
from jaxmorph.growth.fitting import check_fits
from jaxmorph.growth.forecast import stages_ahead, tokens_per_step
from jaxmorph.growth.plan import Plan
from jaxmorph.growth.summary import describe
from jaxmorph.model.architecture import parameter_count
from jaxmorph.step.programs import distinct_specs
from jaxmorph.step.sharding import make_mesh, mesh_shape
from jaxmorph.step.task import Batch, Stream, Task
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.storage.run_lock import RunLock
from jaxmorph.training.active_stage import ActiveStage
from jaxmorph.training.head_log import has_head_log
from jaxmorph.training.head_meter import HeadMeter, head_batch_rows, head_batches
from jaxmorph.training.room import room_of
from jaxmorph.training.run_logs import RunLogs
from jaxmorph.training.stages import StageCompiler
from jaxmorph.training.tables import Tables


@dataclass(frozen=True)
class Setup:
    """What is constant during a run, but for the plan, which becomes more definite."""

    corpus: TokenizedCorpus
    streams: Mapping[int, Stream]  # by context length
    total_steps: int
    mesh: Mesh
    compiler: StageCompiler
    checkpoints: Checkpoints
    logs: RunLogs
    lock: RunLock
    tables: Tables
    command: str  # goes on with the run, typed in the same folder

    @property
    def plan(self) -> Plan:
        """Return the plan, with all that has been decided."""
        return self.compiler.plan

    @property
    def settings(self) -> Settings:
        """Return the checked settings."""
        return self.plan.settings

    @property
    def run_dir(self) -> Path:
        """Return the run folder."""
        return self.lock.run_dir

    def activate(self, index: int) -> ActiveStage:
        """Return the objects used in stage `index`, with its programs compiled."""
        stage = self.plan.stages[index]
        return ActiveStage(
            stage=stage,
            programs=self.compiler.programs(index),
            stream=self.streams[stage.shape.model.seq_len],
            validation=_validation(self.tables.step.task, self.corpus, self.plan, stage.shape),
            heads=self._head_meter(index),
        )

    def _head_meter(self, index: int) -> HeadMeter:
        task, shape = self.tables.step.task, self.plan.stages[index].shape
        return HeadMeter(
            self.mesh,
            task,
            get_programs=lambda: self.compiler.for_heads(index),
            get_batches=lambda: head_batches(
                task,
                self.corpus.train,
                seq_len=shape.model.seq_len,
                seed=self.settings.run.seed,
                rows=head_batch_rows(shape, mesh_shape(self.mesh)),
                count=self.settings.heads.controller_batches,
            ),
        )


def prepare(
    plan: Plan, sources: Sources, lock: RunLock, checkpoints: Checkpoints, tables: Tables
) -> Setup:
    """Read the corpus and complete the plan; compile nothing and create no state yet.

    Args:
      plan: what is known about the run without corpus and devices.
      sources: where each setting came from.
      lock: of the run's folder, held.
      checkpoints: of the run.
      tables: the tables that define the run.

    Raises:
      InputError: bad input.
    """
    settings, task = plan.settings, tables.step.task
    corpus = _corpus(plan)
    streams = _streams(plan, corpus, task)
    examples = streams[plan.start.model.seq_len].examples_per_epoch
    total = checked_total(settings, sources, examples)
    assert total is not None
    mesh = make_mesh(plan.mesh)
    shape = mesh_shape(mesh)
    plan = plan.completed(vocab_size=corpus.tokenizer.vocab_size, total=total, mesh=shape)
    _check_validation(shape, corpus, plan, task)
    warnings = check_fits(plan, room_of(mesh))
    _print_summary(plan, corpus, mesh, total)
    for warning in warnings:
        say(f"warning: {warning}")

    def validation_specs(shape: RunShape) -> list[Batch]:
        return distinct_specs(_validation(task, corpus, plan, shape))

    return Setup(
        corpus=corpus,
        streams=streams,
        total_steps=total,
        mesh=mesh,
        compiler=StageCompiler(plan, mesh, validation_specs, tables),
        checkpoints=checkpoints,
        logs=RunLogs(lock.run_dir, heads=has_head_log(settings.heads, plan.entries)),
        lock=lock,
        tables=tables,
        command=_command(settings, sources),
    )


def _command(settings: Settings, sources: Sources) -> str:
    """Return the command that goes on with a run that was started like this."""
    typed = typed_command(sources.words, "jaxmorph.train")
    return typed if settings.run.resume else f"{typed} --resume"  # the last word on it counts


def _streams(plan: Plan, corpus: TokenizedCorpus, task: Task) -> dict[int, Stream]:
    """Return the training examples by context length, for every one of the schedule."""
    lengths, seed = {stage.shape.model.seq_len for stage in plan.stages}, plan.settings.run.seed
    return {n: task.stream(corpus.train, seq_len=n, seed=seed) for n in sorted(lengths)}


def _corpus(plan: Plan) -> TokenizedCorpus:
    """Return the corpus, long enough for every context length of the schedule."""
    data = plan.settings.data
    return load_tokens(
        data.data,
        data.tokenizer,
        seq_len=max(stage.shape.model.seq_len for stage in plan.stages),
        val_fraction=data.val_fraction,
        bpe_vocab_size=data.bpe_vocab_size,
        cache_dir=data.cache_dir,
    )


def _validation(task: Task, corpus: TokenizedCorpus, plan: Plan, shape: RunShape) -> list[Batch]:
    """Return the validation batches, of the initial batch size, which operations do not change."""
    return task.validation(
        corpus.val,
        seq_len=shape.model.seq_len,
        batch_size=plan.start.batch_size,
        n_batches=shape.eval_iters,
    )


def _check_validation(mesh: MeshShape, corpus: TokenizedCorpus, plan: Plan, task: Task) -> None:
    parts = mesh.batch_parts
    for stage in plan.stages:
        for batch in _validation(task, corpus, plan, stage.shape):
            rows = len(jax.tree.leaves(batch)[0])
            if rows % parts:
                raise InputError(
                    "--val_fraction",
                    "",
                    None,
                    f"more validation text: its {rows} windows of {stage.shape.model.seq_len} "
                    f"tokens do not divide over {parts} data devices",
                )


def _print_summary(plan: Plan, corpus: TokenizedCorpus, mesh: Mesh, total: int) -> None:
    device = f"{mesh.devices.size} × {mesh.devices.flat[0].device_kind}"
    say(f"jaxmorph on jax {jax.__version__}, {device}")
    say(describe(plan.settings, plan.start, total=total, corpus=corpus.description))
    for warning in _passes_warnings(plan, corpus, total):
        say(f"warning: {warning}")
    for stage in plan.stages:
        place = f"{stage.entry.number} of the schedule: " if stage.entry else ""
        for warning in stage.warnings:
            say(f"warning: {place}{warning}")
    if plan.entries:
        start, end = (parameter_count(plan.stages[k].shape.model) for k in (0, -1))
        most = "at most " if plan.stages[-1].may_be_smaller else ""
        grows = f", from {start:,} to {most}{end:,} parameters" if start != end else ""
        count = f"{len(plan.entries)} operation{'s' * (len(plan.entries) > 1)}"
        say(f"Schedule: {count}{grows} (--dry_run shows each)")


def _passes_warnings(plan: Plan, corpus: TokenizedCorpus, total: int) -> list[str]:
    """Return a warning if the steps read the corpus very often, unless the epochs already say so."""
    tokens = sum(
        (span.end - span.begin) * tokens_per_step(span.stage.shape)
        for span in stages_ahead(plan.stages, total)
    )
    said = passes_warnings(plan.settings.run.num_epochs or 0)
    return [] if said else passes_warnings(tokens / len(corpus.train))
