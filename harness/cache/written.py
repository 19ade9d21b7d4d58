"""What a cache writer left in memory, against what it had to leave: every byte, without tolerance.

Invariant: the memory that is expected was built, and proved itself (harness.cache.verify), without the writer; both are
compared whole, gaps and other pages included. Offsets count from the first element of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from harness.cache.build import KVCache
from harness.cache.edges import EdgeToken
from harness.cache.poison import poison_bits
from harness.cache.probe import storage_bits
from harness.cache.seen_slots import SeenSlots, WriteFinding
from harness.cache.slots import NewToken
from harness.dtypes import element_type_of
from harness.problem.problem import Problem

MAX_LOOKED_AT = 64  # wrong slots of one tensor that are told apart; all are counted


@dataclass(frozen=True)
class MemoryFindings:
    found: tuple[WriteFinding, ...] = ()
    counts: tuple[str, ...] = ()  # how many slots are wrong, in words; nothing where all is right
    missed: frozenset[NewToken] = frozenset()  # tokens whose slots are wrong, in K or V
    stray_slots: frozenset[int] = frozenset()  # other slots that were stored to


def judge_memory(
    problem: Problem, expected: KVCache, memory: KVCache, tokens: Sequence[NewToken], edge: EdgeToken | None
) -> MemoryFindings:
    """What is wrong in `memory` after a writer stored `tokens`, `edge` among them; `expected` is the same problem built
    full, without the edge token.
    """
    found: list[WriteFinding] = []
    counts: list[str] = []
    all_missed: set[NewToken] = set()
    stray_slots: set[int] = set()
    for which in ("k", "v"):
        wrong, shared = wrong_elements(expected, memory, which)
        if not len(wrong) and not shared and edge is None:
            continue
        seen = SeenSlots.of(problem, memory, which, edge)
        missed, elsewhere = seen.missed(wrong, tokens)
        strays = seen.strays(elsewhere)
        all_missed.update(missed)
        stray_slots.update(page * memory.page_size + offset for page, offset, _ in strays)
        found += seen.moved(missed, elsewhere)
        found += _alike([seen.token(one) for one in missed[:MAX_LOOKED_AT]])
        found += _alike([seen.stray(*one) for one in strays[:MAX_LOOKED_AT]])
        if missed:
            counts.append(f"{which.upper()}: {len(missed)} of {len(tokens)} slots of new tokens are wrong")
        if strays:
            counts.append(f"{which.upper()}: {len(strays)} other slots or gaps were stored to")
        if shared:
            counts.append(f"{which.upper()}: memory that all unused addresses share was stored to")
    return MemoryFindings(_joined(found), tuple(counts), frozenset(all_missed), frozenset(stray_slots))


def wrong_elements(expected: KVCache, memory: KVCache, which: str) -> tuple[torch.Tensor, bool]:
    """Elements that differ, int64 [n] in order, and whether memory that unused addresses share was written."""
    got, want = (memory.k, expected.k) if which == "k" else (memory.v, expected.v)
    (got_bits, got_start), (want_bits, want_start) = ((storage_bits(t), int(t.storage_offset())) for t in (got, want))
    pool = memory.pools.get(which)
    if pool is None:  # as far as both allocations reach: a fenced one ends with its tensor
        spans = [(-min(got_start, want_start), min(len(got_bits) - got_start, len(want_bits) - want_start))]
    else:
        assert expected.pools[which].own == pool.own
        spans = [(first // got.element_size(), end // got.element_size()) for first, end in pool.own]
    found = []
    for low, high in spans:
        differs = got_bits[got_start + low : got_start + high] != want_bits[want_start + low : want_start + high]
        found.append(differs.nonzero()[:, 0] + low)
    byte = poison_bits(element_type_of(got.dtype)) & 0xFF
    return torch.cat(found), pool is not None and any(bool((part != byte).any()) for part in pool.shared)


def _joined(found: Sequence[WriteFinding]) -> tuple[WriteFinding, ...]:
    """Findings of V that say what one of K does, as one."""
    same = [replace(one, which=()) for one in found]
    which = {one: tuple(other.which[0] for other, key in zip(found, same, strict=True) if key == one) for one in same}
    return tuple(replace(one, which=which[one]) for one in dict.fromkeys(same))


def _alike(found: Sequence[WriteFinding]) -> list[WriteFinding]:
    """The first of each kind, with the number of the others."""
    kinds = [one.kind for one in found]
    return [replace(found[kinds.index(kind)], others=kinds.count(kind) - 1) for kind in dict.fromkeys(kinds)]
