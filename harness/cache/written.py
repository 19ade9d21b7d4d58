"""What a cache writer left in memory, against what it had to leave: every byte, without tolerance.

Invariant: the memory that is expected was built, and proved itself (harness.cache.verify), without the writer; both are
compared whole, gaps and other pages included. Addresses follow from the layout's formula, not from views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from harness.cache.address import Address, address
from harness.cache.build import KVCache
from harness.cache.diagnose import find_token
from harness.cache.edges import EdgeToken
from harness.cache.other_rounding import other_rounding
from harness.cache.poison import tail_bits
from harness.cache.probe import storage_bits
from harness.cache.quantise import bits_of
from harness.cache.slots import NewToken
from harness.dtypes import element_type
from harness.problem.problem import Problem

MAX_LOOKED_AT = 64  # wrong slots of one tensor that are told apart; all are counted


@dataclass(frozen=True)
class WriteFinding:
    """What is wrong with a slot of K or V: one example in words, and how many of those looked at are like it.

    kind: not_stored | wrong_token | wrong_value of the slot of a new token; stray anywhere else.
    """

    kind: str
    which: tuple[str, ...]  # k, v, or both where the same is said of them
    said: str
    page: int
    others: int = 0

    def __str__(self) -> str:
        names = " and ".join(self.which).upper().replace("AND", "and")
        return f"{names} {self.said}" + (f"; {self.others} like it" if self.others else "")


@dataclass(frozen=True)
class MemoryFindings:
    found: tuple[WriteFinding, ...] = ()
    counts: tuple[str, ...] = ()  # how many slots are wrong, in words


def judge_memory(
    problem: Problem, expected: KVCache, memory: KVCache, tokens: Sequence[NewToken], edge: EdgeToken | None
) -> MemoryFindings:
    """What is wrong in `memory` after a writer stored `tokens`, `edge` among them; `expected` is the same problem built
    full, without the edge token.
    """
    found: list[WriteFinding] = []
    counts: list[str] = []
    for which in ("k", "v"):
        got_in, want_in = (memory.k, expected.k) if which == "k" else (memory.v, expected.v)
        got, want = _around(got_in, want_in)
        wrong = got != want  # [elements]
        heads, dim = (problem.k if which == "k" else problem.v).shape[1:]
        place = address(want_in, problem.case.layout, which, heads, dim)
        seen = _Seen(problem, expected, which, got, place, edge)
        if edge is not None:
            slot = seen.offsets(edge.token.page, edge.token.offset)
            wrong[slot] = got[slot] != bits_of(edge.payload(problem, which)).flatten()
        if not bool(wrong.any()):
            continue
        missed = seen.missed(wrong, tokens)
        strays = seen.strays(wrong)
        found += _alike([seen.token(one) for one in missed[:MAX_LOOKED_AT]])
        found += _alike([seen.stray(*one) for one in strays[:MAX_LOOKED_AT]])
        if missed:
            counts.append(f"{which.upper()}: {len(missed)} of {len(tokens)} slots of new tokens are wrong")
        if strays:
            counts.append(f"{which.upper()}: {len(strays)} other slots or gaps were stored to")
    return MemoryFindings(_joined(found), tuple(counts))


def _around(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The allocations of both as integers, [elements] each, as far as both reach: a fenced one ends with its tensor."""
    ends = [(int(t.storage_offset()), storage_bits(t)) for t in (got, want)]
    low = min(offset for offset, _ in ends)
    high = min(len(bits) - offset for offset, bits in ends)
    assert low == ends[1][0]  # so that addresses in `want` are those in what is returned
    return ends[0][1][ends[0][0] - low : ends[0][0] + high], ends[1][1][: low + high]


def _joined(found: Sequence[WriteFinding]) -> tuple[WriteFinding, ...]:
    """Findings of V that say what one of K does, as one."""
    same = [replace(one, which=()) for one in found]
    which = {one: tuple(other.which[0] for other, key in zip(found, same, strict=True) if key == one) for one in same}
    return tuple(replace(one, which=which[one]) for one in dict.fromkeys(same))


def _alike(found: Sequence[WriteFinding]) -> list[WriteFinding]:
    """The first of each kind, with the number of the others."""
    kinds = [one.kind for one in found]
    return [replace(found[kinds.index(kind)], others=kinds.count(kind) - 1) for kind in dict.fromkeys(kinds)]


