"""Boundary probes judged: whether a case could show the wrong addresses it is for, and which one an output shows.

Invariant: what a fault would make of the output is computed by the reference from what memory really holds where that
fault reads; a sentence is said only where the whole output is, within its tolerance, what that fault makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.cache.address import address
from harness.cache.address_faults import FAULTS, AddressFault, Addressing, tell_move
from harness.cache.build import live_tokens
from harness.cache.positions import key_positions
from harness.cache.probe import Live, Reach, storage_bits
from harness.cache.quantise import bits_of
from harness.cache.table_probe import Entries, addressing
from harness.kernel.contract import Contract
from harness.kernel.reaching import ReachingOutput
from harness.oracle.judge import judge
from harness.oracle.observability import MARGIN
from harness.oracle.tolerance import Tolerance, tolerance
from harness.problem.boundary import cache_geometry, table_geometry
from harness.run.reference import build_reference
from harness.run.setup import Setup
from references.attention import AttentionReference

# By `boundary_target`: what a misread may be of. Stores are told by harness.kernel.reaching.
_TARGETS = {"kv": ("K", "V"), "k": ("K",), "v": ("V",), "table": ("the page table",), "out": ()}


@dataclass(frozen=True)
class Misread:
    """K, V or the page table as read through one fault: what comes of it, and the first wrong address."""

    target: str  # K | V | the page table
    fault: AddressFault
    found: Mapping[str, torch.Tensor]  # by "k", "v": the payload read for each key, stored dtype [num_keys, heads, dim]
    item: str  # what lies at `right`
    right: int  # element of the pool
    read: int  # the element that is read instead


def memory_of(setup: Setup) -> dict[str, Any]:
    """What K, V, and tables and outputs far apart take: the kind of pool, bytes of addresses and bytes of memory."""
    pools = [setup.cache.pool(which) for which in ("k", "v")]
    pools += [pool for name, pool in setup.cache.pools.items() if name == "table"]
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
    misreads = list(_misreads(setup))
    for fault in (fault for fault in FAULTS if case.boundary in fault.for_boundaries):
        for target in _TARGETS[case.boundary_target]:
            found = [m for m in misreads if (m.target, m.fault) == (target, fault)]
            if not found:
                return f"cannot see a wrong address of {target}: none is wrong where {fault.words}"
            moved = _outcome(setup, contract, found).out - reference.out
            if not bool((moved.abs() > MARGIN * allowed.out).any() | moved.isnan().any()):
                return f"cannot see a wrong address of {target}: the output is the same where {fault.words}"
    return None


def tell_addresses(setup: Setup, contract: Contract, out: torch.Tensor) -> list[str]:
    """Which wrong addresses explain `out` [num_tokens, num_q_heads, head_size_v]; [] where none does.

    Addresses of one tensor are tried first, then those of K and V by the same fault.
    """
    misreads = list(_misreads(setup))
    alone = [(misread,) for misread in misreads]
    both = [(k, v) for k in misreads for v in misreads if (k.target, v.target) == ("K", "V") and k.fault == v.fault]
    for tried in (alone, both):
        places: dict[tuple[str, int, int], list[AddressFault]] = {}
        for m in (m for group in tried if _explains(setup, contract, out, group) for m in group):
            places.setdefault((m.item, m.right, m.read), []).append(m.fault)
        if places:
            return [tell_move(item, "read", right, read, faults) for (item, right, read), faults in places.items()]
    return []


def _explains(setup: Setup, contract: Contract, out: torch.Tensor, misreads: Sequence[Misread]) -> bool:
    case, expected = setup.problem.case, _outcome(setup, contract, misreads)
    allowed = tolerance(expected, contract.numerics, case.dtype, case.head_size, structured=True)
    return judge(out, None, expected, allowed).clean


def _outcome(setup: Setup, contract: Contract, misreads: Sequence[Misread]) -> AttentionReference:
    """The reference over what `misreads` find."""
    found = {which: payload for misread in misreads for which, payload in misread.found.items()}
    cache = setup.cache
    read = replace(
        cache, key_payload=found.get("k", cache.key_payload), value_payload=found.get("v", cache.value_payload)
    )
    return build_reference(setup.problem, read, contract)


def _misreads(setup: Setup) -> Iterator[Misread]:
    """Every fault that would read an element of a live token, or an entry of the page table, elsewhere."""
    problem, cache = setup.problem, setup.cache
    if problem.case.boundary is None:
        return
    live = live_tokens(problem, cache.pages, cache.cached_lens, cache.dead_pages)
    if at := cache_geometry(problem.case):
        for which in at.page_strides:
            for fault in FAULTS:
                yield from _of_cache(setup, which, at.low_bits[which], live, fault)
    if reach := table_geometry(problem.case):
        entries = Entries.of(cache.cached_lens, problem.case.page_size, problem.q.device)
        for fault in FAULTS:
            yield from _of_table(setup, addressing(reach), entries, live, fault)


def _of_cache(setup: Setup, which: str, low_bits: int, live: Live, fault: AddressFault) -> Iterator[Misread]:
    cache, layout = setup.cache, setup.problem.case.layout
    tensor, payload = (cache.k, cache.key_payload) if which == "k" else (cache.v, cache.value_payload)
    where = address(tensor, layout, which, *payload.shape[1:])
    reach = Reach.of(where, tensor.element_size(), low_bits)
    right, moved = reach.right(live), reach.moved(live, fault)  # [n, heads * dim]
    wrong = (right != moved).nonzero()
    if not len(wrong):
        return
    key, element = wrong[0].tolist()
    target, page = which.upper(), int(live.page[key])
    yield Misread(
        target=target,
        fault=fault,
        found={which: _payload(tensor, payload, live, moved)},
        item=f"{target} of page {page:,}",
        right=int(right[key, element]) - where.origin,
        read=int(moved[key, element]) - where.origin,
    )


def _of_table(setup: Setup, at: Addressing, entries: Entries, live: Live, fault: AddressFault) -> Iterator[Misread]:
    cache, layout, table = setup.cache, setup.problem.case.layout, setup.cache.block_table
    assert table is not None  # the only form that such a probe has
    right, moved = entries.right(at), entries.moved(at, fault)  # [n, 1]
    wrong = (right != moved).nonzero()[:, 0]
    ids = storage_bits(table)[moved + table.storage_offset()][:, 0].to(torch.int64)
    if not len(wrong) or not bool(((ids >= 0) & (ids < cache.num_pages)).all()):
        return
    entry_of = torch.zeros_like(table, dtype=torch.int64)  # [num_seqs, width] number of the entry
    entry_of[entries.seq[:, 0], entries.column[:, 0]] = torch.arange(len(ids), device=ids.device)
    keys = key_positions(setup.problem.case.rows, ids.device)
    page = ids[entry_of[keys.seq[live.key], keys.pos[live.key] // cache.page_size]]
    found = {}
    for which, tensor, payload in (("k", cache.k, cache.key_payload), ("v", cache.v, cache.value_payload)):
        where = address(tensor, layout, which, *payload.shape[1:])
        found[which] = _payload(tensor, payload, live, where.offsets(page, live.slot))
    first = int(wrong[0])
    yield Misread(
        target="the page table",
        fault=fault,
        found=found,
        item=f"row {int(entries.seq[first])} of the page table",
        right=int(right[first]),
        read=int(moved[first]),
    )


def _payload(tensor: torch.Tensor, payload: torch.Tensor, live: Live, offsets: torch.Tensor) -> torch.Tensor:
    """`payload` [num_keys, heads, dim] with what `tensor` holds at `offsets` [n, heads * dim] for the `live` tokens."""
    read = bits_of(payload).clone()
    read[live.key] = storage_bits(tensor)[offsets].view(-1, *payload.shape[1:])
    return read.view(payload.dtype)
