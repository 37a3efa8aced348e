"""What a run works with: its corpus, plan, programs and checkpoints, made before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmorph.cli.errors import InputError
from jaxmorph.config.resolve import Sources, check_warmup, parse_mesh
from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import Settings
from jaxmorph.config.start import total_steps
from jaxmorph.data.examples import ExampleStream, TokenizedCorpus, load_tokens, validation_batches
from jaxmorph.growth.plan import Plan, make_plan
from jaxmorph.growth.summary import describe
from jaxmorph.model.architecture import flops_per_token, parameter_count
from jaxmorph.step.programs import Programs
from jaxmorph.step.sharding import BATCH_AXES, make_mesh
from jaxmorph.storage.checkpoints import Checkpoints
from jaxmorph.training.resume import Position
from jaxmorph.training.stages import StageCompiler


@dataclass(frozen=True)
class Stint:
    """What the loop works with between two operations.

    Args:
      shape: sizes and numbers of the run.
      architecture: how many architectures the run has left behind.
      programs: step and evaluation.
      stream: training examples of the stage's context length.
      validation: the validation batches.
    """

    shape: RunShape
    architecture: int
    programs: Programs
    stream: ExampleStream
    validation: list[np.ndarray]

    def after_step(self, position: Position) -> Position:
        """Return the position one update on."""
        examples = self.shape.batch_size * self.shape.grad_accum_steps
        tokens = examples * self.shape.model.seq_len
        return dataclasses.replace(
            position,
            step=position.step + 1,
            examples=position.examples + examples,
            tokens=position.tokens + tokens,
            flops=position.flops + tokens * flops_per_token(self.shape.model),
        )

    def totals(self, position: Position) -> dict[str, int]:
        """Return what a full line of metrics.jsonl says of a position."""
        return {
            "step": position.step,
            "stage": self.architecture,
            "tokens": position.tokens,
            "flops": position.flops,
            "params": parameter_count(self.shape.model),
            "batch_size": self.shape.batch_size,
            "grad_accum_steps": self.shape.grad_accum_steps,
        }


@dataclass(frozen=True)
class Setup:
    """What stays the same while a run goes on."""

    settings: Settings
    corpus: TokenizedCorpus
    streams: Mapping[int, ExampleStream]  # by context length
    plan: Plan
    total_steps: int
    mesh: Mesh
    compiler: StageCompiler
    checkpoints: Checkpoints
    run_dir: Path

    def stint(self, index: int) -> Stint:
        """Return what stage `index` works with, its programs compiled."""
        stage = self.plan.stages[index]
        return Stint(
            shape=stage.shape,
            architecture=stage.architecture,
            programs=self.compiler.programs(index),
            stream=self.streams[stage.shape.model.seq_len],
            validation=_validation(self.corpus, self.plan, stage.shape),
        )

    def moved(self, position: Position, old: Stint, new: Stint) -> Position:
        """Return the position in the new stint's stream of examples.

        The batch does not matter to it. Under another context length the text is cut into other
        windows, in another order; the run goes on at the same part of the epoch.
        """
        if new.shape.model.seq_len == old.shape.model.seq_len:
            return position
        per_epoch = old.stream.examples_per_epoch, new.stream.examples_per_epoch
        examples = position.examples * per_epoch[1] // per_epoch[0]
        return dataclasses.replace(position, examples=examples)


def prepare(settings: Settings, sources: Sources, run_dir: Path) -> Setup:
    """Read the corpus and plan the run; nothing is compiled and no state is made yet.

    Raises:
      InputError: bad input.
    """
    corpus = _corpus(settings)
    train_seq_len, seed = settings.data.seq_len, settings.run.seed
    first = ExampleStream(corpus.train, seq_len=train_seq_len, seed=seed)
    total = total_steps(settings, first.examples_per_epoch)
    assert total is not None
    check_warmup(settings, sources, total)
    mesh = make_mesh(settings.scale.mesh)
    plan = make_plan(settings, mesh.shape, vocab_size=corpus.tokenizer.vocab_size, total=total)
    _check_batches(mesh, corpus, plan)
    device = f"{mesh.devices.size} × {mesh.devices.flat[0].device_kind}"
    print(f"jaxmorph on jax {jax.__version__}, {device}")
    print(describe(settings, plan.start, total=total, corpus=corpus.description))
    _say_plan(plan)
    streams = {train_seq_len: first}
    for seq_len in {stage.shape.model.seq_len for stage in plan.stages} - streams.keys():
        streams[seq_len] = ExampleStream(corpus.train, seq_len=seq_len, seed=seed)
    return Setup(
        settings=settings,
        corpus=corpus,
        streams=streams,
        plan=plan,
        total_steps=total,
        mesh=mesh,
        compiler=StageCompiler(
            plan, settings, mesh, total, lambda shape: _validation(corpus, plan, shape)[0].shape
        ),
        checkpoints=Checkpoints(
            run_dir / "checkpoints", settings.run.keep_checkpoints, settings.run.keep_best
        ),
        run_dir=run_dir,
    )


def _corpus(settings: Settings) -> TokenizedCorpus:
    """Return the corpus, long enough for every context length of the schedule."""
    data = settings.data
    plan = make_plan(settings, parse_mesh(settings.scale.mesh), vocab_size=None, total=None)
    return load_tokens(
        data.data,
        data.tokenizer,
        seq_len=max(stage.shape.model.seq_len for stage in plan.stages),
        val_fraction=data.val_fraction,
        bpe_vocab_size=data.bpe_vocab_size,
        cache_dir=data.cache_dir,
    )


def _validation(corpus: TokenizedCorpus, plan: Plan, shape: RunShape) -> list[np.ndarray]:
    """Return the validation batches, of the starting batch size: an operation changes training's."""
    return validation_batches(
        corpus.val,
        seq_len=shape.model.seq_len,
        batch_size=plan.start.batch_size,
        n_batches=shape.eval_iters,
    )


def _check_batches(mesh: Mesh, corpus: TokenizedCorpus, plan: Plan) -> None:
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if plan.start.batch_size % parts:
        raise InputError(
            "--batch_size", "", plan.start.batch_size, f"a multiple of the {parts} data devices"
        )
    for stage in plan.stages:
        rows = len(_validation(corpus, plan, stage.shape)[0])
        if rows % parts:
            raise InputError(
                "--val_fraction",
                "",
                None,
                f"more validation text: its {rows} windows of {stage.shape.model.seq_len} tokens "
                f"do not divide over {parts} data devices",
            )


def _say_plan(plan: Plan) -> None:
    for stage in plan.stages:
        place = f"{stage.entry.number} of the schedule: " if stage.entry else ""
        for warning in stage.warnings:
            print(f"warning: {place}{warning}")
    if plan.entries:
        start, end = (parameter_count(plan.stages[k].shape.model) for k in (0, -1))
        grows = f", from {start:,} to {end:,} parameters" if start != end else ""
        print(f"Schedule: {len(plan.entries)} operations{grows} (--dry_run shows each)")
