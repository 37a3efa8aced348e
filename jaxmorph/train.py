"""Train: `python -m jaxmorph.train [--config FILE.yaml] [--flag value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxmorph.command_line import run_door
from jaxmorph.host_memory import keep_freed_memory
from jaxmorph.resolve import known_vocab_size, model_config, resolve
from jaxmorph.summary import describe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door and return its exit status (see `--help`)."""
    return run_door(lambda: _train(sys.argv[1:] if argv is None else argv))


def _train(argv: Sequence[str]) -> int:
    settings, sources = resolve(argv)
    if settings.run.dry_run:
        vocab_size = known_vocab_size(settings)
        config = None if vocab_size is None else model_config(settings, vocab_size)
        print(describe(settings, config))
        return 0
    keep_freed_memory()
    from jaxmorph.loop import train  # JAX is imported only once the settings are known to be good

    return train(settings, sources)


if __name__ == "__main__":
    sys.exit(main())
