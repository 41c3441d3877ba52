"""Choose the dtype of matrix products."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""`float32`; `bfloat16` by autocast, with weights and optimiser state in float32; or `auto`, by the device."""


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Return True if `precision` means bfloat16 on `device`.

    `auto` does if the device has instructions for it.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
