"""The processes of a run: how many there are, which one writes, and how they agree on values.

No other module asks JAX for the process count. Anything one process decides or reads must be the
same on all: broadcast it with `agreed`, or run it on the first process (`by_first`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FAILED = -(2**31)  # what the first process broadcasts if it failed


class FirstProcessError(RuntimeError):
    """The first process failed at work it does for all; see its own error message."""


def count() -> int:
    """Return how many processes there are."""
    import jax

    return jax.process_count()


def agreed(value: float) -> float:
    """Broadcast the first process's value to all processes.

    With several processes it is broadcast in float32.
    """
    if count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


def by_first(action: Callable[[], int]) -> int:
    """Run the action on the first process; all return its result, an int32, once it is done.

    Raises:
      FirstProcessError: in the other processes, if the first one raised.
    """
    if count() == 1:
        return action()
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    answer = _FAILED
    try:
        if jax.process_index() == 0:
            answer = action()
    finally:  # whatever happened to the first process, the others must not wait for ever
        answer = int(multihost_utils.broadcast_one_to_all(np.asarray(answer, np.int32)))
    if answer == _FAILED:
        raise FirstProcessError
    return answer


def whole(array: Any) -> Any:
    """Return an array, of which this process may hold a part, with all its entries on this host."""
    import jax

    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(array, tiled=True)
    return array
