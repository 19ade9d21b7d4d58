"""Slot mapping: where a cache writer is to store each new token.

Invariant: computed from the placement, in Python, apart from the page table and from every kernel. Tokens before the
first key, and the padding behind the last token, have no slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.case import Rows

PADDING = 3  # tokens behind the last one, as a batch that was padded for a graph has them
MORE = 1 + PADDING  # rows that a writer gets beyond the tokens of the batch: the edge token, and padding
NO_SLOT = -1
NO_SEQUENCE = -1


@dataclass(frozen=True)
class NewToken:
    """A token that a writer stores: row `token` of k and v."""

    token: int
    sequence: int  # NO_SEQUENCE: the edge token, whose values lie at the edges of the stored type
    position: int
    page: int
    offset: int  # in the page
    slot: int  # page * page_size + offset

    def __str__(self) -> str:
        if self.sequence == NO_SEQUENCE:
            return f"token {self.token} (values at the edges of the stored type)"
        return f"token {self.token} (sequence {self.sequence}, position {self.position})"


def new_tokens(rows: Rows, pages: Sequence[Sequence[int]], page_size: int) -> tuple[NewToken, ...]:
    """The tokens that have a slot, in order; `pages` are the physical pages of each sequence."""
    found, token = [], 0
    for seq, (query_len, context_len) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
        for position in range(context_len, context_len + query_len):
            if position >= 0:
                page, offset = pages[seq][position // page_size], position % page_size
                found.append(NewToken(token, seq, position, page, offset, page * page_size + offset))
            token += 1
    return tuple(found)


def slot_mapping(rows: Rows, tokens: Sequence[NewToken], device: torch.device) -> torch.Tensor:
    """int64 [num_tokens + MORE]; NO_SLOT where there is none."""
    slots = torch.full((rows.num_tokens + MORE,), NO_SLOT, dtype=torch.int64)
    for one in tokens:
        slots[one.token] = one.slot
    return slots.to(device)
