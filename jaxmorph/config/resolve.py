"""From flags and a YAML file to checked settings, and back to the `config.yaml` of a run folder."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxmorph.cli.command_line import parse
from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.cli.yaml_file import read_yaml
from jaxmorph.config.run_shape import OperationError, RunShape
from jaxmorph.config.settings import Settings, Within
from jaxmorph.config.start import start_shape, total_steps, warmup_steps

TOKENIZER_KINDS = ("byte", "char", "bpe", "gpt2")
MESH_AXES = ("data", "fsdp", "tensor")
_GROUPS = {name: hint for name, hint in typing.get_type_hints(Settings).items() if name != "config"}
# flag name -> (group it belongs to, its annotated type)
FIELDS: dict[str, tuple[str, Any]] = {
    name: (group, hint)
    for group, cls in _GROUPS.items()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items()
}


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where each setting came from, so that an error can point there."""

    file: str
    in_file: frozenset[str]
    flags: frozenset[str]

    def error(self, name: str, got: object, expected: str) -> InputError:
        """Return the error that says `name` is wrong, at the place the user gave it."""
        if name in self.flags:
            return InputError(f"--{name}", "", got, expected)
        if name in self.in_file:
            return InputError(self.file, name, got, expected)
        return InputError(f"--{name}", "", got, f"{expected}; give --{name}")


def resolve(
    argv: Sequence[str], prog: str = "python -m jaxmorph.train"
) -> tuple[Settings, Sources]:
    """Return the checked settings that `argv` asks for, and where each came from.

    Raises:
      InputError: anything wrong that can be known before a corpus or a device is looked at.
      SystemExit: after printing `--help`.
    """
    path = _config_path(argv)
    values = _file_values(path) if path else {}
    settings = _with_values(Settings(), values)
    settings = parse(settings, argv, prog, _DESCRIPTION)
    sources = Sources(str(path), frozenset(values), _flags_in(argv))
    settings = _with_values(settings, _resolved_paths(settings, sources, path))
    check(settings, sources)
    return settings, sources


_DESCRIPTION = """Train a GPT on text, from one command.

With no flags it trains on the Python standard library's own source, with a byte tokenizer. A run
lives in one folder: start the same command again and it goes on where it stopped. Flags can be
written with _ or -, and stand in a YAML file under the same names."""


def values_of(settings: Settings) -> dict[str, Any]:
    """Return the settings as one flat mapping of flag names to values."""
    return {n: getattr(getattr(settings, group), n) for n, (group, _) in FIELDS.items()}


def to_yaml(settings: Settings) -> str:
    """Return the settings as a YAML file that reproduces the run (`--config` reads it)."""
    return yaml.safe_dump(values_of(settings), sort_keys=False, allow_unicode=True)


