"""From flags and a YAML file to checked settings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmorph.cli.command_line import parse, program
from jaxmorph.cli.errors import InputError, nearest
from jaxmorph.config.checks import check
from jaxmorph.config.fields import Field, fields_of, values_of, with_values
from jaxmorph.config.nanogpt_files import meta_file
from jaxmorph.config.settings import STDLIB, Settings
from jaxmorph.config.settings_file import read_settings
from jaxmorph.config.sources import Sources

_DESCRIPTION = """Train a GPT on text, from one command.

With no flags it trains on the Python standard library's own source, with a byte tokenizer. A run
lives in one folder: run the same command again and it resumes where it stopped. Flags can be
written with _ or -, and given in a YAML file under the same names: --config FILE.yaml, or the name of
one that comes with the package, as in --config demo."""


def resolve(
    argv: Sequence[str],
    prog: str = "",
    defaults: Settings = Settings(),  # noqa: B008 -- frozen
) -> tuple[Settings, Sources]:
    """Return the checked settings for `argv`, and where each came from.

    Args:
      argv: the arguments after the program's name.
      prog: the program as the user types it; "": as it was started.
      defaults: the values that neither a flag nor the file overrides.

    Raises:
      InputError: anything wrong that can be found before a corpus or a device is accessed.
      SystemExit: after printing `--help`.
    """
    path, fields = _config_path(argv), fields_of(type(defaults))
    values = read_settings(path, fields) if path else {}
    settings = parse(with_values(defaults, values), argv, prog or program("train"), _DESCRIPTION)
    sources = Sources(str(path), frozenset(values), _flags_in(argv, fields), tuple(argv))
    return checked(settings, sources, path), sources


def checked(settings: Settings, sources: Sources, config: Path | None) -> Settings:
    """Return the settings with their paths made absolute, once every check has passed.

    Args:
      settings: as the flags and the file have them.
      sources: where each came from.
      config: the file.

    Raises:
      InputError: see `resolve`.
    """
    settings = with_values(settings, _absolute_paths(settings, sources, config))
    settings = with_values(settings, _described_tokenizer(settings, sources))
    check(settings, sources)
    return settings


def _described_tokenizer(settings: Settings, sources: Sources) -> dict[str, Any]:
    """Return the tokenizer that describes a .bin file's characters, unless another one is given."""
    data = settings.data
    if data.data == STDLIB or (sources.given("tokenizer") and data.tokenizer != "char"):
        return {}
    described = meta_file(Path(data.data))
    return {} if described is None else {"tokenizer": str(described)}


def _config_path(argv: Sequence[str]) -> Path | None:
    given = None
    for index, token in enumerate(argv):
        if token.startswith("--config="):
            given = token.partition("=")[2]
        elif token == "--config" and index + 1 < len(argv):
            given = argv[index + 1]
    return None if given is None else _own_config(given) or Path(given)


def _own_config(name: str) -> Path | None:
    """Return the package's own config of this name; None if there is none, or it is a path."""
    if not re.fullmatch(r"\w+", name) or os.path.exists(name):
        return None
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")  # installed; in a checkout
    files = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if name not in files:
        names = f"{', '.join(sorted(files))}{nearest(name, files)}"
        raise InputError("--config", "", name, f"a file, or one of the package's own: {names}")
    return files[name]


def _flags_in(argv: Sequence[str], fields: Mapping[str, Field]) -> frozenset[str]:
    names = (t[2:].partition("=")[0].replace("-", "_") for t in argv if t.startswith("--"))
    return frozenset(n if n in fields else n.removeprefix("no_") for n in names)


def _absolute_paths(settings: Settings, sources: Sources, config: Path | None) -> dict[str, Any]:
    """Return path settings made absolute: from the file's folder, or for flags the current one."""
    values = values_of(settings)
    if values["run_dir"] is None:
        values["run_dir"] = str(Path("runs", config.stem if config else "train"))
    absolute = {}
    for name, field in fields_of(type(settings)).items():
        value = values[name]
        if field.path is None or value is None or value in field.path.keywords:
            continue
        if not value:  # of an unset shell variable, often; a path of nothing is the folder itself
            raise sources.error(name, value, "a path that is not empty")
        from_file = name in sources.in_file and name not in sources.flags and config is not None
        base = config.parent if from_file and config is not None else Path()
        try:
            absolute[name] = os.path.abspath(base / Path(value).expanduser())
        except RuntimeError as error:  # ~name of nobody
            raise sources.error(name, value, f"a path ({error})") from None
    return absolute
