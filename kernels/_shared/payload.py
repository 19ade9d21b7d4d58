"""Payloads of a quantised cache, query or output as Triton device functions, and the descales of its keys.

Invariant: every format is decoded exactly and encoded to nearest even, saturating, on any backend: the fnuz formats,
which only some backends know as types, travel as bytes and are taken apart here. A descale is found through three
strides (page, slot, KV head), of which those that it does not depend on are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from harness.kernel.arguments import LaunchArguments
from harness.kernel.writer import WriterArguments

_FNUZ_MANTISSA = {torch.float8_e4m3fnuz: 3, torch.float8_e5m2fnuz: 2}  # bits; of formats that are taken apart here


class Descales(NamedTuple):
    """Descales of K or V and their element strides."""

    tensor: torch.Tensor
    page: int
    slot: int
    head: int


def descales_of(args: LaunchArguments | WriterArguments) -> tuple[Descales, Descales]:
    """Descales of K and of V, whatever they are for."""
    if args.k_token_descale is not None and args.v_token_descale is not None:
        k, v = args.k_token_descale, args.v_token_descale
        return Descales(k, *k.stride()), Descales(v, *v.stride())
    if args.kv_block_descale is not None:
        page, head, _ = args.kv_block_descale.stride()
        k, v = args.kv_block_descale.unbind(2)
        return Descales(k, page, 0, head), Descales(v, page, 0, head)
    k_stride, v_stride = (scale.stride(0) if len(scale) > 1 else 0 for scale in (args.k_scale, args.v_scale))
    return Descales(args.k_scale, 0, 0, k_stride), Descales(args.v_scale, 0, 0, v_stride)


def descales_by_key(args: LaunchArguments) -> bool:
    """Whether keys of one head differ in their descales."""
    return args.kv_block_descale is not None or args.k_token_descale is not None


def as_loaded(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What a kernel is handed for `tensor`, and the mantissa bits by which it takes bytes apart; 0: it need not."""
    mantissa = _FNUZ_MANTISSA.get(tensor.dtype, 0)
    return (tensor.view(torch.uint8) if mantissa else tensor), mantissa


@triton.jit
def payload_values(payload, MANTISSA: tl.constexpr):
    """float32 values of `payload`, exact, of any shape; see `as_loaded` for MANTISSA."""
    if MANTISSA == 0:  # no early return: compiled, what follows one is compiled as well
        value = payload.to(tl.float32)
    else:
        code = payload.to(tl.int32)
        exponent = (code & 0x7F) >> MANTISSA
        fraction = code & ((1 << MANTISSA) - 1)
        significand = tl.where(exponent > 0, fraction + (1 << MANTISSA), fraction).to(tl.float32)
        bias: tl.constexpr = 1 << (6 - MANTISSA)
        power = ((tl.maximum(exponent, 1) + (127 - bias - MANTISSA)) << 23).to(tl.float32, bitcast=True)
        value = significand * power  # exact, also where the format is subnormal: float32 is not
        value = tl.where(code >= 0x80, -value, value)
        value = tl.where(code == 0x80, float("nan"), value)
    return value


@triton.jit
def to_payload(values, ELEMENT: tl.constexpr, MANTISSA: tl.constexpr):
    """float32 `values`, of any shape, as ELEMENT, to nearest even; 8-bit floats saturate."""
    if MANTISSA > 0:
        largest: tl.constexpr = 240.0 if MANTISSA == 3 else 57344.0
        bias: tl.constexpr = 1 << (6 - MANTISSA)
        shift: tl.constexpr = 23 - MANTISSA
        size = tl.minimum(tl.abs(values), largest)
        bits = size.to(tl.int32, bitcast=True)
        rounded = (bits + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)) >> shift
        # A sum with 2^23 is rounded to an integer: what is below the smallest normal number counts subnormal steps.
        steps = (size * 2.0 ** (bias - 1 + MANTISSA) + 8388608.0) - 8388608.0
        code = tl.where(size < 2.0 ** (1 - bias), steps.to(tl.int32), rounded - ((127 - bias) << MANTISSA))
        code = tl.where((values < 0) & (code > 0), code | 0x80, code)  # there is no minus zero
        stored = tl.where(values != values, 0x80, code).to(ELEMENT)
    elif tl.float8e4nv == ELEMENT:
        stored = tl.where(values != values, values, tl.minimum(tl.maximum(values, -448.0), 448.0)).to(ELEMENT)
    elif tl.float8e5 == ELEMENT:
        stored = tl.where(values != values, values, tl.minimum(tl.maximum(values, -57344.0), 57344.0)).to(ELEMENT)
    else:
        stored = values.to(ELEMENT)
    return stored
