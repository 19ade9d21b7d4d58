"""Boundary probes judged: whether a case could show the wrong addresses it is for, and which one an output shows.

Invariant: what a fault would make of the output is computed by the reference from what memory really holds where that
fault reads; a sentence is said only where the whole output is, within its tolerance, what that fault makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.cache.address import address
from harness.cache.address_faults import FAULTS, AddressFault, tell_move
from harness.cache.build import live_tokens
from harness.cache.probe import Live, Reach, storage_bits
from harness.cache.quantise import bits_of
from harness.kernel.contract import Contract
from harness.kernel.reaching import ReachingOutput
from harness.oracle.judge import judge
from harness.oracle.observability import MARGIN
from harness.oracle.tolerance import Tolerance, tolerance
from harness.problem.boundary import cache_geometry
from harness.run.reference import build_reference
from harness.run.setup import Setup
from references.attention import AttentionReference


@dataclass(frozen=True)
class Misread:
    """One tensor read through one fault: what it finds, and the first element whose address is wrong."""

    which: str
    fault: AddressFault
    payload: torch.Tensor  # [num_keys, heads, dim] stored dtype: what is read for each key
    page: int
    right: int  # element of the pool
    read: int  # the element that is read instead


def memory_of(setup: Setup) -> dict[str, Any]:
    """What K, V and outputs far apart take: the kind of pool, bytes of addresses and bytes of memory."""
    pools = [setup.cache.pool(which) for which in ("k", "v")]
    pools += [output.pool for output in setup.outputs if isinstance(output, ReachingOutput)]
    aliased = any(pool.kind == "aliased" for pool in pools)
    return {
        "pool": "aliased" if aliased else "dense",
        "address_bytes": sum(len(pool.bytes) for pool in pools),
        "physical_bytes": sum(pool.physical_bytes for pool in pools),
    }


def unseen_addresses(setup: Setup, contract: Contract, reference: AttentionReference, allowed: Tolerance) -> str | None:
    """Why this set-up could not show one of the wrong addresses its boundary is for; None where it shows them all.

    Just below a boundary nothing is to be seen.
    """
    case = setup.problem.case
    if case.boundary_position == "below":
        return None
    wanted = [fault for fault in FAULTS if case.boundary in fault.for_boundaries]
    found = {(m.which, m.fault.name): m for m in _misreads(setup, contract) if m.fault in wanted}
    for fault in wanted:
        for which in setup.cache.pools:
            misread = found.get((which, fault.name))
            if misread is None:
                return f"cannot see a wrong address of {which.upper()}: none is wrong where {fault.words}"
            moved = _outcome(setup, contract, (misread,)).out - reference.out
            if not bool((moved.abs() > MARGIN * allowed.out).any() | moved.isnan().any()):
                return f"cannot see a wrong address of {which.upper()}: the output is the same where {fault.words}"
    return None


def tell_addresses(setup: Setup, contract: Contract, out: torch.Tensor) -> list[str]:
    """Which wrong addresses explain `out` [num_tokens, num_q_heads, head_size_v]; [] where none does."""
    misreads = list(_misreads(setup, contract))
    alone = [(misread,) for misread in misreads]
    both = [(k, v) for k in misreads for v in misreads if (k.which, v.which) == ("k", "v") and k.fault == v.fault]
    for tried in (alone, both):
        lines = [line for misread in tried for line in _explained(setup, contract, out, misread)]
        if lines:
            return lines
    return []


def _explained(setup: Setup, contract: Contract, out: torch.Tensor, misread: tuple[Misread, ...]) -> Iterator[str]:
    """One line for each tensor of `misread`, if that is what `out` shows."""
    case = setup.problem.case
    expected = _outcome(setup, contract, misread)
    allowed = tolerance(expected, contract.numerics, case.dtype, case.head_size, structured=True)
    if not judge(out, None, expected, allowed).clean:
        return
    for m in misread:
        yield tell_move(f"{m.which.upper()} of page {m.page:,}", "read", m.right, m.read, m.fault)


def _outcome(setup: Setup, contract: Contract, misread: tuple[Misread, ...]) -> AttentionReference:
    """The reference over what `misread` finds."""
    cache = setup.cache
    for m in misread:
        cache = replace(cache, key_payload=m.payload) if m.which == "k" else replace(cache, value_payload=m.payload)
    return build_reference(setup.problem, cache, contract)


def _misreads(setup: Setup, contract: Contract) -> Iterator[Misread]:
    """Every fault that would read an element of a live token elsewhere, in the tensors that reach the boundary."""
    problem, cache = setup.problem, setup.cache
    at = cache_geometry(problem.case)
    if at is None:
        return
    live = live_tokens(problem, cache.pages, cache.cached_lens)
    for which in cache.pools:
        tensor, payload = (cache.k, cache.key_payload) if which == "k" else (cache.v, cache.value_payload)
        where = address(tensor, problem.case.layout, which, *payload.shape[1:])
        reach = Reach.of(where, tensor.element_size(), at.low_bits[which])
        for fault in FAULTS:
            misread = _misread(reach, tensor, payload, live, which, fault)
            if misread is not None:
                yield misread


def _misread(
    reach: Reach, tensor: torch.Tensor, payload: torch.Tensor, live: Live, which: str, fault: AddressFault
) -> Misread | None:
    right, moved = reach.right(live), reach.moved(live, fault)  # [n, heads * dim]
    wrong = (right != moved).nonzero()
    if not len(wrong):
        return None
    key, element = wrong[0].tolist()
    read = bits_of(payload).clone()
    read[live.key] = storage_bits(tensor)[moved].view(-1, *payload.shape[1:])
    return Misread(
        which,
        fault,
        read.view(payload.dtype),
        int(live.page[key]),
        int(right[key, element]) - reach.where.origin,
        int(moved[key, element]) - reach.where.origin,
    )
