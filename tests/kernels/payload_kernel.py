"""Two kernels around the device functions for payloads, for their tests; copied beside a copy of kernels/_shared."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._shared.payload import as_loaded, payload_values, to_payload


@triton.jit
def decode_kernel(payload_ptr, out_ptr, MANTISSA: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, payload_values(tl.load(payload_ptr + at), MANTISSA))


@triton.jit
def encode_kernel(values_ptr, out_ptr, MANTISSA: tl.constexpr, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(out_ptr + at, to_payload(tl.load(values_ptr + at), out_ptr.dtype.element_ty, MANTISSA))


@triton.jit
def native_kernel(payload_ptr, out_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, tl.load(payload_ptr + at).to(tl.float32))


def decode(payload: torch.Tensor, out: torch.Tensor) -> None:
    """float32 values of `payload` [n], a power of two of them, into `out` [n]."""
    loaded, mantissa = as_loaded(payload)
    decode_kernel[(1,)](loaded, out, MANTISSA=mantissa, COUNT=len(payload))


def encode(values: torch.Tensor, out: torch.Tensor) -> None:
    """float32 `values` [1024 n] as payloads into `out` [1024 n]."""
    loaded, mantissa = as_loaded(out)
    encode_kernel[(len(values) // 1024,)](values, loaded, MANTISSA=mantissa, COUNT=1024)


def decode_natively(payload: torch.Tensor, out: torch.Tensor) -> None:
    """The same as `decode` through Triton's own type, where the backend has it."""
    native_kernel[(1,)](payload, out, COUNT=len(payload))
