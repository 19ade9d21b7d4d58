"""Boundary probes of descales: pages far apart, and other descales where faults would read.

Invariant: a descale that a fault reads is finite, and for each fault another multiple of the right one, twice or more;
so the output tells which address was wrong, beside P in fp8 as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.cache.address_faults import AddressFault, Addressing
from harness.cache.pool import Pool
from harness.cache.probe import Decoy, Live, storage_bits
from harness.cache.row_probe import Cells, reaching_rows
from harness.problem.boundary import Geometry
from harness.problem.problem import Problem

BUFFERS = {"kv_block_descale": "page", "k_token_descale": "token", "v_token_descale": "token"}
_SIZE = 4  # bytes


@dataclass(frozen=True)
class DescaleCells:
    """The descales of one buffer: their `group` [n] (see harness.problem.descales), their `page` [n], and their `cells`
    [n, m], head by head and of each the `kinds`.
    """

    group: torch.Tensor
    page: torch.Tensor
    cells: Cells
    kinds: tuple[int, ...]  # 0 for K, 1 for V

    @classmethod
    def of(cls, problem: Problem, name: str, pages: Sequence[Sequence[int]], live: Live) -> DescaleCells:
        heads, device = problem.case.num_kv_heads, live.page.device
        if BUFFERS[name] == "page":
            page = torch.tensor([page for owned in pages for page in owned], dtype=torch.int64, device=device)
            inner = torch.arange(2 * heads, device=device).expand(len(page), -1)
            return cls(torch.arange(len(page), device=device), page, Cells(page[:, None], inner), (0, 1))
        inner = live.slot[:, None] * heads + torch.arange(heads, device=device)
        return cls(live.key, live.page, Cells(live.page[:, None], inner), ("kv".index(name[0]),))

    def values(self, problem: Problem) -> torch.Tensor:
        """float32 [n, m]"""
        return problem.descales[self.group][..., list(self.kinds)].flatten(1)

    def read(self, tensor: torch.Tensor, at: Addressing, fault: AddressFault) -> torch.Tensor:
        """float32 [n, heads, kinds]: what `fault` reads of `tensor` instead."""
        where = self.cells.moved(at, fault) + int(tensor.storage_offset())
        return storage_bits(tensor)[where].view(torch.float32).view(len(where), -1, len(self.kinds))


def addressing(at: Geometry) -> Addressing:
    return Addressing(at.page_strides["descale"], _SIZE, at.low_bits["descale"])


def reaching_descales(
    problem: Problem,
    name: str,
    compact: torch.Tensor,
    at: Geometry,
    pages: Sequence[Sequence[int]],
    live: Live,
) -> tuple[torch.Tensor, Pool, tuple[Decoy, ...]]:
    """`compact` [num_pages, ...] with pages as far apart as `at` says, its pool and decoys. Raises MemoryError."""
    cells = DescaleCells.of(problem, name, pages, live)
    values = cells.values(problem)
    used = torch.tensor(sorted({page for owned in pages for page in owned}), device=compact.device)
    return reaching_rows(name, compact, used, addressing(at), cells.cells, lambda number: values * (1 + number))
