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


def illegal(args: LaunchArguments) -> None:
    illegal_kernel[(1,)](args.out, FAR)


def asserting(args: LaunchArguments) -> None:
    asserting_kernel[(1,)](args.out)


def endless(args: LaunchArguments) -> None:
    endless_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=args.q.device))
