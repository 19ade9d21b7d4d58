"""Where a token of the flat batch belongs: sequence, phase, position. Invariant: tokens are packed by sequence.

position = context_len + index within the row; it is negative for queries that lie before the first key.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from harness.cache.content import phase
from harness.case import Rows


@dataclass(frozen=True)
class Place:
    token: int
    sequence: int
    index: int  # of the query within its row
    query_len: int
    context_len: int

    @property
    def phase(self) -> str:
        return phase(self.query_len)

    @property
    def position(self) -> int:
        return self.context_len + self.index


@dataclass(frozen=True)
class RowPart:
    """The wrong tokens of one sequence."""

    sequence: int
    query_len: int
    context_len: int
    indices: tuple[int, ...]  # queries of the row that are wrong, ascending
    wrong_elements: int

    @property
    def phase(self) -> str:
        return phase(self.query_len)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(self.context_len + i for i in self.indices)


def places(rows: Rows, tokens: Sequence[int]) -> list[Place]:
    starts = [0, *accumulate(rows.query_lens)][:-1]  # [num_seqs]
    found = []
    for token in tokens:
        s = bisect_right(starts, token) - 1  # of rows that start at the same token, the last one is not empty
        found.append(Place(token, s, token - starts[s], rows.query_lens[s], rows.context_lens[s]))
    return found


def row_parts(rows: Rows, wrong_per_token: Sequence[int]) -> list[RowPart]:
    """The sequences with wrong tokens, in batch order. wrong_per_token: [num_tokens] wrong elements of each token."""
    parts, start = [], 0
    for sequence, (query_len, context_len) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
        counts = wrong_per_token[start : start + query_len]
        start += query_len
        if wrong := tuple(i for i, n in enumerate(counts) if n):
            parts.append(RowPart(sequence, query_len, context_len, wrong, sum(counts)))
    return parts
