"""All commands behind one name: `jaxmorph COMMAND ...`, or `python -m jaxmorph COMMAND ...`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from jaxmorph.cli.command_line import completion, overview, parse, program, run_command
from jaxmorph.cli.printing import say

_COMMANDS = {
    "train": "Train a GPT that grows, on text.",
    "evaluate": "Evaluate a trained model: sample text.",
    "plot": "Draw learning-rate schedules and runs.",
    "completion": "Print what makes a shell complete commands and flags.",
}
_DESCRIPTION = "Train transformers that change shape while they train."


@dataclass(frozen=True)
class Completion:
    """Print a script that makes a shell complete commands and flags.

    For bash: eval "$(jaxmorph completion bash)" in ~/.bashrc. For zsh: jaxmorph completion zsh into a
    file _jaxmorph in a folder of $fpath.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    """The shell."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit status."""
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name in _COMMANDS and name != "completion":
        return importlib.import_module(f"jaxmorph.{name}").main(words)
    return run_command(lambda: _complete_or_explain(name, words))


def _complete_or_explain(name: str, words: Sequence[str]) -> int:
    if name != "completion":
        raise overview(name, _COMMANDS, "jaxmorph", _DESCRIPTION)
    command = parse(Completion, words, program(name), inspect.cleandoc(Completion.__doc__ or ""))
    from jaxmorph import evaluate, plot
    from jaxmorph.config.settings import Settings

    commands = {"train": Settings, "evaluate": evaluate.COMMANDS, "plot": plot.COMMANDS}
    say(completion(commands | {name: Completion}, "jaxmorph", command.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
