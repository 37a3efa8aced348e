"""The errors that a command prints as one message: bad input, and what else can fail."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from jaxmorph.cli.printing import named, quoted, sentence

_LONGEST_GUESS = 100  # characters; a longer word is no misspelling

# What a setting is called elsewhere, or in short, and its names here, of which a command has one.
_SYNONYMS = {
    "lr": ("learning_rate", "max_lr"),
    "max_lr": ("learning_rate",),
    "learning_rate": ("max_lr",),
    "min_lr": ("min_lr_ratio",),
    "warmup": ("warmup_steps",),
    "warmup_iters": ("warmup_steps",),
    "steps": ("max_steps", "total_steps"),
    "iters": ("max_steps", "total_steps"),
    "max_iters": ("max_steps", "total_steps"),
    "max_steps": ("total_steps",),
    "epochs": ("num_epochs",),
    "gradient_accumulation_steps": ("grad_accum_steps",),
    "block_size": ("seq_len",),
    "context_length": ("seq_len",),
    "n_layer": ("n_layers",),
    "n_head": ("n_heads",),
    "n_embd": ("d_model",),
    "hidden_size": ("d_model",),
    "n_inner": ("d_ff",),
    "out_dir": ("run_dir",),
    "output_dir": ("run_dir",),
    "dataset": ("data",),
    "schedule": ("scaling_schedule_file", "scheduler"),
    "lr_scheduler": ("scheduler",),
    "wd": ("weight_decay",),
    "max_grad_norm": ("grad_clip",),
    "gradient_clip_val": ("grad_clip",),
    "length": ("max_new_tokens",),
    "num_tokens": ("max_new_tokens",),
    "step": ("checkpoint",),
}


class InputError(Exception):
    """Bad input: a setting, a file or a flag that cannot be used as given.

    A command prints it as one message and exits with status 2. The message names the place of the
    value, the value itself, and what was expected. It is one line of bounded length without control
    characters, whatever the values are.

    Args:
      where: the file, or the flag with its dashes, the value came from.
      field: the field in that file ("" if `where` already says it).
      got: the wrong value as the user wrote it (None: nothing to quote).
      expected: what would have been accepted, and the fix where there is one.
    """

    def __init__(self, where: str, field: str, got: object, expected: str):
        self.where, self.field, self.got, self.expected = where, field, got, expected
        place = f"{named(where)}: {named(field)}" if field else named(where)
        found = "" if got is None else f"got {quoted(got)}, "
        super().__init__(f"{place}: {found}expected {sentence(expected)}")


class FailedError(RuntimeError):
    """What failed is not the input. A command prints it as one message and exits with status 1."""


def system_error_in_words(error: OSError) -> str:
    """Return the message for a failure of the system, such as a full disk: file and reason."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name closest to `name`, or ""."""
    if len(name) > _LONGEST_GUESS:
        return ""
    known, dashes = list(known), name[: len(name) - len(name.lstrip("-"))]
    meant = [dashes + synonym for synonym in _SYNONYMS.get(name.removeprefix(dashes), ())]
    close = [word for word in meant if word in known]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
