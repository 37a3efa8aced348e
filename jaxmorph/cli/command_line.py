"""Flags and exit of every command: tyro parses; bad input gives one line and status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import operator
import os
import platform
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from jaxmorph.cli.errors import FailedError, InputError, nearest, system_error_in_words
from jaxmorph.cli.plain_numbers import PlainNumbers
from jaxmorph.cli.printing import say

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
_READER_LEFT = 128 + 13  # the exit status that a shell reports for SIGPIPE


def parse(target: Any, argv: Sequence[str], prog: str, description: str) -> Any:
    """Parse the flags in `argv` into `target`.

    Flags are spelled with `_` or `-`, are grouped in `--help` by dataclass, and never have the
    dataclass's name as a prefix. Help texts are the docstrings under the fields.

    Args:
      target: a dataclass, or an instance of one, whose values are then the defaults.
      argv: the arguments after the program's name.
      prog: the program as the user types it, for `--help` and for errors.
      description: the first lines of `--help`.

    Raises:
      InputError: an unknown or missing flag, or a value of the wrong type, in one line.
      SystemExit: status 0, after printing `--help` or `--version`.
    """
    _answer_version(argv)
    default, kind = tyro.MISSING_NONPROP, target
    if dataclasses.is_dataclass(target) and not isinstance(target, type):
        default, kind = target, type(target)
    said, numbers = io.StringIO(), PlainNumbers()
    try:
        with contextlib.redirect_stderr(said):
            value, unknown = tyro.cli(
                kind,
                prog=prog,
                description=description,
                args=list(argv),
                default=default,
                use_underscores=True,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=numbers.registry(),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _refusal(said.getvalue(), prog, argv, numbers) from None
    if unknown:
        raise _unknown(unknown[0], argv, prog, dict(_flags(value)))
    return value


def parse_command(
    commands: Mapping[str, type], argv: Sequence[str], prog: str, description: str
) -> Any:
    """Parse the arguments after a sub-command's name into its dataclass.

    Args:
      commands: the dataclass of each sub-command by name; their docstrings describe them.
      argv: the arguments after the program's name; the first is the sub-command.
      prog: the program as the user types it.
      description: the first lines of `--help`.

    Raises:
      InputError: no such sub-command, or as `parse`.
      SystemExit: status 0, after printing `--help`.
    """
    name = argv[0] if argv else ""
    if name in commands:
        words = inspect.cleandoc(commands[name].__doc__ or "")
        return parse(commands[name], argv[1:], f"{prog} {name}", words)
    first_lines = {
        command: inspect.cleandoc(target.__doc__ or "").splitlines()[0]
        for command, target in commands.items()
    }
    raise overview(name, first_lines, prog, description)


def overview(name: str, commands: Mapping[str, str], prog: str, description: str) -> InputError:
    """Answer -h, --help or --version in place of a sub-command; return that anything else is none.

    Args:
      name: the word where a sub-command belongs; "" for none.
      commands: what each does, in a line, by name.
      prog: the program as the user types it.
      description: the first lines of `--help`.

    Raises:
      SystemExit: status 0, after printing the answer.
    """
    _answer_version([name])
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        say(f"usage: {prog} {{{','.join(commands)}}} ...\n\n{description}\n")
        for command, line in commands.items():
            say(f"  {command:{width}}  {line}")
        say(f"\nFlags of each: {prog} {next(iter(commands))} --help")
        raise SystemExit(0)
    expected = (
        f"{_one_of(list(commands))}{nearest(name, commands)}; {prog} --help says what each does"
    )
    return InputError(prog, "", name or None, expected)


def program(command: str) -> str:
    """Return a command as the user started it: `jaxmorph train` or `python -m jaxmorph.train`."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py" and started.parent.name == "jaxmorph":
        return f"python -m jaxmorph {command}"
    return f"jaxmorph {command}" if started.stem == "jaxmorph" else f"python -m jaxmorph.{command}"


Commands = Mapping[str, "type | Commands"]


def completion(commands: Commands, prog: str, shell: str) -> str:
    """Return a script with which a shell completes a program's commands and flags.

    Args:
      commands: the dataclass of each command by name, or its sub-commands.
      prog: the program.
      shell: "bash" or "zsh".
    """
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(
            _one_kind(commands),
            prog=prog,
            args=["--tyro-print-completion", shell],
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    return script.getvalue()


def _one_kind(commands: Commands) -> Any:
    """Return the type that tyro parses into one of the commands."""
    kinds = {
        name: target if isinstance(target, type) else _one_kind(target)
        for name, target in commands.items()
    }
    kinds["--version"] = _Version
    named = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()]
    return functools.reduce(operator.or_, named)


@dataclasses.dataclass
class _Version:
    """Say the version."""


def _answer_version(argv: Sequence[str]) -> None:
    """Print the version where it is asked for, and exit."""
    if "--version" in argv:
        python = platform.python_version()
        say(f"jaxmorph {version('jaxmorph')} (jax {version('jax')}, Python {python})")
        raise SystemExit(0)


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command's body and return its exit status.

    Bad input gives 2 and one line on stderr; whatever else fails that can, such as a full disk, 1 and
    one line; a closed output pipe (`... --help | head -1`) 141, silently, like a program killed by
    SIGPIPE. What the terminal's encoding lacks is printed as an escape.
    """
    for stream in _standard_streams():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _flushed(_status(command))
    except BrokenPipeError:
        left = [stream for stream in _standard_streams() if _reader_left(stream)]
        if not left:  # another pipe broke
            raise
        _discard(left)
        return _READER_LEFT


def _status(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except InputError as error:
        _print_error(str(error))
        return 1 if _is_of_failing_disk(error) else 2
    except FailedError as error:
        _print_error(str(error))
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        _print_error(system_error_in_words(error))
        return 1
    except SystemExit as stop:  # --help has been printed
        if stop.code:
            raise
        return 0


def _is_of_failing_disk(error: InputError) -> bool:
    """Return whether a place was refused because its disk is full or fails: no fault of the input."""
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno in _DISK_FAILURES


def _flushed(status: int) -> int:
    """Flush the standard streams, or Python would complain at exit; return the exit status."""
    for stream in _standard_streams():
        try:
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:  # it goes to a file, on a full disk
            _discard([stream])
            if not status:
                _print_error(f"{stream.name}: {system_error_in_words(error)}")
                status = 1
    return status


def _discard(streams: Iterable[TextIO]) -> None:
    """Let what is left in the streams' buffers go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())


