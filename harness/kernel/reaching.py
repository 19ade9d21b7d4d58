"""Outputs whose addresses reach a boundary: rows far apart, poison between, memory of its own where faults would write.

Invariant: as for guarded outputs; what was written elsewhere is told by the fault that leads there, where one does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from harness.cache.address_faults import FAULTS, AddressFault, Addressing, tell_move
from harness.cache.pool import POISON_BYTE, Extent, Interval, Pool, make_pool, pieces
from harness.cache.probe import strides_of
from harness.kernel.guarded import POISON, GuardedOutput


@dataclass(frozen=True)
class ReachingOutput(GuardedOutput):
    """`allocation` [elements] is the whole range of `pool`, as integers. `row` is what the first dimension counts;
    `sparse`: elements may stay unwritten.
    """

    pool: Pool
    at: Addressing
    row: str
    sparse: bool

    @property
    def surroundings(self) -> torch.Tensor:
        """All that a wrong address may reach: [elements] of the output's dtype."""
        return self.allocation.view(self.tensor.dtype)

    def overrun(self) -> str | None:
        size = self.tensor.element_size()
        stray = torch.cat([self._stray(first // size, end // size) for first, end in self.pool.own])
        if wrong := self._elsewhere(stray):
            return wrong
        if len(stray):
            return f"{len(stray)} elements beside {self.name} were written, the first {int(stray[0]):+d} from its start"
        shared = sum(int((part != POISON_BYTE).sum()) for part in self.pool.shared)
        return f"{shared} bytes of memory beside {self.name} were written" if shared else None

    def shows(self, fault: AddressFault) -> bool:
        """Whether something was stored whose address `fault` changes."""
        right = _elements(self.tensor)  # [rows, elements of a row]
        row = torch.arange(len(right), device=right.device)[:, None]
        changed = fault.moved(row, right - row * self.at.stride, self.at) != right
        return bool((changed & ~self.unwritten().flatten(1)).any())

    def _elsewhere(self, stray: torch.Tensor) -> str | None:
        """The faults that lead the elements never written to places that were; None where there is none.

        All of them and no others; but where elements may stay unwritten, to all of `stray` [n].
        """
        missing = self.unwritten().flatten(1)  # [rows, elements of a row]
        right = _elements(self.tensor)  # the same
        row = torch.arange(len(right), device=right.device)[:, None]
        start, found = int(self.tensor.storage_offset()), defaultdict(list)
        for fault in FAULTS:
            moved = fault.moved(row, right - row * self.at.stride, self.at)
            changed = moved != right
            if self.sparse:
                hit = changed & torch.isin(moved, stray)
                if len(stray) != int(hit.sum()) or bool((changed & ~missing).any()):
                    continue
            else:
                hit = changed
                if not torch.equal(changed, missing) or bool((self.allocation[start + moved[missing]] == -1).any()):
                    continue
            for r, element in hit.nonzero()[:1].tolist():
                found[r, int(right[r, element]), int(moved[r, element])].append(fault)
        lines = [
            tell_move(f"{self.row} {r} of {self.name}", "written", where, to, faults)
            for (r, where, to), faults in found.items()
        ]
        return "; ".join(lines) or None

    def _stray(self, first: int, end: int) -> torch.Tensor:
        """Elements in [first, end), counted from the start of the output, that were written and are none of it."""
        start = int(self.tensor.storage_offset())
        written = (self.allocation[start + first : start + end] != -1).nonzero()[:, 0] + first
        return written[~torch.isin(written, _elements(self.tensor))]


def reaching_output(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    row_stride: int,
    low_bits: int,
    *,
    row: str = "token",
    sparse: bool = False,
) -> ReachingOutput:
    """A poisoned output of `shape` [rows, ...] whose rows lie `row_stride` elements apart, at an address that ends in
    `low_bits`. Raises MemoryError.
    """
    strides = strides_of(shape, row_stride)
    at = Addressing(row_stride, dtype.itemsize, low_bits)
    inner = torch.arange(math.prod(shape[1:]))  # [elements of a row]
    number = torch.arange(shape[0])[:, None]
    touched = [number * row_stride + inner, *(fault.moved(number, inner, at) for fault in FAULTS)]
    own: list[Interval] = []
    for offsets in touched:
        own += pieces(offsets * dtype.itemsize)
    extent = Extent(-min(0, *(first for first, _ in own)), max(end for _, end in own), low_bits)
    pool = make_pool(extent, own, device)
    tensor = pool.view(dtype, shape, strides)
    integer, _ = POISON[dtype.itemsize]
    allocation = pool.elements(torch.int8 if dtype.itemsize == 1 else integer)
    return ReachingOutput(name, tensor, allocation, -1, pool, at, row, sparse)


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Offsets of the elements of `tensor` [rows, ...] from its first: int64 [rows, elements of a row]."""
    inner = torch.arange(math.prod(tensor.shape[1:]), device=tensor.device)
    return torch.arange(len(tensor), device=tensor.device)[:, None] * tensor.stride(0) + inner
