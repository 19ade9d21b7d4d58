"""Names of element types, their torch types and their rounding constants: the one table.

`unit_roundoff` is half the spacing of numbers just above 1; `half_subnormal` is half the spacing of subnormals
(0 where the exponent range makes it irrelevant beside float32 accumulation; half a step of the integers). `poison` are
the bits of dead memory, as a signed integer: a NaN, or the one integer that no payload is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ElementType:
    name: str
    torch_name: str
    size: int  # bytes
    unit_roundoff: float
    half_subnormal: float
    largest: float
    poison: int = -1

    @property
    def torch(self) -> torch.dtype:
        import torch

        dtype = getattr(torch, self.torch_name)
        assert isinstance(dtype, torch.dtype)
        return dtype


ELEMENT_TYPES: dict[str, ElementType] = {
    t.name: t
    for t in (
        ElementType("fp32", "float32", 4, 2.0**-24, 0.0, 3.4028234663852886e38),
        ElementType("bf16", "bfloat16", 2, 2.0**-8, 0.0, 3.3895313892515355e38),
        ElementType("fp16", "float16", 2, 2.0**-11, 2.0**-25, 65504.0),
        ElementType("fp8_e4m3", "float8_e4m3fn", 1, 2.0**-4, 2.0**-10, 448.0),
        ElementType("fp8_e4m3fnuz", "float8_e4m3fnuz", 1, 2.0**-4, 2.0**-11, 240.0, -128),  # minus zero is its only NaN
        ElementType("fp8_e5m2", "float8_e5m2", 1, 2.0**-3, 2.0**-17, 57344.0),
        ElementType("fp8_e5m2fnuz", "float8_e5m2fnuz", 1, 2.0**-3, 2.0**-18, 57344.0, -128),
        ElementType("int8", "int8", 1, 0.0, 0.5, 127.0, -128),  # symmetric: -128 is no payload
    )
}


def element_type(name: str) -> ElementType:
    """The element type called `name`; KeyError lists the known names."""
    try:
        return ELEMENT_TYPES[name]
    except KeyError:
        raise KeyError(f"unknown element type '{name}'; known: {', '.join(ELEMENT_TYPES)}") from None


def element_type_of(dtype: torch.dtype) -> ElementType:
    """The element type that torch calls `dtype`; KeyError where there is none."""
    name = str(dtype).removeprefix("torch.")
    for kind in ELEMENT_TYPES.values():
        if kind.torch_name == name:
            return kind
    raise KeyError(f"no element type is torch's {name}")
