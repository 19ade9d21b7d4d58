"""Boundary probes in memory: cache tensors whose addresses reach the boundary, and what lies where faults would read.

Invariant: every element that a fault of FAULTS reads instead of a live one holds content of its own (a decoy) or is the
live content of another token; so a wrong address changes the output, and the output tells which address it was. What
neither a page nor a decoy needs is poison that all share.

A decoy of K holds tokens of K in another order, another one for each fault, so that a needle finds its key at another
token; a decoy of V holds values that no token has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.cache.address import Address, address, planned_address
from harness.cache.address_faults import FAULTS, AddressFault, Addressing
from harness.cache.pool import Extent, Interval, Pool, make_pool, pieces
from harness.cache.quantise import bits_of, quantise
from harness.dtypes import ElementType, element_type
from harness.problem import random
from harness.problem.boundary import Geometry
from harness.problem.problem import Problem


@dataclass(frozen=True)
class Live:
    """The tokens that the cache holds: `key` packed [n], their physical `page` and their `slot` in it [n]."""

    key: torch.Tensor
    page: torch.Tensor
    slot: torch.Tensor


@dataclass(frozen=True)
class Decoy:
    """Elements that one fault would read in place of live ones, `offsets` [n] from the start of the pool's storage, and
    the `bits` [n] they hold.
    """

    which: str
    offsets: torch.Tensor
    bits: torch.Tensor


@dataclass(frozen=True)
class Reach:
    """One cache tensor of a probe: where its elements lie, right and wrong."""

    where: Address
    at: Addressing

    @classmethod
    def of(cls, where: Address, itemsize: int, low_bits: int) -> Reach:
        return cls(where, Addressing(where.page, itemsize, low_bits))

    def right(self, live: Live) -> torch.Tensor:
        """int64 [n, heads * dim]: storage offsets of the live elements."""
        return self.where.offsets(live.page, live.slot)

    def moved(self, live: Live, fault: AddressFault) -> torch.Tensor:
        """int64 [n, heads * dim]: those that `fault` touches instead."""
        return fault.moved(live.page[:, None], self.where.in_page(live.slot), self.at) + self.where.origin


def strides_of(shape: tuple[int, ...], page_stride: int) -> tuple[int, ...]:
    """Compact strides of `shape` but for the first, which is `page_stride`."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, 0, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return (page_stride, *strides[1:])


def reserve(
    problem: Problem, which: str, shape: tuple[int, ...], stored: ElementType, at: Geometry, live: Live, fill: int
) -> tuple[torch.Tensor, Pool]:
    """A cache tensor of `shape` ([pages, ...], see harness.layout) that reaches the boundary, and its pool, filled
    with the byte `fill`; memory of their own have the pages of `at` in use and what each fault reads instead of `live`.
    Raises MemoryError.
    """
    case, stride = problem.case, at.page_strides[which]
    strides = strides_of(shape, stride)
    heads, dim = (problem.k if which == "k" else problem.v).shape[1:]
    where = planned_address(shape, strides, case.layout, which, heads, dim)
    reach = Reach.of(where, stored.size, at.low_bits[which])
    on_cpu = Live(live.key.cpu(), live.page.cpu(), live.slot.cpu())
    page_bytes = case.page_size * heads * dim * stored.size
    own: list[Interval] = [(p * stride * stored.size, p * stride * stored.size + page_bytes) for p in pages_in(live)]
    lowest, highest = 0, shape[0] * stride * stored.size
    for fault in FAULTS:
        own += pieces(reach.moved(on_cpu, fault) * stored.size)
    lowest, highest = min(lowest, *(a for a, _ in own)), max(highest, *(b for _, b in own))
    extent = Extent(-lowest, highest, at.low_bits[which])
    pool = make_pool(extent, own, problem.q.device, fill, dense=case.pool == "dense")
    return pool.view(stored.torch, shape, strides), pool


def pages_in(live: Live) -> list[int]:
    return sorted(set(live.page.tolist()))


def plant_decoys(
    problem: Problem, which: str, tensor: torch.Tensor, payload: torch.Tensor, live: Live, low_bits: int
) -> tuple[Decoy, ...]:
    """Write what faults would read in place of `live` tokens; `payload` [num_keys, heads, dim] is what those hold.

    Where two faults read the same element it is the first one's; elements of pages in use stay what they are.
    """
    case, (heads, dim) = problem.case, payload.shape[1:]
    where = address(tensor, case.layout, which, heads, dim)
    reach = Reach.of(where, tensor.element_size(), low_bits)
    memory = storage_bits(tensor)
    slots = torch.arange(case.page_size, device=tensor.device)
    taken = [
        reach.where.offsets(torch.full_like(slots, page), slots).flatten() for page in pages_in(live)
    ]  # elements of pages in use
    decoys = []
    for number, fault in enumerate(FAULTS):
        offsets = reach.moved(live, fault)
        free = ~torch.isin(offsets, torch.cat(taken))
        if not bool(free.any()):
            continue
        offsets = offsets[free]
        bits = bits_of(_content(problem, which, number, payload, live)).flatten(1)[free]
        memory[offsets] = bits
        taken.append(offsets)
        decoys.append(Decoy(which, offsets, bits))
    return tuple(decoys)


def storage_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The whole allocation of `tensor` as integers of its element size: [elements]."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return bits_of(tensor).as_strided((elements,), (1,), 0)


def _content(problem: Problem, which: str, number: int, payload: torch.Tensor, live: Live) -> torch.Tensor:
    """What the decoy of fault `number` holds for each live token: stored dtype [n, heads, dim]."""
    if which == "k":
        return payload[live.key.roll(number + 1)]
    case = problem.case
    shape, dtype = (len(payload), *payload.shape[1:]), problem.v.dtype
    fresh = random.normal(case.data_seed, f"decoy/{number}", shape, payload.device, dtype)
    return quantise(fresh, problem.descale("v"), element_type(case.stored_dtype))[live.key]
