"""Boundary probes judged: whether a case could show the wrong addresses it is for, and which one an output shows.

Invariant: what a fault would make of the output is computed by the reference from what memory really holds where that
fault reads; a sentence is said only where the whole output is, within its tolerance, what that fault makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from harness.cache.address import address
from harness.cache.address_faults import FAULTS, AddressFault, Addressing, tell_move
from harness.cache.build import live_tokens
from harness.cache.descale_probe import BUFFERS, DescaleCells
from harness.cache.descale_probe import addressing as descale_addressing
from harness.cache.positions import key_positions
from harness.cache.probe import Live, Reach, storage_bits
from harness.cache.quantise import bits_of
from harness.cache.row_probe import Cells
from harness.cache.table_probe import addressing, entries, page_ids_of
from harness.kernel.contract import Contract
from harness.kernel.launch import handed_out
from harness.kernel.reaching import ReachingOutput
from harness.oracle.judge import judge
from harness.oracle.observability import MARGIN
from harness.oracle.tolerance import Tolerance, tolerance
from harness.problem.boundary import cache_geometry, carrying_sequence, table_geometry
from harness.problem.descales import group_of_key
from harness.problem.problem import Problem
from harness.run.reference import build_reference
from harness.run.setup import Setup
from references.attention import AttentionReference

# By `boundary_target`: what a misread may be of. Stores are told by harness.kernel.reaching.
_DESCALES = ("K descales", "V descales")
_TARGETS = {
    "kv": ("K", "V"),
    "k": ("K",),
    "v": ("V",),
    "descale": _DESCALES,
    "table": ("the page table",),
    "out": (),
    "workspace": (),
    "slots": (),
}
_PAIRS = (("K", "V"), _DESCALES)  # of which one fault may spoil both


@dataclass(frozen=True)
class Misread:
    """K, V, descales or the page table as read through one fault: what comes of it, and the first wrong address."""

    target: str  # K | V | K descales | V descales | the page table
    fault: AddressFault
    found: Mapping[str, torch.Tensor]  # by "k", "v": the payload read for each key, stored dtype [num_keys, heads, dim]
    item: str  # what lies at `right`
    right: int  # element of the pool
    read: int  # the element that is read instead
    descales: Mapping[int, torch.Tensor] = field(default_factory=dict)  # by kind: float32 [groups, num_kv_heads]


def memory_of(setup: Setup) -> dict[str, Any]:
    """What K, V, and whatever else lies at a boundary take: the kind of pool, bytes of addresses and of memory.

    Workspaces are those that the kernel has taken so far.
    """
    pools = [setup.cache.pool(which) for which in ("k", "v")]
    pools += [pool for name, pool in setup.cache.pools.items() if name not in ("k", "v")]
    if setup.writing is not None and setup.writing.probe is not None:
        pools.append(setup.writing.probe.pool)
    written = (*setup.outputs, *handed_out(setup.args))
    pools += [output.pool for output in written if isinstance(output, ReachingOutput)]
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
            for misread in found:
                moved = _outcome(setup, contract, [misread]).out - reference.out
                if not bool((moved.abs() > MARGIN * allowed.out).any() | moved.isnan().any()):
                    return f"cannot see a wrong address of {target}: the output is the same where {fault.words}"
    return None


def unreached(setup: Setup) -> str | None:
    """Why workspaces could not show one of the wrong addresses the case is for; None where they could, or need not.

    Asked after the launch: a kernel may take none, or store nothing where addresses would go wrong.
    """
    case = setup.problem.case
    if case.boundary is None or case.boundary_target != "workspace" or case.boundary_position == "below":
        return None
    taken = [made for made in handed_out(setup.args) if isinstance(made, ReachingOutput)]
    for fault in (fault for fault in FAULTS if case.boundary in fault.for_boundaries):
        if not any(made.shows(fault) for made in taken):
            return f"cannot see a wrong address of a workspace: nothing was stored where {fault.words}"
    return None


def tell_addresses(setup: Setup, contract: Contract, out: torch.Tensor) -> list[str]:
    """Which wrong addresses explain `out` [num_tokens, num_q_heads, head_size_v]; [] where none does.

    Addresses of one tensor are tried first, then those of K and V by the same fault.
    """
    misreads = list(_misreads(setup))
    alone = [(misread,) for misread in misreads]
    both = [(k, v) for k in misreads for v in misreads if (k.target, v.target) in _PAIRS and k.fault == v.fault]
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
    problem, descales = setup.problem, setup.problem.descales.clone()
    for misread in misreads:
        for kind, read_instead in misread.descales.items():
            descales[..., kind] = read_instead
    found = {which: payload for misread in misreads for which, payload in misread.found.items()}
    cache = setup.cache
    read = replace(
        cache, key_payload=found.get("k", cache.key_payload), value_payload=found.get("v", cache.value_payload)
    )
    return build_reference(replace(problem, descales=descales), read, contract)


def _misreads(setup: Setup) -> Iterator[Misread]:
    """Every fault that would read an element of a live token, or an entry of the page table, elsewhere."""
    problem, cache = setup.problem, setup.cache
    if problem.case.boundary is None:
        return
    live = live_tokens(problem, cache.pages, cache.cached_lens, cache.dead_pages)
    if at := cache_geometry(problem.case):
        for fault in FAULTS:
            for which in at.page_strides.keys() & {"k", "v"}:
                yield from _of_cache(setup, which, at.low_bits[which], live, fault)
            for name, tensor in _far_descales(setup).items():
                descales = DescaleCells.of(problem, name, cache.pages, live)
                yield from _of_descales(problem, tensor, descale_addressing(at), descales, fault)
    if reach := table_geometry(problem.case):
        cells = entries(problem.case, cache.cached_lens, problem.q.device)
        for fault in FAULTS:
            yield from _of_table(setup, addressing(reach), cells, live, fault)
            if problem.case.page_table == "kv_indices":
                behind = carrying_sequence(problem.case) + 1
                if any(n > 0 for n in cache.cached_lens[behind:]):  # else they are the same
                    for part in (range(behind - 1, behind), range(behind, len(cache.cached_lens))):
                        yield from _of_table(setup, addressing(reach), cells, live, fault, part)


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


def _far_descales(setup: Setup) -> dict[str, torch.Tensor]:
    """The descales whose pages lie far apart, by the name of their argument."""
    return {name: getattr(setup.cache, name) for name in BUFFERS if name in setup.cache.pools}


def _of_descales(
    problem: Problem, tensor: torch.Tensor, at: Addressing, cells: DescaleCells, fault: AddressFault
) -> Iterator[Misread]:
    shape = (len(cells.group), -1, len(cells.kinds))  # [n, heads, kinds]
    right, moved = cells.cells.right(at).view(shape), cells.cells.moved(at, fault).view(shape)
    found = cells.read(tensor, at, fault)
    for place, kind in enumerate(cells.kinds):
        wrong = (right != moved)[..., place].nonzero()
        if not len(wrong):
            continue
        group, head = wrong[0].tolist()
        descales = problem.descales[..., kind].clone()  # [groups, heads]
        descales[cells.group] = found[..., place]
        yield Misread(
            target=_DESCALES[kind],
            fault=fault,
            found={},
            item=f"{'KV'[kind]} descale of page {int(cells.page[group]):,}",
            right=int(right[group, head, place]),
            read=int(moved[group, head, place]),
            descales={kind: descales},
        )


def _of_table(
    setup: Setup, at: Addressing, cells: Cells, live: Live, fault: AddressFault, sequences: range | None = None
) -> Iterator[Misread]:
    """`sequences`: the only ones whose entries are read elsewhere, as a kernel may find where each begins by the fault,
    or only what lies behind that.
    """
    cache, layout, table = setup.cache, setup.problem.case.layout, page_ids_of(setup.cache)
    right, moved = cells.right(at), cells.moved(at, fault)  # [n, 1]
    counts = torch.tensor([-(-n // cache.page_size) for n in cache.cached_lens], device=moved.device)
    first_entry = counts.cumsum(0) - counts  # [num_seqs] by number, as entries() has them
    if sequences is not None:
        number = torch.arange(len(moved), device=moved.device)[:, None]
        first, end = int(first_entry[sequences.start]), int(counts[: sequences.stop].sum())
        moved = torch.where((number >= first) & (number < end), moved, right)
    wrong = (right != moved).nonzero()[:, 0]
    ids = storage_bits(table)[moved + table.storage_offset()][:, 0].to(torch.int64)
    if not len(wrong) or not bool(((ids >= 0) & (ids < cache.num_pages)).all()):
        return
    keys = key_positions(setup.problem.case.rows, ids.device)
    page = ids[first_entry[keys.seq[live.key]] + keys.pos[live.key] // cache.page_size]
    found = {}
    for which, tensor, payload in (("k", cache.k, cache.key_payload), ("v", cache.v, cache.value_payload)):
        where = address(tensor, layout, which, *payload.shape[1:])
        found[which] = _payload(tensor, payload, live, where.offsets(page, live.slot))
    first = int(wrong[0])
    yield Misread(
        target="the page table",
        fault=fault,
        found=found,
        item=f"{'entry' if setup.cache.block_table is None else 'row'} {int(cells.row[first])} of the page table",
        right=int(right[first]),
        read=int(moved[first]),
        descales=_descales_of(setup, live, page),
    )


def _descales_of(setup: Setup, live: Live, page: torch.Tensor) -> dict[int, torch.Tensor]:
    """By kind, the descales float32 [groups, num_kv_heads] of `live` tokens whose pages are `page` [n] instead."""
    problem, cache = setup.problem, setup.cache
    descales = problem.descales.clone()  # [groups, num_kv_heads, 2]
    if cache.kv_block_descale is not None:
        descales[group_of_key(problem.case).to(page.device)[live.key]] = cache.kv_block_descale[page]
    elif cache.k_token_descale is not None and cache.v_token_descale is not None:
        of_k, of_v = cache.k_token_descale, cache.v_token_descale
        descales[live.key] = torch.stack((of_k[page, live.slot], of_v[page, live.slot]), -1)
    else:
        return {}
    return {kind: descales[..., kind] for kind in (0, 1)}


def _payload(tensor: torch.Tensor, payload: torch.Tensor, live: Live, offsets: torch.Tensor) -> torch.Tensor:
    """`payload` [num_keys, heads, dim] with what `tensor` holds at `offsets` [n, heads * dim] for the `live` tokens."""
    read = bits_of(payload).clone()
    read[live.key] = storage_bits(tensor)[offsets].view(-1, *payload.shape[1:])
    return read.view(payload.dtype)
