"""The devices' peak FLOP/s, the denominator of model FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Peak dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by JAX's device kind.
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(devices: Sequence[Any], dtype: str) -> float | None:
    """Return the devices' peak FLOP/s in bfloat16; None if unknown or for another dtype."""
    kind = devices[0].device_kind
    known = [flops for name, flops in _PEAK_FLOPS.items() if kind.startswith(name)]
    return max(known) * len(devices) if known and dtype == "bfloat16" else None
