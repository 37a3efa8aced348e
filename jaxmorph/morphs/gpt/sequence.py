"""Longer and shorter contexts.

Rotary positions (Su et al. 2021, arXiv 2104.09864) have no parameters, so no array changes; of learned
ones a shorter context keeps the first.
"""

from __future__ import annotations

import dataclasses

import jax
import optax

from jaxmorph.config.run_shape import LARGEST_COUNT, check_number, check_seq_len, scaled_size
from jaxmorph.config.settings import ModelConfig, Within
from jaxmorph.model.architecture import gpt_signatures
from jaxmorph.morphs.axis_map import cut
from jaxmorph.morphs.transport import Report, transport
from jaxmorph.step.state import TrainState


def change_seq_len(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    value: float,
    key: jax.Array | None = None,
) -> tuple[ModelConfig, TrainState, Report]:
    """Return the GPT with `value` times the context length. Exact at the positions both have.

    Args:
      config: the architecture before.
      state: its state.
      optimizer: makes the optimizer's state.
      value: a factor that gives a whole seq_len; at most 1 where positions are learned.
      key: not used, as nothing is drawn.

    Raises:
      OperationError: a factor that does not; names those near it that do.
    """
    new = scaled_size("seq_len", config.seq_len, value, least=1, most=LARGEST_COUNT)
    return _with_seq_len(config, state, optimizer, new, value)


def set_seq_len(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    value: int,
    key: jax.Array | None = None,
) -> tuple[ModelConfig, TrainState, Report]:
    """Return the GPT with a context of `value` tokens. Exact at the positions both have.

    Args:
      config: the architecture before.
      state: its state.
      optimizer: makes the optimizer's state.
      value: the context length; at most the present one where positions are learned.
      key: not used, as nothing is drawn.

    Raises:
      OperationError: no whole number, or more than the learned positions.
    """
    check_number(value, int, Within(low=1, high=LARGEST_COUNT))
    return _with_seq_len(config, state, optimizer, value, value)


def _with_seq_len(
    config: ModelConfig,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    seq_len: int,
    value: float,
) -> tuple[ModelConfig, TrainState, Report]:
    check_seq_len(config, seq_len, value)
    signatures = gpt_signatures(config)
    has_table = any("position" in signature.axes for signature in signatures.values())
    maps = [cut("position", config.seq_len, seq_len)] if has_table else []
    params, opt_state, report = transport(
        signatures, maps, state.params, state.opt_state, optimizer
    )
    state = dataclasses.replace(state, params=params, opt_state=opt_state)
    return dataclasses.replace(config, seq_len=seq_len), state, report