def _print_error(message: str) -> None:
    try:
        say(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError:  # stderr's disk is full as well: there is nowhere to say it
        _discard([sys.stderr])


def _standard_streams() -> list[TextIO]:
    """Return stdout and stderr; either may be missing."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _reader_left(stream: TextIO) -> bool:
    """Return whether a stream is a pipe whose reader has closed it."""
    try:
        number = stream.fileno()
    except OSError:  # an in-memory stream
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flags(value: Any) -> Iterator[tuple[str, bool]]:
    """Yield the flags of a parsed dataclass, and whether each is a switch that takes no value."""
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if dataclasses.is_dataclass(content):
            yield from _flags(content)
            continue
        switch = isinstance(content, bool)
        yield f"--{field.name}", switch
        if switch:
            yield f"--no_{field.name}", switch


def _unknown(word: str, argv: Sequence[str], prog: str, flags: dict[str, bool]) -> InputError:
    if word.startswith("-"):
        flag = word.partition("=")[0]
        return InputError(flag, "", None, f"a known flag{nearest(_underscored(flag), flags)}")
    for previous, token in zip(("", *argv), argv, strict=False):
        if token != word and not token.endswith(f"={word}"):
            continue
        name = _underscored(previous if token == word else token.partition("=")[0])
        if flags.get(name):
            return InputError(name, "", word, f"no value: {_switch(name)}")
    return InputError(prog, "", word, "a flag before each value, as in --name value")


def _switch(name: str) -> str:
    bare = name.removeprefix("--").removeprefix("no_")
    return f"--{bare} or --no_{bare}"


def _underscored(flag: str) -> str:
    return flag[:2] + flag[2:].replace("-", "_")


def _refusal(said: str, prog: str, argv: Sequence[str], numbers: PlainNumbers) -> InputError:
    """Convert tyro's boxed message to an InputError; quote unknown messages in full."""
    title, lines, metavar = _unboxed(said)
    text = " ".join(line.strip() for line in lines)
    if title == "Value error" and (found := re.match(r"Error parsing (\S+): (.*)", text)):
        got, rule = numbers.refused or (None, "")
        return InputError(found[1], "", got, _expected(metavar) + rule)
    found = re.match(r"invalid choice '(.*)' for argument '(.*?)'\. Expected one of \((.*)\)", text)
    if found:
        choices, got = _choices(re.findall(r"'([^']*)'", found[3])), _as_given(found[1], argv)
        return InputError(found[2], "", got, _one_of(choices) + nearest(got, choices))
    if found := re.match(r"Missing value for argument '(.*?)'", text):
        return InputError(found[1], "", None, "a value after it")
    if found := re.match(r"Missing from (.*?):", text):
        least = min((_indent(line) for line in lines[1:]), default=0)
        wanted = [line.strip() for line in lines[1:] if _indent(line) == least]
        return InputError(found[1], "", None, f"{', '.join(wanted)} as well")
    return InputError(prog, "", None, f"flags as --help lists them ({text or title})")


def _unboxed(said: str) -> tuple[str, list[str], str]:
    """Return the title of tyro's message, the lines of its first part, and the flag's metavar."""
    plain = _COLOUR.sub("", said)
    lines = [re.sub(r"^\s?│|│\s*$", "", line).rstrip() for line in plain.splitlines()]
    title = lines[0].strip("╭╮─- ") if lines else ""
    body = list(lines[1:])
    while body and not body[0].strip("╭╮╰╯─- "):
        body.pop(0)
    part = []
    for line in body:
        if not line.strip("╭╮╰╯─- "):
            break
        part.append(line)
    metavar = re.search(r"Argument helptext:\s+\S+ (.*)", "\n".join(lines))
    return title, part, metavar[1].strip() if metavar else ""


def _as_given(shown: str, argv: Sequence[str]) -> str:
    """Return the value that a message shows; broken over lines there, and without colours."""
    values = [*argv, *(token.partition("=")[2] for token in argv if "=" in token)]
    squeezed = "".join(shown.split())
    same = (value for value in values if "".join(_COLOUR.sub("", value).split()) == squeezed)
    return next(same, shown)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _expected(metavar: str) -> str:
    """Return what a flag takes, from tyro's short notation for it."""
    kinds = {"INT": "a whole number", "FLOAT": "a number"}
    for kind, words in kinds.items():
        if re.search(rf"\b{kind}\b", metavar):
            return words
    choices = re.search(r"\{([^{}]*)\}", metavar.replace("{None}", ""))
    return _one_of(choices[1].split(",")) if choices else f"a value like {metavar or '--help says'}"


def _choices(listed: list[str]) -> list[str]:
    # tyro keeps the choices of an optional flag in a set, whose order varies between runs.
    return sorted({*listed} - {"None"}) if "None" in listed else listed


def _one_of(choices: Sequence[str]) -> str:
    return f"one of {', '.join(choices)}"
