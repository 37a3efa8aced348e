"""The settings of heads together: the profile of their rates, and what contradicts what."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmorph.config.model_config import ModelConfig
from jaxmorph.config.settings import HeadSettings, Settings
from jaxmorph.config.sources import Sources

_PROFILED = ("boost", "decay", "warmup", "cooldown")
_PROFILES = {
    "pretrain": (5.0, 0.9, 200, 1000),
    "finetune": (2.0, 0.9, 50, 400),
    "prune": (3.0, 0.9, 100, 600),
}
_RATES = ("head_lr_profile", "head_lr_adaptive", *(f"head_lr_{name}" for name in _PROFILED))
# Not min_heads_per_layer and controller_batches: prune_heads and regrow_heads read them too.
_CONTROLLER = (
    *("controller_interval", "controller_warmup", "controller_lr", "controller_lr_decay"),
    *("controller_lr_decay_steps", "min_controller_lr", "max_pruned_heads"),
    *("controller_patience", "controller_min_change", "controller_audit", "gate_l1"),
)


def profile_values(settings: HeadSettings) -> dict[str, Any]:
    """Return boost, decay, warmup and cooldown: the profile's, where they are not given."""
    profile = dict(zip(_PROFILED, _PROFILES[settings.head_lr_profile], strict=True))
    given = {name: getattr(settings, f"head_lr_{name}") for name in _PROFILED}
    return profile | {name: value for name, value in given.items() if value is not None}


def check_heads(settings: Settings, model: ModelConfig, sources: Sources) -> None:
    """Check the settings of heads together.

    Args:
      settings: all of them, each in its range.
      model: the architecture at the start.
      sources: where each setting came from.

    Raises:
      InputError: names the flag or the file's entry.
    """
    heads = settings.heads
    _check_used(heads, sources, _RATES, "enable_head_lr")
    _check_used(heads, sources, _CONTROLLER, "enable_controller")
    _check_rates(heads, sources)
    # With a schedule the number of heads may become another one: the plan knows.
    if not settings.growth.scaling_schedule_file and (
        problem := limits_problem(heads, model.n_heads)
    ):
        raise sources.error(*problem)
    if heads.min_controller_lr > heads.controller_lr:
        wanted = f"at most controller_lr ({heads.controller_lr:g})"
        raise sources.error("min_controller_lr", heads.min_controller_lr, wanted)


def check_controller_warmup(settings: Settings, sources: Sources, total: int) -> None:
    """Refuse a controller that would never act.

    Args:
      settings: all of them.
      sources: where each came from.
      total: steps of the run.

    Raises:
      InputError: its warmup does not end before training does.
    """
    warmup = settings.heads.controller_warmup
    if settings.heads.enable_controller and warmup >= total:
        wanted = f"fewer than the {total} steps of the run, or the controller never acts"
        raise sources.error("controller_warmup", warmup, wanted)


def limits_problem(heads: HeadSettings, n_heads: int) -> tuple[str, float, str] | None:
    """Return which limit of the controller another one keeps it from reaching, if any does.

    Args:
      heads: the settings.
      n_heads: of a layer, where there are most.

    Returns:
      The setting, its value, and what is expected of it.
    """
    least = heads.min_heads_per_layer
    if not heads.enable_controller:
        return None
    if least > n_heads:
        return "min_heads_per_layer", least, f"at most n_heads ({n_heads})"
    possible = (n_heads - least) / n_heads
    if heads.max_pruned_heads <= possible:
        return None
    kept = f"as min_heads_per_layer keeps {least} of the {n_heads} heads of each layer open"
    return "max_pruned_heads", heads.max_pruned_heads, f"at most {possible:.3g}, {kept}"


def _check_used(
    heads: HeadSettings, sources: Sources, names: tuple[str, ...], enabling: str
) -> None:
    """Refuse settings that nothing reads; a file may hold them at their defaults."""
    if getattr(heads, enabling):
        return
    defaults = {field.name: field.default for field in dataclasses.fields(HeadSettings)}
    for name in names:
        value = getattr(heads, name)
        if name in sources.flags or value != defaults[name]:
            raise sources.error(name, value, f"--{enabling} with it, or it has no effect")


def _check_rates(heads: HeadSettings, sources: Sources) -> None:
    profile = profile_values(heads)
    if profile["cooldown"] <= profile["warmup"]:
        wanted = f"more than the {profile['warmup']} steps of head_lr_warmup"
        fixed = "head_lr_cooldown"
        if not sources.given(fixed) and sources.given("head_lr_warmup"):
            fixed = "head_lr_warmup"
            wanted = f"fewer than the {profile['cooldown']} steps of head_lr_cooldown"
        raise sources.error(fixed, profile[fixed.removeprefix("head_lr_")], wanted)
    if heads.head_lr_adaptive in ("importance", "gradient") and not heads.enable_controller:
        wanted = "--enable_controller with it, which measures that; or layer"
        raise sources.error("head_lr_adaptive", heads.head_lr_adaptive, wanted)
