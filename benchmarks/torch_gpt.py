"""A GPT-2-style model in PyTorch and its training step: what `step_time.py` compares with."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from typing import Any

WARMUP_STEPS = 3

Step = Callable[[], float]  # does one step, waits for it, returns the loss


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model's and the batch's sizes."""

    n_layers: int
    d_model: int
    n_heads: int
    seq_len: int
    batch_size: int
    vocab_size: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.seq_len


def timed(step: Step) -> float:
    """Return the seconds one step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def torch_step(shape: Shape, mode: str, dtype: str) -> tuple[Step, dict[str, Any]]:
    """Return the training step of a PyTorch GPT, and facts about it."""
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model: Any = torch_gpt(shape, 4 * shape.d_model).to(device)
    compiled = torch.compile(model) if mode == "compile" else model
    tokens = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.seq_len + 1))
    inputs, targets = (t.contiguous().to(device) for t in (tokens[:, :-1], tokens[:, 1:]))

    def stepper(fused: bool) -> Step:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
        )

        def step() -> float:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = compiled(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    steps = {"fused": stepper(True), "unfused": stepper(False)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARMUP_STEPS):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    best = min(seconds, key=lambda name: min(seconds[name]))
    kind = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return steps[best], {
        "version": f"torch {torch.__version__}",
        "device": kind,
        "parameters": sum(p.numel() for p in model.parameters()),
        "adamw": best,
    }


def torch_gpt(shape: Shape, d_ff: int) -> Any:
    """Return a GPT-2-style PyTorch module that maps (inputs, targets) to the mean cross-entropy."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    width, heads = shape.d_model, shape.n_heads

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, d_ff), nn.Linear(d_ff, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            split = self.qkv(self.norm_1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            up = functional.gelu(self.up(self.norm_2(x)), approximate="tanh")
            return x + self.down(up)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(shape.vocab_size, width)
            self.positions = nn.Embedding(shape.seq_len, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(shape.n_layers)))
            self.norm = nn.LayerNorm(width)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.blocks(self.tokens(inputs) + self.positions.weight[: inputs.shape[1]])
            logits = functional.linear(self.norm(x), self.tokens.weight)
            return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return GPT()
