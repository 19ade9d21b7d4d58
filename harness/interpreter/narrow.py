"""Number formats that numpy lacks (bfloat16 and the 8-bit floats), kept as raw codes and decoded to float32 to compute.

Invariant: decode is exact; encode rounds once, to nearest even (or toward zero), as conversion instructions do.
8-bit formats saturate to the largest finite value and keep NaN (PTX `cvt.rn.satfinite`); bfloat16 overflows to inf.
Names are Triton's: fp8e4nv is e4m3fn, fp8e5 is e5m2, fp8e4b8 and fp8e5b16 are their fnuz variants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[Any]  # uint8 or uint16
Floats = npt.NDArray[Any]  # float16, float32 or float64


@dataclass(frozen=True)
class Format8:
    """A sign bit, `8 - 1 - mantissa_bits` exponent bits, `mantissa_bits` mantissa bits.

    specials: ieee (top exponent is inf and NaN), fn (only the code of all ones is NaN), fnuz (only minus zero is NaN),
    none (every code is finite).
    """

    mantissa_bits: int
    bias: int
    specials: str

    def table(self) -> npt.NDArray[np.float32]:
        """Value of every code.  # [256]"""
        code = np.arange(128)
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        significand = np.where(exponent == 0, 0.0, 1.0) + mantissa / (1 << self.mantissa_bits)
        positive = significand * 2.0 ** (np.maximum(exponent, 1) - self.bias)
        if self.specials == "ieee":
            top = exponent == exponent[-1]
            positive = np.where(top, np.where(mantissa == 0, np.inf, np.nan), positive)
        elif self.specials == "fn":
            positive[-1] = np.nan
        values = np.concatenate([positive, -positive])
        if self.specials == "fnuz":
            values[0x80] = np.nan
        return values.astype(np.float32)


FORMATS: dict[str, Format8] = {
    "fp8e4nv": Format8(3, 7, "fn"),
    "fp8e5": Format8(2, 15, "ieee"),
    "fp8e4b8": Format8(3, 8, "fnuz"),
    "fp8e5b16": Format8(2, 16, "fnuz"),
    "fp8e4b15": Format8(3, 15, "none"),
}
FNUZ = frozenset(kind for kind in FORMATS.values() if kind.specials == "fnuz")
NARROW = frozenset({"bf16", *FORMATS})
_TABLES = {name: fmt.table() for name, fmt in FORMATS.items()}
_MAGNITUDES = {name: t[:128][np.isfinite(t[:128])].astype(np.float64) for name, t in _TABLES.items()}  # ascending
_MIDPOINTS = {name: (m[1:] + m[:-1]) / 2 for name, m in _MAGNITUDES.items()}  # exact: one more bit than the format
NAN_CODES = {"bf16": 0x7FC0, "fp8e4nv": 0x7F, "fp8e5": 0x7F, "fp8e4b8": 0x80, "fp8e5b16": 0x80}


def decode(codes: Codes, name: str) -> npt.NDArray[np.float32]:
    """Values of raw codes of format `name`, of the same shape."""
    if name == "bf16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _TABLES[name][codes]


def encode(values: Floats, name: str, toward_zero: bool = False) -> Codes:
    """Raw codes of format `name` nearest to `values`, of the same shape.

    Raises KeyError for fp8e4b15, which no instruction converts to: its rounding is the compiler's own.
    """
    if name == "bf16":
        return _encode_bf16(values.astype(np.float32), toward_zero)
    nan_code = NAN_CODES[name]
    size = np.abs(values).astype(np.float64)
    if toward_zero:
        code = np.searchsorted(_MAGNITUDES[name], size, side="right") - 1
    else:
        # Codes ascend with the magnitude: the code is the number of midpoints below; on a midpoint the even code wins.
        below = np.searchsorted(_MIDPOINTS[name], size, side="left")
        code = np.where(below & 1, np.searchsorted(_MIDPOINTS[name], size, side="right"), below)
    negative = np.signbit(values)
    if FORMATS[name].specials == "fnuz":
        negative = negative & (code != 0)  # there is no minus zero
    code = np.where(negative, code | 0x80, code)
    return np.where(np.isnan(values), nan_code, code).astype(np.uint8)


def _encode_bf16(values: npt.NDArray[np.float32], toward_zero: bool) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).reshape(values.shape).view(np.uint32)
    rounded = bits if toward_zero else bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    codes = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(NAN_CODES["bf16"]), codes) if nan.any() else codes


def round_to_tf32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """float32 rounded to the 10 mantissa bits of TF32, ties away from zero (PTX `cvt.rna.tf32.f32`)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def narrow_float16_toward_zero(values: Floats) -> npt.NDArray[np.float16]:
    """float16 not larger in magnitude than `values`."""
    with np.errstate(over="ignore"):  # an infinity is stepped back below
        rounded = values.astype(np.float16)
    too_large = np.abs(rounded.astype(np.float64)) > np.abs(values)
    return np.where(too_large, np.nextafter(rounded, np.float16(0)), rounded)
