"""The slots of a cache that a writer stored to, as they were found: which are wrong, and what they hold, in words.

Invariant: addresses follow from the layout's formula, not from views, and count from the first element of the tensor;
that the memory is wrong is known already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from harness.cache.address import Address, address
from harness.cache.address_faults import FAULTS, AddressFault, Addressing, tell_move
from harness.cache.build import KVCache
from harness.cache.diagnose import find_token
from harness.cache.edges import EdgeToken
from harness.cache.other_rounding import other_rounding
from harness.cache.poison import tail_bits
from harness.cache.probe import storage_bits
from harness.cache.quantise import bits_of, quantise
from harness.cache.slots import NewToken
from harness.dtypes import element_type, element_type_of
from harness.problem.boundary import cache_geometry
from harness.problem.problem import Problem


@dataclass(frozen=True)
class WriteFinding:
    """What is wrong with a slot of K or V: one example in words, and how many of those looked at are like it.

    kind: not_stored | wrong_token | wrong_value of the slot of a new token; stray anywhere else; moved: which address
    fault does all that.
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
class SeenSlots:
    """One cache tensor as a writer left it; `place` has the offsets of its elements from the first."""

    problem: Problem
    memory: KVCache
    which: str
    tensor: torch.Tensor
    place: Address
    edge: EdgeToken | None

    @classmethod
    def of(cls, problem: Problem, memory: KVCache, which: str, edge: EdgeToken | None) -> SeenSlots:
        tensor = memory.k if which == "k" else memory.v
        heads, dim = (problem.k if which == "k" else problem.v).shape[1:]
        place = replace(address(tensor, problem.case.layout, which, heads, dim), origin=0)
        return cls(problem, memory, which, tensor, place, edge)

    @property
    def _payload(self) -> torch.Tensor:
        return self.memory.key_payload if self.which == "k" else self.memory.value_payload

    def _row(self, page: int, offset: int) -> torch.Tensor:
        """What a slot holds: stored dtype [heads, dim]."""
        bits = storage_bits(self.tensor)[self._offsets(page, offset) + int(self.tensor.storage_offset())]
        return bits.view(self._payload.dtype).view(self._payload.shape[1:])

    def _offsets(self, page: int, offset: int) -> torch.Tensor:
        """int64 [heads * dim]: elements of a slot."""
        at = (torch.tensor([index], device=self.tensor.device) for index in (page, offset))
        return self.place.offsets(*at)[0]

    def _index(self, tokens: Sequence[NewToken]) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and offset in it of `tokens`: int64 [n] each."""
        page, offset = ([getattr(one, name) for one in tokens] for name in ("page", "offset"))
        whole = torch.tensor([page, offset], dtype=torch.int64, device=self.tensor.device)  # [2, n]
        return whole[0], whole[1]

    def missed(self, wrong: torch.Tensor, tokens: Sequence[NewToken]) -> tuple[list[NewToken], torch.Tensor]:
        """Those of `tokens` whose slots are wrong, and the `wrong` elements, int64 [n], that lie elsewhere."""
        slots = self.place.offsets(*self._index(tokens))  # [tokens, heads * dim]
        hits = torch.isin(slots, wrong).any(dim=1).tolist()
        if self.edge is not None:  # what is expected does not hold it
            payload = self.edge.payload(self.problem, self.which)
            found = self._row(self.edge.token.page, self.edge.token.offset)
            hits[tokens.index(self.edge.token)] = not torch.equal(bits_of(found), bits_of(payload))
        return [one for one, hit in zip(tokens, hits, strict=True) if hit], wrong[~torch.isin(wrong, slots)]

    def moved(self, missed: Sequence[NewToken], elsewhere: torch.Tensor) -> list[WriteFinding]:
        """The address faults that store all of `missed` tokens of a boundary probe to elements that are wrong."""
        at = cache_geometry(self.problem.case)
        if at is None or not missed:
            return []
        page, offset = self._index(missed)
        reach = Addressing(self.place.page, self.tensor.element_size(), at.low_bits.get(self.which, 0))
        right = self.place.offsets(page, offset)  # [n, heads * dim]
        found: dict[tuple[int, int], list[AddressFault]] = {}
        for fault in FAULTS:
            to = fault.moved(page[:, None], self.place.in_page(offset), reach)
            moved = to != right
            if bool(moved.any()) and bool(torch.isin(to[moved], elsewhere).all()):
                found.setdefault((int(right[moved][0]), int(to[moved][0])), []).append(fault)
        lines = [tell_move("of new tokens", "stored", *places, faults) for places, faults in found.items()]
        return [WriteFinding("moved", (self.which,), line, missed[0].page) for line in lines]

    def strays(self, elsewhere: torch.Tensor) -> list[tuple[int, int, int]]:
        """(page, offset, first element) of every slot with one of the elements `elsewhere` [n]; of gaps the offset is
        -1.
        """
        pages = (elsewhere // self.place.page).clamp(0, self.memory.num_pages - 1)
        slots = torch.arange(self.memory.page_size, device=elsewhere.device)
        found = []
        for page in sorted(set(pages.tolist())):
            own = elsewhere[pages == page]
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
            said = f"cache: a stray store outside every slot, to its element {element}, by page {page}"
            return WriteFinding("stray", (self.which,), said, page)
        found = self._row(page, offset)
        index = (self._offsets(page, offset) == element).nonzero()
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
        how = ""
        if self.problem.case.kv_dtype != "auto":
            how = other_rounding(found, right, value, own, other, stored) or self._other_descale(found, value, own)
        told = f"head {head}, dim {dim} holds {float(found[head, dim]):g} instead of"
        what = f"{told} {float(right[head, dim]):g} (value {float(value[head, dim]):g})"
        return "wrong_value", f"{what}: {how}" if how else what

    def _other_descale(self, found: torch.Tensor, value: torch.Tensor, own: torch.Tensor) -> str:
        """Whose descale made `found` [heads, dim] of `value`, with `own` [1 or heads, 1]: words, or "" if nobody's."""
        bits, stored = bits_of(found), element_type_of(found.dtype)
        for head in range(len(own)):
            if torch.equal(bits, bits_of(quantise(value, own[head], stored))):
                return f"all heads divided by the descale of KV head {head}"
        every, some = self.problem.descale(self.which), slice(0, 16)  # [1 or keys, 1 or heads, 1]; enough to tell
        tried = bits_of(quantise(value[None, :, some].expand(len(every), -1, -1), every, stored))
        key = next(iter((tried == bits[:, some]).flatten(1).all(dim=1).nonzero()[:, 0].tolist()), None)
        if key is None or len(every) == 1:
            return ""
        seq, position = self.problem.place_of(key)
        return f"divided by the descale of sequence {seq}, position {position}"

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
        other = self.memory.value_payload if self.which == "k" else self.memory.key_payload
        payloads["V of " if self.which == "k" else "K of "] = other
        for name, payload in payloads.items():
            if (at := find_token(self.problem, payload, bits_of(found))) is not None:
                return f"{name}the token of sequence {at[0]}, position {at[1]}"
        if self.edge is not None and torch.equal(bits_of(found), bits_of(self.edge.payload(self.problem, self.which))):
            return str(self.edge.token)
        padding = -element_type(self.problem.case.stored_dtype).largest
        return "the padding behind the batch" if bool((found.to(torch.float32) == padding).all()) else None

    def _owner(self, page: int, offset: int) -> str:
        for seq, pages in enumerate(self.memory.pages):
            if page in pages:
                position = pages.index(page) * self.memory.page_size + offset
                behind = "" if position < self.problem.case.rows.seq_lens[seq] else ", behind its end"
                return f"position {position} of sequence {seq}{behind}"
        return "the null page" if page == 0 else "of no sequence"
