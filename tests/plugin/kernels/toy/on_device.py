"""Triton kernels that end their device context, or never end. To be compiled: no interpreter would let them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.kernel.arguments import LaunchArguments

FAR = 1 << 44  # elements: behind everything that is mapped


@triton.jit
def illegal_kernel(out, offset):
    tl.store(out + offset, 1.0)


@triton.jit(debug=True)
def asserting_kernel(out):
    value = tl.load(out)
    tl.device_assert(value == 12345.0, "no such value")
    tl.store(out, value)


@triton.jit
def endless_kernel(flag):
    value = tl.load(flag, volatile=True)
    while value == 0:
        value = tl.load(flag, volatile=True)
    tl.store(flag, value)


@triton.jit
def touch_kernel(memory, offset, here, STORE: tl.constexpr):
    byte = tl.arange(0, 4)
    if STORE:
        tl.store(memory + offset + byte, tl.load(here + byte))
    else:
        tl.store(here + byte, tl.load(memory + offset + byte))


def touch(tensor: torch.Tensor, offset: int, *, store: bool) -> None:
    """Read (or store) the 4 bytes `offset` bytes behind the first element of `tensor`, whatever lies there."""
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    first = tensor.storage_offset() * tensor.element_size()
    here = torch.zeros(4, dtype=torch.uint8, device=tensor.device)
    touch_kernel[(1,)](memory, first + offset, here, store)


def illegal(args: LaunchArguments) -> None:
    illegal_kernel[(1,)](args.out, FAR)


def asserting(args: LaunchArguments) -> None:
    asserting_kernel[(1,)](args.out)


def endless(args: LaunchArguments) -> None:
    endless_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=args.q.device))
