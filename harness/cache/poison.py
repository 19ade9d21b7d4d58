"""What dead memory holds: bits that no right kernel lets through to its output.

Invariant: poison is all bits set, which is a NaN in every float type here (fp32, fp16, bf16, fp8 e4m3fn, fp8 e5m2).
Kernels that mask only after the product need finite tails: those get one loud value instead.
"""

from __future__ import annotations

import math

import torch

from harness.cache.quantise import bits_of
from harness.dtypes import ElementType

POISON_BITS = -1
LOUD = 10_000.0  # or the largest number of the type: loud against N(0, 1), and finite in float16 after dequantisation


def poison_bits(stored: ElementType, value: float = math.nan) -> int:
    """Bits of one dead element; another `value` than NaN makes a pool that hides reads of it."""
    return POISON_BITS if math.isnan(value) else _bits(stored, value)


def tail_bits(stored: ElementType, tail: str, value: float = math.nan) -> int:
    """Bits behind the last token of a live page: poison, or the loud value where `tail` is "loud"."""
    if tail == "loud" and math.isnan(value):
        return _bits(stored, min(LOUD, stored.largest))
    return poison_bits(stored, value)


def poisoned(shape: tuple[int, ...], stored: ElementType, device: torch.device | str) -> torch.Tensor:
    """A poisoned tensor: `stored` dtype [*shape]."""
    bits = bits_of(torch.empty(shape, dtype=stored.torch, device=device))
    return bits.fill_(POISON_BITS).view(stored.torch)


def _bits(stored: ElementType, value: float) -> int:
    return int(bits_of(torch.tensor([value]).to(stored.torch)))