def check_warmup(settings: Settings, sources: Sources, total: int) -> None:
    """Refuse a warmup that is not over before training is.

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


def parse_mesh(text: str) -> dict[str, int]:
    """Return the mesh axes of `data=2,fsdp=4` in canonical order, 1 for those not named.

    Raises:
      ValueError: with a sentence saying what is wrong.
    """
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    seen: set[str] = set()
    for part in filter(None, text.split(",")):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES:
            raise ValueError(f"axes among {', '.join(MESH_AXES)}{nearest(name, MESH_AXES)}")
        if (
            name in seen
            or not size.isascii()
            or not size.isdigit()
            or not 1 <= int(size) <= 1 << 20
        ):
            raise ValueError("each axis once, with a whole number ≥ 1, as in data=2,fsdp=4")
        seen.add(name)
        sizes[name] = int(size)
    return sizes


def check(settings: Settings, sources: Sources) -> None:
    """Check every setting by itself, then together.

    Raises:
      InputError: naming the flag or the file's entry.
    """
    for name, value in values_of(settings).items():
        _check_range(name, value, sources)
    start = _checked_start(settings, sources)
    _check_model(settings, start, sources)
    _check_optimizer(settings, sources)
    _check_files(settings, sources)


def _check_range(name: str, value: Any, sources: Sources) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise sources.error(name, value, "a finite number")
    limits = _range(FIELDS[name][1])
    if value is not None and limits is not None and not limits.holds(value):
        raise sources.error(name, value, f"a number {limits}")


def _checked_start(settings: Settings, sources: Sources) -> RunShape:
    """Return what the run starts with, as far as it is known before the corpus is read."""
    try:
        return start_shape(settings, None, total_steps(settings, None))
    except OperationError as error:
        raise sources.error(error.field, error.got, error.expected) from None


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
        mesh = parse_mesh(settings.scale.mesh)
    except ValueError as error:
        raise sources.error("mesh", settings.scale.mesh, str(error)) from None
    parts = mesh["data"] * mesh["fsdp"]
    if start.batch_size % parts:
        raise sources.error(
            "batch_size", start.batch_size, f"a multiple of the mesh's data × fsdp ({parts})"
        )


def _check_optimizer(settings: Settings, sources: Sources) -> None:
    run, optimizer = settings.run, settings.optimizer
    if run.max_steps is not None and run.num_epochs is not None:
        raise sources.error("num_epochs", run.num_epochs, "max_steps or num_epochs, not both")
    if optimizer.scheduler in ("step", "exponential") and optimizer.min_lr_ratio == 0:
        raise sources.error(
            "min_lr_ratio", 0.0, f"a number > 0 with scheduler {optimizer.scheduler}"
        )
    total = total_steps(settings, None)
    if total is not None:
        check_warmup(settings, sources, total)


def _check_files(settings: Settings, sources: Sources) -> None:
    data, tokenizer = settings.data.data, settings.data.tokenizer
    if data != "stdlib" and not Path(data).exists():
        raise sources.error("data", data, "stdlib, or an existing file or folder")
    if data.endswith(".bin") and tokenizer == "char":
        raise sources.error("tokenizer", tokenizer, "the tokenizer the .bin file was made with")
    if tokenizer not in TOKENIZER_KINDS and not Path(tokenizer).is_file():
        near = nearest(Path(tokenizer).name, TOKENIZER_KINDS)
        raise sources.error(
            "tokenizer",
            tokenizer,
            f"{', '.join(TOKENIZER_KINDS)} or an existing tokenizer.json{near}",
        )
    for name in ("scaling_schedule_file", "simulate_loss"):
        file = getattr(settings.growth, name)
        if file is not None and not Path(file).is_file():
            raise sources.error(name, file, "an existing file")
    if settings.growth.simulate_loss and not settings.run.dry_run:
        raise sources.error("simulate_loss", settings.growth.simulate_loss, "dry_run with it")
    if settings.growth.simulate_loss and not settings.growth.scaling_schedule_file:
        raise sources.error(
            "simulate_loss", settings.growth.simulate_loss, "a scaling_schedule_file to simulate"
        )
    assert settings.run.run_dir is not None
    if Path(settings.run.run_dir).exists() and not Path(settings.run.run_dir).is_dir():
        raise sources.error("run_dir", settings.run.run_dir, "a folder, or a path not yet in use")


def _config_path(argv: Sequence[str]) -> Path | None:
    given = None
    for index, token in enumerate(argv):
        if token.startswith("--config="):
            given = token.partition("=")[2]
        elif token == "--config" and index + 1 < len(argv):
            given = argv[index + 1]
    return None if given is None else Path(given)


def _flags_in(argv: Sequence[str]) -> frozenset[str]:
    names = (t[2:].partition("=")[0].replace("-", "_") for t in argv if t.startswith("--"))
    return frozenset(n if n in FIELDS else n.removeprefix("no_") for n in names)


def _file_values(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(
            str(path), "", type(content).__name__, "a flat mapping of flag names to values"
        )
    for name, value in content.items():
        if not isinstance(name, str) or name not in FIELDS:
            raise InputError(str(path), "", name, f"a known flag name{nearest(str(name), FIELDS)}")
        content[name] = _typed(str(path), name, value)
    return content


def _typed(where: str, name: str, value: Any) -> Any:
    """Return a YAML value as its setting's type; a whole number may stand for a float."""
    options = tuple(_bare(option) for option in _options(FIELDS[name][1]))
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                return math.inf  # the range check refuses it
        if type(value) is option:
            return value
    shown = "null" if value is None else value
    raise InputError(where, name, shown, " or ".join(map(_describe, options)))


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        choices = typing.get_args(option)
        return f"one of {', '.join(map(str, choices))}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names[option]


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; of anything else, itself."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _bare(hint: Any) -> Any:
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint


def _range(hint: Any) -> Within | None:
    """Return the `Within` of an annotated type, of `X | None` as well."""
    for option in _options(hint):
        for note in getattr(option, "__metadata__", ()):
            if isinstance(note, Within):
                return note
    return None


def _with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    groups = {}
    for group in _GROUPS:
        changes = {n: v for n, v in values.items() if FIELDS[n][0] == group}
        groups[group] = dataclasses.replace(getattr(settings, group), **changes)
    return dataclasses.replace(settings, **groups)


def _resolved_paths(settings: Settings, sources: Sources, config: Path | None) -> dict[str, Any]:
    """Return the settings that are paths, absolute: a file's against that file, a flag's against ."""
    plain = ("run_dir", "cache_dir", "scaling_schedule_file", "simulate_loss")
    keywords = {"data": ("stdlib",), "tokenizer": TOKENIZER_KINDS} | dict.fromkeys(plain, ())
    values = values_of(settings)
    if values["run_dir"] is None:
        values["run_dir"] = str(Path("runs", config.stem if config else "train"))
    resolved = {}
    for name, words in keywords.items():
        value = values[name]
        if value is None or value in words:
            continue
        from_file = name in sources.in_file and name not in sources.flags and config is not None
        base = config.parent if from_file and config is not None else Path()
        resolved[name] = os.path.abspath(base / Path(value).expanduser())
    return resolved
