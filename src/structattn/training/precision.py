"""Choose the dtype of matrix products."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""`float32`; `bfloat16` by autocast, weights and optimiser in float32; `auto`: bfloat16 if the device has it."""


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Return True if `precision` means bfloat16 on `device`."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
