"""Outputs whose addresses reach a boundary: rows far apart, poison between, memory of its own where faults would write.

Invariant: as for guarded outputs; what was written elsewhere is told by the fault that leads there, where one does.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from harness.cache.address_faults import FAULTS, Addressing, tell_move
from harness.cache.pool import POISON_BYTE, Extent, Interval, Pool, make_pool, pieces
from harness.kernel.guarded import POISON, GuardedOutput


@dataclass(frozen=True)
class ReachingOutput(GuardedOutput):
    """`allocation` [elements] is the whole range of `pool`, as integers."""

    pool: Pool
    at: Addressing

    @property
    def surroundings(self) -> torch.Tensor:
        """All that a wrong address may reach: [elements] of the output's dtype."""
        return self.allocation.view(self.tensor.dtype)

    def unwritten(self) -> torch.Tensor:
        return self._here(self.allocation) == -1

    def overrun(self) -> str | None:
        if wrong := self._elsewhere():
            return wrong
        size = self.tensor.element_size()
        stray = torch.cat([self._stray(first // size, end // size) for first, end in self.pool.own])
        if len(stray):
            return f"{len(stray)} elements beside {self.name} were written, the first {int(stray[0]):+d} from its start"
        shared = sum(int((part != POISON_BYTE).sum()) for part in self.pool.shared)
        return f"{shared} bytes of memory beside {self.name} were written" if shared else None

    def _elsewhere(self) -> str | None:
        """The faults that lead just the elements never written to places that were; None where there is none."""
        missing = self.unwritten().flatten(1)  # [tokens, heads * dim]
        right = _elements(self.tensor)  # [tokens, heads * dim]
        token = torch.arange(len(right), device=right.device)[:, None]
        if not bool(missing.any()):
            return None
        start, found = int(self.tensor.storage_offset()), defaultdict(list)
        t, element = missing.nonzero()[0].tolist()
        for fault in FAULTS:
            moved = fault.moved(token, right - token * self.at.stride, self.at)
            if torch.equal(moved != right, missing) and bool((self.allocation[start + moved[missing]] != -1).all()):
                found[int(moved[t, element])].append(fault)
        where = int(right[t, element])
        lines = [tell_move(f"token {t} of {self.name}", "written", where, to, found[to]) for to in found]
        return "; ".join(lines) or None

    def _stray(self, first: int, end: int) -> torch.Tensor:
        """Elements in [first, end), counted from the start of the output, that were written and are none of it."""
        start = int(self.tensor.storage_offset())
        written = (self.allocation[start + first : start + end] != -1).nonzero()[:, 0] + first
        return written[~torch.isin(written, _elements(self.tensor))]


def reaching_output(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, token_stride: int, low_bits: int
) -> ReachingOutput:
    """A poisoned output of `shape` [tokens, heads, dim] whose tokens lie `token_stride` elements apart, at an address
    that ends in `low_bits`. Raises MemoryError.
    """
    strides = (token_stride, shape[2], 1)
    at = Addressing(token_stride, dtype.itemsize, low_bits)
    inner = torch.arange(shape[1] * shape[2])  # [heads * dim]
    token = torch.arange(shape[0])[:, None]
    touched = [token * token_stride + inner, *(fault.moved(token, inner, at) for fault in FAULTS)]
    own: list[Interval] = []
    for offsets in touched:
        own += pieces(offsets * dtype.itemsize)
    extent = Extent(-min(0, *(first for first, _ in own)), max(end for _, end in own), low_bits)
    pool = make_pool(extent, own, device)
    tensor = pool.view(dtype, shape, strides)
    integer, _ = POISON[dtype.itemsize]
    elements = len(pool.bytes) // dtype.itemsize
    allocation = pool.bytes[: elements * dtype.itemsize].view(torch.int8 if dtype.itemsize == 1 else integer)
    return ReachingOutput(name, tensor, allocation, pool, at)


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Offsets of the elements of `tensor` [tokens, heads, dim] from its first: int64 [tokens, heads * dim]."""
    tokens, heads, dim = tensor.shape
    inner = torch.arange(heads * dim, device=tensor.device)
    return torch.arange(tokens, device=tensor.device)[:, None] * tensor.stride(0) + inner
