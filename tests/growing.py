"""What the tests of growth share: small states, and updates that can be looked into."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_models import flat, resolved, shaken, shape_of, small_config, small_tokens

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.model import gpt
from jaxmorph.model.trainable import trainable_of
from jaxmorph.morphs import Report
from jaxmorph.morphs.gpt import MORPHS, Transition
from jaxmorph.step.optimizer import make_optimizer
from jaxmorph.step.state import Start, TrainState, gates_of, new_state


def grown_config(**changes) -> ModelConfig:
    """A GPT of two layers in float64, scanned so that it compiles fast."""
    small = {"dtype": "float64", "n_layers": 2, "d_model": 16, "d_ff": 24, "seq_len": 12}
    return small_config(**{"scan_layers": "scan", **small, **changes})


def setting_up(config: ModelConfig, **optimizer) -> tuple[Any, Any]:
    """An optimizer and a state with noise on every parameter and gates that are neither 0 nor 1."""
    plain = {"weight_decay": 0.0, "grad_clip": 0.0}
    rule = dataclasses.replace(resolved().optimizer, **plain | optimizer)
    made = make_optimizer(rule, trainable_of(shape_of(config)))
    settings = dataclasses.replace(resolved(), optimizer=rule)
    state = new_state(Start(settings, shape_of(config), 100), made)
    params = jax.tree.map(jnp.asarray, shaken(jax.device_get(state.params)))
    rng = np.random.default_rng(3)
    names = ("layer_gate", "head_gate", "lora_alpha")
    gates = {n: jnp.asarray(0.5 + rng.random(state[n].shape), state[n].dtype) for n in names}
    state = dataclasses.replace(state, params=params, opt_state=made.init(params))
    state = state.with_variables(**gates)
    return made, state


def with_gradient_moments(config: ModelConfig, state: TrainState) -> tuple[Any, Any]:
    """Adam, and the state with the gradient as its first moment and its square as its second."""
    adam, gradient = optax.scale_by_adam(), gradient_of(config, state)
    squares = jax.tree.map(jnp.square, gradient)
    moments = optax.ScaleByAdamState(jnp.asarray(5, jnp.int32), gradient, squares)
    return adam, dataclasses.replace(state, opt_state=moments)


@cache
def _runs(config: ModelConfig) -> tuple[Any, Any]:
    """The compiled forward pass and gradient of an architecture."""

    def forward(params: Any, gates: Any, tokens: jax.Array) -> jax.Array:
        return gpt.forward(config, params, tokens, gates=gates).logits

    def loss(params: Any, gates: Any, tokens: jax.Array) -> jax.Array:
        return gpt.measure(config, params, tokens, gates=gates)["loss"].value

    return jax.jit(forward), jax.jit(jax.grad(loss))


@cache
def _update(optimizer: Any, config: ModelConfig) -> Any:
    """The compiled update of an optimizer: parameters, its state, and the updates themselves."""
    trainable = trainable_of(shape_of(config))

    def update(gradient: Any, opt_state: Any, params: Any) -> tuple[Any, Any, Any]:
        rate, view = jnp.asarray(3e-3), trainable.view(params)
        updates, opt_state = optimizer.update(
            trainable.view(gradient), opt_state, params, learning_rate=rate
        )
        trained: Any = optax.apply_updates(view, updates)
        return trainable.merged(params, trained), opt_state, updates

    return jax.jit(update)


def morphed(
    name: str, config: ModelConfig, state: TrainState, optimizer: Any, key: Any, **call: Any
) -> tuple[ModelConfig, TrainState, Report]:
    """The GPT after the morph of an operation, from a call's sizes after and the morph's options."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    after = dataclasses.replace(config, **{n: v for n, v in call.items() if n in fields})
    options = {n: v for n, v in call.items() if n not in fields}
    transition = Transition(config, after, state, optimizer, key)
    return after, *MORPHS[name](transition, **options)


def logits_of(config: ModelConfig, state: TrainState) -> np.ndarray:
    """Logits on the same few tokens always."""
    tokens = jnp.asarray(small_tokens(2, 12))
    return np.asarray(_runs(config)[0](state.params, gates_of(state.variables), tokens))


def gradient_of(config: ModelConfig, state: TrainState, seed: int = 0) -> Any:
    """Gradient of the loss on a few tokens."""
    return _runs(config)[1](
        state.params, gates_of(state.variables), jnp.asarray(small_tokens(2, 13, seed))
    )


def function_delta(before: np.ndarray, after: np.ndarray) -> float:
    """Largest difference of logits over their RMS."""
    return float(np.abs(after - before).max() / np.sqrt(np.mean(before**2)))


def updates_after(
    config: ModelConfig, optimizer: Any, state: TrainState, steps: int
) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
    """Train on a text that repeats itself; return the state and the updates of every step."""
    text = np.random.default_rng(7).integers(0, 50, 200)

    gradient, update = _runs(config)[1], _update(optimizer, config)
    seen = []
    rng = np.random.default_rng(8)
    for _ in range(steps):
        starts = rng.integers(0, len(text) - 13, 8)
        tokens = jnp.asarray(np.stack([text[at : at + 13] for at in starts]).astype(np.int32))
        slope = gradient(state.params, gates_of(state.variables), tokens)
        params, opt_state, updates = update(slope, state.opt_state, state.params)
        state = dataclasses.replace(state, params=params, opt_state=opt_state)
        seen.append(flat(updates))
    return state, seen


def worst_ratio(
    config: ModelConfig, axis: str, old: int, updates: list[dict[str, np.ndarray]]
) -> dict[str, float]:
    """For each leaf on `axis` the largest RMS of its entries from `old` on, over that of the others.

    Where there are no others, over that of all parameters without the axis.
    """
    worst: dict[str, float] = {}
    for step in updates:
        signatures = trainable_of(shape_of(config)).trained
        rest = [u.ravel() for path, u in step.items() if axis not in signatures[path].axes]
        for path, signature in signatures.items():
            if axis not in signature.axes or path.endswith("key_bias"):
                continue
            at = signature.axes.index(axis)
            kept, new = np.split(step[path], [old], at)
            scale = rms(kept) if old else rms(np.concatenate(rest))
            worst[path] = max(worst.get(path, 0.0), rms(new) / scale)
    return worst


def rms(x: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x))))