@dataclass(frozen=True)
class _Seen:
    """One cache tensor as it was found: `flat` [elements of the allocation], and where its elements lie."""

    problem: Problem
    expected: KVCache
    which: str
    flat: torch.Tensor
    place: Address
    edge: EdgeToken | None

    @property
    def _payload(self) -> torch.Tensor:
        return self.expected.key_payload if self.which == "k" else self.expected.value_payload

    def _row(self, page: int, offset: int) -> torch.Tensor:
        """What a slot holds: stored dtype [heads, dim]."""
        bits = self.flat[self.offsets(page, offset)]
        return bits.view(self._payload.dtype).view(self._payload.shape[1:])

    def offsets(self, page: int, offset: int) -> torch.Tensor:
        """int64 [heads * dim]: elements of a slot, from the start of the allocation."""
        at = (torch.tensor([index], device=self.flat.device) for index in (page, offset))
        return self.place.offsets(*at)[0]

    def missed(self, wrong: torch.Tensor, tokens: Sequence[NewToken]) -> list[NewToken]:
        """Those of `tokens` whose slots are wrong; these are taken out of `wrong`, bool [elements]."""
        page = torch.tensor([one.page for one in tokens], dtype=torch.int64, device=wrong.device)
        offset = torch.tensor([one.offset for one in tokens], dtype=torch.int64, device=wrong.device)
        slots = self.place.offsets(page, offset)  # [n, heads * dim]
        hits = wrong[slots].any(dim=1).tolist()
        wrong[slots.flatten()] = False
        return [one for one, hit in zip(tokens, hits, strict=True) if hit]

    def strays(self, wrong: torch.Tensor) -> list[tuple[int, int, int]]:
        """(page, offset, first element) of every slot with a `wrong` element; of gaps the offset is -1."""
        elements = wrong.nonzero()[:, 0]  # [n] from the start of the allocation
        pages = ((elements - self.place.origin) // self.place.page).clamp(0, self.expected.num_pages - 1)
        slots = torch.arange(self.expected.page_size, device=wrong.device)
        found = []
        for page in sorted(set(pages.tolist())):
            own = elements[pages == page]
            offsets = self.place.offsets(torch.full_like(slots, page), slots)  # [page_size, heads * dim]
            hit = torch.isin(offsets, own)
            for offset in hit.any(dim=1).nonzero()[:, 0].tolist():
                found.append((page, offset, int(offsets[offset][hit[offset]][0])))
            found += [(page, -1, element) for element in own[~torch.isin(own, offsets)][:1].tolist()]
        return found

    def token(self, token: NewToken) -> WriteFinding:
        """What is wrong with the slot of a new token."""
        kind, what = self._content(token, self._row(token.page, token.offset))
        said = f"of {token} -> slot {token.slot} (page {token.page}, offset {token.offset}) {what}"
        return WriteFinding(kind, (self.which,), said, token.page)

    def stray(self, page: int, offset: int, element: int) -> WriteFinding:
        """What was stored where no new token belongs."""
        if offset < 0:
            said = f"cache: a stray store outside every slot, to element {element} of its allocation, by page {page}"
            return WriteFinding("stray", (self.which,), said, page)
        found = self._row(page, offset)
        index = (self.offsets(page, offset) == element).nonzero()
        head, dim = divmod(int(index[0]), found.shape[1])
        what = self._holder(found) or f"{float(found[head, dim]):g} at head {head}, dim {dim}"
        said = f"cache: a stray store to page {page}, offset {offset} ({self._owner(page, offset)}), which holds {what}"
        return WriteFinding("stray", (self.which,), said, page)

    def _content(self, token: NewToken, found: torch.Tensor) -> tuple[str, str]:
        """Kind of what is wrong with `found` [heads, dim], the slot of `token`, and what it is, in words."""
        bits, stored = bits_of(found), element_type(self.problem.case.stored_dtype)
        value, right, own, other = self._wanted(token)
        left = bits == tail_bits(stored, self.problem.case.tail if token is not self._edge else "nan")  # [heads, dim]
        if bool(left.all()):
            return "not_stored", "was not stored: it holds what it held before"
        if (holder := self._holder(found)) is not None:
            return "wrong_token", f"holds {holder}"
        wrong = bits != bits_of(right)
        head, dim = wrong.nonzero()[0].tolist()
        if bool((wrong == left).all()):
            return "not_stored", f"was stored in part: head {head}, dim {dim} holds what it held before"
        how = "" if self.problem.case.kv_dtype == "auto" else other_rounding(found, right, value, own, other, stored)
        told = f"head {head}, dim {dim} holds {float(found[head, dim]):g} instead of"
        what = f"{told} {float(right[head, dim]):g} (value {float(value[head, dim]):g})"
        return "wrong_value", f"{what}: {how}" if how else what

    @property
    def _edge(self) -> NewToken | None:
        return None if self.edge is None else self.edge.token

    def _wanted(self, token: NewToken) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Value and payload of a token, [heads, dim], its descale and that of the other tensor, [1 or heads, 1]."""
        other_name = "v" if self.which == "k" else "k"
        descales = self.problem.descale(self.which), self.problem.descale(other_name)
        if self.edge is not None and token is self.edge.token:
            value = (self.edge.k if self.which == "k" else self.edge.v)[0]
            return value, self.edge.payload(self.problem, self.which), descales[0][0], descales[1][0]
        key = self.problem.key_start[token.sequence] + token.position
        own, other = (descale[key if len(descale) > 1 else 0] for descale in descales)
        return (self.problem.k if self.which == "k" else self.problem.v)[key], self._payload[key], own, other

    def _holder(self, found: torch.Tensor) -> str | None:
        """The token whose payload `found` [heads, dim] is, in words."""
        payloads = {"": self._payload}
        other = self.expected.value_payload if self.which == "k" else self.expected.key_payload
        payloads["V of " if self.which == "k" else "K of "] = other
        for name, payload in payloads.items():
            if (at := find_token(self.problem, payload, bits_of(found))) is not None:
                return f"{name}the token of sequence {at[0]}, position {at[1]}"
        if self.edge is not None and torch.equal(bits_of(found), bits_of(self.edge.payload(self.problem, self.which))):
            return str(self.edge.token)
        return None

    def _owner(self, page: int, offset: int) -> str:
        for seq, pages in enumerate(self.expected.pages):
            if page in pages:
                position = pages.index(page) * self.expected.page_size + offset
                behind = "" if position < self.problem.case.rows.seq_lens[seq] else ", behind its end"
                return f"position {position} of sequence {seq}{behind}"
        return "the null page" if page == 0 else "of no sequence"
