"""Evaluate a trained model: `python -m jaxmorph.evaluate sample RUN_DIR --prompt TEXT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxmorph.cli.command_line import parse_command, program, run_command
from jaxmorph.cli.errors import InputError
from jaxmorph.cli.paths import is_folder, reason
from jaxmorph.cli.printing import say
from jaxmorph.cli.text_file import read_text
from jaxmorph.config.fields import check_flags
from jaxmorph.config.settings import Count, Positive, Within

_LEAST_TEMPERATURE = 1e-6
_LARGEST_TOKENIZER = 1_000_000_000  # bytes; some have tens of millions


@dataclass(frozen=True)
class Sample:
    """Generate text from a run's newest sound checkpoint."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_DIR")]
    """The run folder."""
    prompt: str = "\n"
    """Text to continue."""
    max_new_tokens: Positive = 300
    """Tokens to generate."""
    temperature: Annotated[float, Within(low=0, high=1e6)] = 0.8
    """Below 1 favours likely tokens, above 1 flattens the distribution; 0 takes the likeliest."""
    top_k: Count = 0
    """Sample from this many likeliest tokens; 0: from all."""
    seed: Count = 0
    """Seed of the sampling."""
    checkpoint: Count | None = None
    """Step of the checkpoint. Default: the newest sound one."""


COMMANDS = {"sample": Sample}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status (see `--help`)."""
    return run_command(lambda: _evaluate(sys.argv[1:] if argv is None else argv))


def _evaluate(argv: Sequence[str]) -> int:
    return _sample(parse_command(COMMANDS, argv, program("evaluate"), "Evaluate a trained model."))


def _check(command: Sample) -> None:
    check_flags(command)
    if 0 < command.temperature < _LEAST_TEMPERATURE:  # logits divided by it would be infinite
        expected = f"0, or a number ≥ {_LEAST_TEMPERATURE:g}"
        raise InputError("--temperature", "", command.temperature, expected)
    if not command.prompt:
        raise InputError("--prompt", "", command.prompt, "at least one character")
    try:
        found, why = is_folder(Path(command.run_dir) / "checkpoints"), ""
    except (OSError, ValueError) as error:
        found, why = False, f" ({reason(error)})"
    if not found:
        expected = f"a run folder (with checkpoints/){why}"
        raise InputError("RUN_DIR", "", command.run_dir, expected)


def _sample(command: Sample) -> int:
    _check(command)
    from jaxmorph.data.tokenization import from_json
    from jaxmorph.model.sampling import generate

    run_dir = Path(command.run_dir)
    config, params, gates = _load(run_dir, command.checkpoint)
    saved = run_dir / "tokenizer.json"
    if not saved.is_file():
        raise InputError(str(saved), "", None, "the run's tokenizer")
    tokenizer = from_json(read_text(saved, _LARGEST_TOKENIZER), str(saved))
    prompt = [int(token) for token in tokenizer.encode(command.prompt)]
    tokens = generate(
        config,
        params,
        gates,
        prompt,
        vocab_size=tokenizer.vocab_size,
        temperature=command.temperature,
        top_k=command.top_k,
        seed=command.seed,
    )
    ids = list(prompt)
    shown = ""
    for _, token in zip(range(command.max_new_tokens), tokens, strict=False):
        ids.append(token)
        text = tokenizer.decode(ids)
        # A character can span several tokens: show only complete ones.
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            say(text[len(shown) :], end="")
            shown = text
    rest = tokenizer.decode(ids)
    say(rest[len(shown) :] if rest.startswith(shown) else "")
    return 0


def _load(run_dir: Path, step: int | None) -> tuple[Any, Any, Any]:
    """Return the architecture, parameters and gates of a checkpoint."""
    from jaxmorph.training.resume import CheckpointRecord, open_checkpoints, restore_model

    checkpoints = open_checkpoints(run_dir)
    steps = checkpoints.steps()
    if step is None:
        step = checkpoints.latest_sound()
    if step is None or not steps:
        raise InputError("RUN_DIR", "", str(run_dir), "a run with a checkpoint")
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise InputError("--checkpoint", "", step, f"the step of a checkpoint: {there}")
    record = CheckpointRecord.from_meta(checkpoints.read_meta(step))
    return record.model, *restore_model(checkpoints, step, record.model)


if __name__ == "__main__":
    sys.exit(main())
