"""Boundary probes of the slot mapping: addresses carry amid its entries, and other slots lie where a fault would read.

Invariant: a slot that a fault reads is one of the null page, which no token has, so that what a wrong address does is
the same each time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from harness.cache.address_faults import FAULTS, AddressFault, Addressing, tell_move
from harness.cache.pool import Pool
from harness.cache.probe import storage_bits
from harness.cache.row_probe import Cells, reaching_rows
from harness.cache.slots import NewToken
from harness.problem.boundary import RowGeometry

_SIZE = 8  # bytes of an entry


@dataclass(frozen=True)
class SlotProbe:
    """A slot mapping int64 [entries] whose entries of `tokens` faults would read elsewhere."""

    slots: torch.Tensor
    pool: Pool
    at: Addressing
    tokens: tuple[NewToken, ...]

    def tell(self, missed: Collection[NewToken], stored: Collection[int]) -> list[str]:
        """The wrong address that left the slots of `missed` tokens alone and took the slots `stored` for theirs; []
        where there is none.
        """
        cells = _cells(self.tokens, self.slots.device)
        right = cells.right(self.at)[:, 0].tolist()
        found: dict[tuple[int, int], list[AddressFault]] = {}
        for fault in FAULTS:
            moved = cells.moved(self.at, fault)[:, 0]  # [n]
            read = storage_bits(self.slots)[moved + int(self.slots.storage_offset())].tolist()
            wrong = {i: to for i, to in enumerate(moved.tolist()) if to != right[i]}
            if wrong and {self.tokens[i] for i in wrong} == {*missed} and {read[i] for i in wrong} == {*stored}:
                found.setdefault(min(wrong.items()), []).append(fault)
        return [
            tell_move(f"slot of {self.tokens[i]}", "read", right[i], to, faults) for (i, to), faults in found.items()
        ]


def reaching_slots(slots: torch.Tensor, reach: RowGeometry, tokens: Sequence[NewToken], page_size: int) -> SlotProbe:
    """`slots` int64 [entries] where `reach` says; `tokens` are those that have one. Raises MemoryError."""
    at, cells = Addressing(reach.stride, _SIZE, reach.low_bits), _cells(tokens, slots.device)
    of_null_page = torch.arange(len(tokens), device=slots.device)[:, None] % page_size  # [n, 1]
    rows = torch.arange(len(slots), device=slots.device)
    far, pool, _ = reaching_rows("slots", slots[:, None], rows, at, cells, lambda turn: of_null_page)
    return SlotProbe(far[:, 0], pool, at, tuple(tokens))


def _cells(tokens: Sequence[NewToken], device: torch.device) -> Cells:
    row = torch.tensor([[one.token] for one in tokens], dtype=torch.int64, device=device)  # [n, 1]
    return Cells(row, torch.zeros_like(row))
