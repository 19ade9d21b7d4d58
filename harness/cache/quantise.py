"""Between values and the payload a cache stores: payload = value / scale, value = payload * scale.

Invariant: a cache in the dtype of the case (scale 1) stores the very bits of the value; a quantised one stores payloads
(harness.problem.payload).
"""

from __future__ import annotations

import torch

from harness.dtypes import ElementType
from harness.problem.payload import payload_of

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def quantise(values: torch.Tensor, scale: float | torch.Tensor, stored: ElementType) -> torch.Tensor:
    """Payload of `values`: `stored` dtype, same shape; `scale` broadcasts against them. The division is in float32."""
    if values.dtype == stored.torch:
        return values
    return payload_of(values, scale, stored)


def dequantise(payload: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """float32 values of `payload`, same shape: one float32 product each; `scale` broadcasts against it."""
    return payload.to(torch.float32) * scale


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that NaNs compare and fp8 can be indexed: same shape and strides."""
    return tensor.view(_BITS[tensor.element_size()])
