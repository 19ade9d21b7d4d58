"""Workspaces: scratch memory that a kernel takes by name, poisoned, inside red zones, kept to be looked at afterwards.

Invariant: what is handed out holds 0xFF in every byte, NaN in every float type, so that what a kernel reads before it
stores it shows; its last dimension has stride 1, all others the strides it says: of a boundary probe, rows far apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from harness.kernel.guarded import GuardedOutput, guarded_output
from harness.kernel.reaching import reaching_output
from harness.problem.boundary import RowGeometry

SCRATCH = {1: (torch.uint8, 0xFF), 2: (torch.int16, -1), 4: (torch.int32, -1), 8: (torch.int64, -1)}
Reach = Callable[[int, int, int], RowGeometry]  # number of the last row, elements of a row, bytes of an element


class Allocator(Protocol):
    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory of `shape`, for as long as the arguments live."""


@dataclass(frozen=True)
class Workspaces:
    """The allocator of one launch. `reach` places the rows of whatever has two rows or more at a boundary; what is
    handed out is what `prepare` makes of it.
    """

    device: torch.device
    reach: Reach | None = None
    prepare: Callable[[GuardedOutput], GuardedOutput] = lambda made: made
    handed: dict[str, GuardedOutput] = field(
        default_factory=dict
    )  # by the name given, numbered where it was given twice

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Raises MemoryError where the addresses of a probe cannot be had."""
        again = sum(key.split(" #")[0] == name for key in self.handed)
        key = f"{name} #{again + 1}" if again else name
        single = next((i for i, size in enumerate(shape) if size != 1), len(shape))  # leading dimensions of one element
        rows = shape[single:]
        label = f"workspace {key}"
        if self.reach is not None and len(rows) > 1 and all(rows):
            at = self.reach(rows[0] - 1, math.prod(rows[1:]), dtype.itemsize)
            made: GuardedOutput = reaching_output(
                label, rows, dtype, self.device, at.stride, at.low_bits, row="row", sparse=True
            )
        else:
            made = guarded_output(label, rows, dtype, self.device, strided=False, poison=SCRATCH)
        self.handed[key] = made = self.prepare(made)
        return made.tensor[(None,) * single]

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What was handed out so far, by name."""
        return {made.name: made.tensor for made in self.handed.values()}


def plain_workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Poison that nobody looks at afterwards: `dtype` [*shape]."""
    integer, poison = SCRATCH[dtype.itemsize]
    return torch.full(shape, poison, dtype=integer, device=device).view(dtype)
