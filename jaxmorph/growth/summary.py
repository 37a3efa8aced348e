"""A readable summary of what a run's settings resolve to, printed before it starts."""

from __future__ import annotations

from jaxmorph.cli.printing import named
from jaxmorph.cli.wording import short, short_flops
from jaxmorph.config.run_shape import RunShape
from jaxmorph.config.settings import Settings
from jaxmorph.model.architecture import flops_per_token, parameter_count, scans_layers
from jaxmorph.step.memory import memory
from jaxmorph.step.schedules import schedule_block, schedule_shape


def describe(
    settings: Settings,
    start: RunShape,
    *,
    total: int | None,
    corpus: str | None = None,
) -> str:
    """Return the start-up block: data, model, batch, optimizer and learning rate.

    Args:
      settings: the checked settings.
      start: the shape the run starts with; a vocabulary of 0 is not known yet.
      total: steps of the run; None until known from the corpus.
      corpus: one line about the corpus; None before it is read.
    """
    lines = [f"Run folder: {named(str(settings.run.run_dir))}"]
    lines.append(f"Data: {named(corpus or _data(settings))}")
    lines += _model(settings, start)
    lines += _lora(start)
    lines.append(_batch(start, total))
    lines.append(_optimizer(settings))
    if total is None:
        lines.append("Learning rate schedule: known once the corpus is read (num_epochs)")
    else:
        shape, peak = schedule_shape(settings.optimizer), start.learning_rate * start.lr_multiplier
        lines.append(schedule_block(shape, peak, start.warmup_steps, total))
    return "\n".join(lines)


def _data(settings: Settings) -> str:
    return f"{settings.data.data}, {settings.data.tokenizer} tokenizer"


def _model(settings: Settings, start: RunShape) -> list[str]:
    config = start.model
    if not config.vocab_size:
        shape = f"{config.n_layers} layers × {config.d_model}, {config.n_heads} heads"
        return [f"Model: {shape} (parameters: known once the corpus gives the vocabulary)"]
    parameters, held = parameter_count(config), memory(start, settings.optimizer).total
    flops = flops_per_token(config, start.frozen_layers)
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[config.norm]
    activation = {"gelu": "GELU", "swiglu": "SwiGLU"}[config.activation]
    head = "tied" if config.tied_head else "untied"
    layers = "by scan" if scans_layers(config) else "unrolled"
    return [
        f"Model: {config.n_layers} layers × {config.d_model}, {config.n_heads} heads × "
        f"{config.head_dim}, MLP {config.d_ff}, vocabulary {config.vocab_size:,}, "
        f"context {config.seq_len}",
        f"       {config.positions} positions, {norm}, {activation}, {head} head, "
        f"{config.dtype}, layers {layers}",
        f"       {parameters:,} parameters, {short_flops(flops)} FLOPs per token, "
        f"{short(held)} bytes of parameters, gradients and optimizer state",
    ]


def _lora(start: RunShape) -> list[str]:
    ranks = {"attention": start.model.attn_lora_rank, "embedding": start.model.vocab_lora_rank}
    if not any(ranks.values()):
        return []
    given = ", ".join(f"rank {rank} on the {name}" for name, rank in ranks.items() if rank)
    return [f"LoRA: {given}, alpha {start.lora_alpha:g}, base {start.model.lora_base}"]


def _batch(start: RunShape, total: int | None) -> str:
    tokens = start.batch_size * start.grad_accum_steps * start.model.seq_len
    text = f"Batch: {start.batch_size} × {start.model.seq_len} tokens"
    if start.grad_accum_steps > 1:
        text += f" × {start.grad_accum_steps} accumulated"
    text += f" = {tokens:,} tokens per step"
    return text if total is None else f"{text}; {total:,} steps, {short(total * tokens)} tokens"


def _optimizer(settings: Settings) -> str:
    o = settings.optimizer
    constants = {
        "adamw": f"betas {o.beta1:g}, {o.beta2:g}, epsilon {o.epsilon:g}",
        "muon": f"momentum {o.beta1:g} on hidden matrices, AdamW on the rest",
        "lion": f"betas {o.beta1:g}, {o.beta2:g}",
        "sgd": f"momentum {o.beta1:g}",
        "adafactor": "factored second moments",
    }[o.optimizer]
    clip = f"gradient norm ≤ {o.grad_clip:g}" if o.grad_clip else "no clipping"
    return f"Optimizer: {o.optimizer} ({constants}), weight decay {o.weight_decay:g}, {clip}"
