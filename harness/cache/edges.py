"""The edge token: what a writer stores beside the tokens of a batch, at the edges of the stored type.

Invariant: it lies on a page of no sequence and is poisoned again before attention runs; so values that no honest batch
holds (beyond the largest number, halfway between two, below the smallest) show how a writer rounds, and move no output.
Where descales come by page or token it has none, and in a boundary probe no memory: there is no such token then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.cache.address import address
from harness.cache.build import KVCache
from harness.cache.poison import poison_bits
from harness.cache.probe import storage_bits
from harness.cache.quantise import quantise
from harness.cache.slots import NO_SEQUENCE, PADDING, NewToken
from harness.dtypes import ElementType, element_type
from harness.problem.problem import Problem

_BEYOND = (1.04, -1.04, 2.0, -2.0)  # times the largest number: just past it, and far


@dataclass(frozen=True)
class EdgeToken:
    """`k` [1, num_kv_heads, head_size] and `v` [1, num_kv_heads, head_size_v] in the dtype of the case."""

    token: NewToken
    k: torch.Tensor
    v: torch.Tensor

    def payload(self, problem: Problem, which: str) -> torch.Tensor:
        """What a right writer stores: stored dtype [heads, dim]."""
        values = self.k if which == "k" else self.v
        return quantise(values, problem.descale(which), element_type(problem.case.stored_dtype))[0]

    def wipe(self, problem: Problem, memory: KVCache) -> None:
        """Poison its slot, as all of its page is for attention."""
        page, offset = (torch.tensor([i], device=memory.k.device) for i in (self.token.page, self.token.offset))
        for which, tensor in (("k", memory.k), ("v", memory.v)):
            heads, dim = (self.k if which == "k" else self.v).shape[1:]
            place = address(tensor, problem.case.layout, which, heads, dim)
            storage_bits(tensor)[place.offsets(page, offset)] = poison_bits(element_type(problem.case.stored_dtype))


def edge_token(problem: Problem, memory: KVCache) -> EdgeToken | None:
    """The edge token of `problem`, on the last page of `memory` that no sequence has; None where there is none."""
    used = {page for pages in memory.pages for page in pages}
    free = next((page for page in reversed(range(1, memory.num_pages)) if page not in used), None)
    by_place = problem.case.descales_per in ("page", "token")
    if free is None or by_place or problem.case.boundary is not None:
        return None
    offset = memory.page_size // 2
    place = NewToken(
        problem.case.rows.num_tokens, NO_SEQUENCE, NO_SEQUENCE, free, offset, free * memory.page_size + offset
    )
    return EdgeToken(place, *(_edge_values(problem, which) for which in ("k", "v")))


def with_more(problem: Problem, new: torch.Tensor, edge: torch.Tensor | None) -> torch.Tensor:
    """`new` [num_tokens, heads, dim] with the edge token `edge` [1, heads, dim] and PADDING rows behind.

    Padding is as far below zero as its type reaches: wherever it is stored, that is neither poison nor a loud tail.
    """
    rows = PADDING + (edge is None)
    more = new.new_full((rows, *new.shape[1:]), -element_type(problem.case.dtype).largest)
    return torch.cat([new, more] if edge is None else [new, edge, more])


def _edge_values(problem: Problem, which: str) -> torch.Tensor:
    """dtype of the case [1, heads, dim]: numbers halfway between neighbours of the stored type, and beyond its range,
    times the descale; without quantisation zeros of both signs, the smallest numbers, the largest and infinities.
    """
    like = problem.k if which == "k" else problem.v
    case, (heads, dim) = problem.case, like.shape[1:]
    stored, dtype = element_type(case.stored_dtype), element_type(case.dtype)
    if case.kv_dtype == "auto":
        least = float(torch.finfo(dtype.torch).smallest_normal)
        units = torch.tensor([0.0, -0.0, least, least / 4, -least / 4, dtype.largest, -dtype.largest, float("inf")])
        index = torch.arange(heads * dim) % len(units)
        return units[index].view(1, heads, dim).to(like.device, dtype.torch)
    halfway, beyond = _halfway(stored), torch.tensor(_BEYOND) * stored.largest
    step = max(len(halfway) // (heads * dim), 1)
    units = halfway[torch.arange(heads * dim) * step % len(halfway)]
    units[::8] = beyond[torch.arange(len(units[::8])) % len(beyond)]  # a few, in every row of a head
    values = units.view(1, heads, dim).to(like.device) * problem.descale(which)
    return values.clamp(-dtype.largest, dtype.largest).to(dtype.torch)


def _halfway(stored: ElementType) -> torch.Tensor:
    """float32: halfway between neighbours among the numbers of an 8-bit type, of both signs."""
    codes = torch.arange(256, dtype=torch.uint8).view(stored.torch).to(torch.float32)
    numbers = torch.tensor(sorted(set(codes[codes.isfinite()].tolist())))
    return (numbers[1:] + numbers[:-1]) / 2
