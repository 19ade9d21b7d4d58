"""What dead memory holds: bits that no right kernel lets through to its output.

Invariant: poison is a NaN where the type has one: all bits set, but for the fnuz types, whose NaN is minus zero. int8
has none: there it is -128, which no payload is, so bits tell it from content; a read of it is loud, but finite.
Kernels that mask only after the product need finite tails: those get one loud value instead.
"""

from __future__ import annotations

import math

import torch

from harness.cache.quantise import bits_of
from harness.dtypes import ElementType, element_type_of

LOUD = 10_000.0  # or the largest number of the type: loud against N(0, 1), and finite in float16 after dequantisation


def poison_bits(stored: ElementType, value: float = math.nan) -> int:
    """Bits of one dead element; another `value` than NaN makes a pool that hides reads of it."""
    return stored.poison if math.isnan(value) else _bits(stored, value)


def tail_bits(stored: ElementType, tail: str, value: float = math.nan) -> int:
    """Bits behind the last token of a live page: poison, or the loud value where `tail` is "loud".

    Of integers poison is loud, and finite, already.
    """
    if tail == "loud" and math.isnan(value) and stored.torch.is_floating_point:
        return _bits(stored, min(LOUD, stored.largest))
    return poison_bits(stored, value)


def poisoned(shape: tuple[int, ...], stored: ElementType, device: torch.device | str) -> torch.Tensor:
    """A poisoned tensor: `stored` dtype [*shape]."""
    bits = bits_of(torch.empty(shape, dtype=stored.torch, device=device))
    return bits.fill_(stored.poison).view(stored.torch)


def is_poison(tensor: torch.Tensor) -> torch.Tensor:
    """bool, of the shape of `tensor`, a tensor of an element type: which elements are poison, bit for bit."""
    return bits_of(tensor) == element_type_of(tensor.dtype).poison


def _bits(stored: ElementType, value: float) -> int:
    return int(bits_of(torch.tensor([value]).to(stored.torch)))
