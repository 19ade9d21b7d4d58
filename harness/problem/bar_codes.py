"""Bar codes: values that say which token they are, so that a mean of them tells which tokens were attended.

Invariant: the value of a token is 1 in one dimension of each group and 0 elsewhere (below a head size of 8 there is no
room for the last groups):

    page    its page within the sequence, modulo the size of the group
    slot    its place within the page: slot * size // page_size, or the slot itself where the group is large enough
    seq     its sequence, modulo the size of the group
    head    its KV head, modulo the size of the group

Under q = 0 all weights are equal, and the output in such a dimension is the share of its tokens among those attended.
harness.triage.bar_codes reads outputs back into sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from harness.case import Case
from harness.problem.spans import key_start


@dataclass(frozen=True)
class CodeGroups:
    """Dimensions of each group, in order; what is left of the head size stays 0."""

    page: int
    slot: int
    seq: int
    head: int

    def starts(self) -> dict[str, slice]:
        """The dimensions of each group by name."""
        found, first = {}, 0
        for name in ("page", "slot", "seq", "head"):
            found[name] = slice(first, first + getattr(self, name))
            first = found[name].stop
        return found


def code_groups(head_size_v: int) -> CodeGroups:
    """Half of the dimensions for pages, a quarter for slots, an eighth each for sequences and heads."""
    return CodeGroups((head_size_v + 1) // 2, head_size_v // 4, head_size_v // 8, head_size_v // 8)


def slot_class(slot: torch.Tensor, page_size: int, size: int) -> torch.Tensor:
    """Which dimension of the slot group stands for `slot`, both int64 of one shape: neighbours share one, in order."""
    if page_size <= size:
        return slot
    return torch.div(slot * size, page_size, rounding_mode="floor")


def code_values(case: Case, device: torch.device | str) -> torch.Tensor:
    """float32 [num_keys, num_kv_heads, head_size_v] of 0 and 1, packed by sequence."""
    groups, heads = code_groups(case.value_size), case.num_kv_heads
    part = groups.starts()
    starts = key_start(case.rows)
    values = torch.zeros((starts[-1], heads, case.value_size), dtype=torch.float32, device=device)
    for seq, (first, end) in enumerate(pairwise(starts)):
        pos = torch.arange(end - first, device=device)
        row = values[first:end]
        page = torch.div(pos, case.page_size, rounding_mode="floor") % groups.page
        slot = slot_class(pos % case.page_size, case.page_size, groups.slot)
        row[pos, :, part["page"].start + page] = 1.0
        if groups.slot:
            row[pos, :, part["slot"].start + slot] = 1.0
        if groups.seq:
            row[:, :, part["seq"].start + seq % groups.seq] = 1.0
    head = torch.arange(heads, device=device)
    if groups.head:
        values[:, head, part["head"].start + head % groups.head] = 1.0
    return values
