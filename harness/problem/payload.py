"""Payloads: the numbers that a quantised tensor stores, payload = value / descale.

Invariant: the nearest number of the stored type, ties to even, of the float32 quotient, and the largest one where that
lies beyond. Integers are symmetric: the largest is 127 on both sides, and -128 is no payload.
"""

from __future__ import annotations

import torch

from harness.dtypes import ElementType


def payload_of(values: torch.Tensor, descale: float | torch.Tensor, stored: ElementType) -> torch.Tensor:
    """`values`, of any shape and float dtype, as `stored` at `descale`, which broadcasts against them."""
    divisor = torch.as_tensor(descale, dtype=torch.float32, device=values.device)
    divisor = divisor.expand_as(values)  # as a tensor of that shape: a number may become its reciprocal
    return rounded(values.to(torch.float32) / divisor, stored)


def rounded(values: torch.Tensor, stored: ElementType) -> torch.Tensor:
    """The payloads nearest to `values`, a float tensor of any shape: `stored` dtype."""
    inside = values.clamp(-stored.largest, stored.largest)
    whole = not stored.torch.is_floating_point
    return (inside.round() if whole else inside).to(stored.torch)
