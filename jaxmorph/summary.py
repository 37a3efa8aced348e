"""What a run resolved to, in words a person can check before it starts."""

from __future__ import annotations

from jaxmorph.architecture import flops_per_token, parameter_count, scans_layers
from jaxmorph.config import ModelConfig, Settings
from jaxmorph.figures import short, short_flops
from jaxmorph.resolve import total_steps, warmup_steps
from jaxmorph.schedules import schedule_block, schedule_shape

_OPTIMIZER_LEAVES = {"adamw": 2, "muon": 1, "lion": 1, "sgd": 1, "adafactor": 0}


def describe(
    settings: Settings,
    config: ModelConfig | None,
    *,
    corpus: str | None = None,
    examples_per_epoch: int | None = None,
) -> str:
    """Return the start-up block: data, model, batch, optimizer and learning rate.

    Args:
      settings: the checked settings.
      config: the architecture; None where the vocabulary is not known before the corpus is read.
      corpus: one line on what was read; None before that.
      examples_per_epoch: windows in the training split, where epochs have to become steps.
    """
    total = total_steps(settings, examples_per_epoch)
    lines = [f"Run folder: {settings.run.run_dir}", f"Data: {corpus or _data(settings)}"]
    lines += _model(settings, config)
    lines.append(_batch(settings, total))
    lines.append(_optimizer(settings))
    if total is None:
        lines.append("Learning rate schedule: known once the corpus is read (num_epochs)")
    else:
        shape, peak = schedule_shape(settings.optimizer), settings.optimizer.learning_rate
        lines.append(schedule_block(shape, peak, warmup_steps(settings, total), total))
    return "\n".join(lines)


def _data(settings: Settings) -> str:
    return f"{settings.data.data}, {settings.data.tokenizer} tokenizer"


def _model(settings: Settings, config: ModelConfig | None) -> list[str]:
    if config is None:
        model = settings.model
        shape = f"{model.n_layers} layers × {model.d_model}, {model.n_heads} heads"
        return [f"Model: {shape} (parameters: known once the corpus gives the vocabulary)"]
    parameters = parameter_count(config)
    width = 8 if config.dtype == "float64" else 4
    held = parameters * width * (2 + _OPTIMIZER_LEAVES[settings.optimizer.optimizer])
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
        f"       {parameters:,} parameters, {short_flops(flops_per_token(config))} FLOPs per token, "
        f"{short(held)} bytes of parameters, gradients and optimizer state",
    ]


def _batch(settings: Settings, total: int | None) -> str:
    data = settings.data
    tokens = data.batch_size * data.grad_accum_steps * data.seq_len
    text = f"Batch: {data.batch_size} × {data.seq_len} tokens"
    if data.grad_accum_steps > 1:
        text += f" × {data.grad_accum_steps} accumulated"
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
