"""Which arithmetic made a payload that is wrong: a descale forgotten or mistaken, another rounding, no saturation.

Invariant: words only, and only what explains every wrong element at once; that the payload is wrong is already known.
"""

from __future__ import annotations

import torch

from harness.cache.quantise import bits_of, quantise
from harness.dtypes import ElementType


def other_rounding(
    found: torch.Tensor,
    right: torch.Tensor,
    value: torch.Tensor,
    descale: torch.Tensor,
    other: torch.Tensor,
    stored: ElementType,
) -> str:
    """How `found` came of `value` where `right` should have; "" where nothing known explains it.

    found, right: stored dtype [heads, dim]; value: [heads, dim]; descale, other (that of the other tensor): [1 or
    heads, 1]
    """
    bits = bits_of(found)
    guesses = {
        "the value without the descale": quantise(value, 1.0, stored),
        "value * descale, not value / descale": quantise(value * descale, 1.0, stored),
        "divided by the descale of the other tensor": quantise(value, other, stored),
    }
    for how, payload in guesses.items():
        if torch.equal(bits, bits_of(payload)):
            return how
    wrong = bits != bits_of(right)
    exact = (value.to(torch.float32) / descale.expand_as(value)).double()[wrong]
    got, want = found.double()[wrong], right.double()[wrong]
    if bool((exact.abs() > stored.largest).all()):
        return f"values beyond the range are not held at +-{stored.largest:g}"
    if bool(((got - exact).abs() == (want - exact).abs()).all()):
        return "ties are not rounded to even"
    if bool(((got.abs() <= exact.abs()) & (want.abs() > exact.abs())).all()):
        return "rounded toward zero, not to nearest"
    step = stored.unit_roundoff * 2 * exact.abs() + 2 * stored.half_subnormal
    return "rounded to the wrong neighbour" if bool(((got - exact).abs() <= step * (1 + 2.0**-20)).all()) else ""
