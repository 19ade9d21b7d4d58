"""Which sequences are computed together: similar ones share padded products, long ones stand alone.

Invariant: every sequence with a query row that sees a key is in exactly one batch. Padding repeats the last real row
or key, so it needs no values of its own; padded rows are never stored and padded keys never seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from references.quantities import AttentionInputs

CAUSAL_TILE_ROWS = 256  # rows per tile under a causal mask: a tile computes the keys of its last row for all its rows
LARGEST_ON_CPU = 1 << 16  # elements of a batch that stay in the cache of a core
SPARE_ON_CPU, SPARE_ON_GPU = 1 << 16, 1 << 24  # padded elements that cost about as much as the calls of one batch


@dataclass(frozen=True)
class Sequence:
    """The query rows of one sequence that see a key, and its keys."""

    index: int
    token: int  # first such row, packed
    positions: range | tuple[int, ...]  # of such rows, ascending; a range where they are consecutive
    key: int  # first key, packed
    seq_len: int
    cached_len: int  # keys below it are treated apart; 0 where none are

    @property
    def num_rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Batch:
    """One sequence as views of the inputs, or several gathered and padded to a common size."""

    sequences: tuple[Sequence, ...]
    num_rows: int
    num_keys: int
    cached_len: int
    token_index: torch.Tensor | None  # [num_seqs, num_rows] packed tokens; None for a single sequence
    key_index: torch.Tensor | None  # [num_seqs, num_keys] packed keys; None for a single sequence
    real_rows: torch.Tensor | None  # [2, tokens of the batch] packed token, place among padded rows; None for one

    @property
    def num_seqs(self) -> int:
        return len(self.sequences)

    def rows_of(self, packed: torch.Tensor, rows: slice) -> torch.Tensor:
        """`packed` [num_tokens, ...] as [num_seqs, rows, ...]"""
        if self.token_index is not None:
            return packed[self.token_index[:, rows]]
        first = self.sequences[0].token
        return packed[first + rows.start : first + rows.stop][None]

    def keys_of(self, packed: torch.Tensor) -> torch.Tensor:
        """`packed` [num_keys, ...] as [num_seqs, num_keys, ...]"""
        if self.key_index is not None:
            return packed[self.key_index]
        first = self.sequences[0].key
        return packed[first : first + self.num_keys][None]

    def store(self, packed: torch.Tensor, rows: slice, heads: slice, values: torch.Tensor) -> None:
        """Write `values` [num_seqs, rows, heads, n] to `packed` [num_tokens, num_q_heads, n]."""
        if self.real_rows is not None:
            packed[self.real_rows[0]] = values.flatten(0, 1)[self.real_rows[1]]  # a padded batch is one tile
        else:
            first = self.sequences[0].token
            packed[first + rows.start : first + rows.stop, heads] = values[0]


def batches(
    inputs: AttentionInputs, max_elements: int, positions: tuple[tuple[int, ...], ...] | None = None
) -> Iterator[Batch]:
    """Batches of `inputs`; one of several sequences has at most `max_elements` scores, keys or values.

    `positions` of the queries of each sequence, ascending; its last ones unless given.
    """
    spare = SPARE_ON_GPU
    if inputs.q.device.type == "cpu":
        spare, max_elements = SPARE_ON_CPU, min(max_elements, LARGEST_ON_CPU)
    waiting = sorted(_sequences(inputs, positions), key=lambda s: (s.cached_len, s.num_rows, s.seq_len))
    while waiting:
        taken = 1
        while taken < len(waiting) and _fits(inputs, waiting[: taken + 1], max_elements, spare):
            taken += 1
        yield _batch(waiting[:taken], inputs.q.device)
        del waiting[:taken]


def _sequences(inputs: AttentionInputs, positions: tuple[tuple[int, ...], ...] | None) -> Iterator[Sequence]:
    tokens, keys = accumulate((0, *inputs.query_lens)), accumulate((0, *inputs.seq_lens))
    cached_lens = inputs.cached_lens or (0,) * len(inputs.seq_lens)
    for index, (token, key) in enumerate(zip(tokens, keys, strict=True)):
        if index == len(inputs.seq_lens):
            return
        query_len, seq_len = inputs.query_lens[index], inputs.seq_lens[index]
        own = range(seq_len - query_len, seq_len) if positions is None else positions[index]
        blind = sum(position < 0 for position in own) if inputs.causal else 0
        if seq_len and blind < query_len:
            yield Sequence(index, token + blind, own[blind:], key, seq_len, cached_lens[index])


def _fits(inputs: AttentionInputs, sequences: list[Sequence], max_elements: int, spare: int) -> bool:
    """Whether padding `sequences` to a common size wastes little and keeps temporaries within max_elements."""
    if len({s.cached_len for s in sequences}) > 1 or not all(isinstance(s.positions, range) for s in sequences):
        return False
    num_q_heads, head_size = inputs.q.shape[1:]
    num_kv_heads, head_size_v = inputs.v.shape[1:]

    def work(num_rows: int, num_keys: int) -> int:
        return num_keys * (num_q_heads * num_rows + num_kv_heads * (head_size + head_size_v))

    rows, keys = max(s.num_rows for s in sequences), max(s.seq_len for s in sequences)
    per_sequence = (
        num_q_heads * rows * max(keys, head_size, head_size_v),
        num_kv_heads * keys * max(head_size, head_size_v),
    )
    if len(sequences) * max(per_sequence) > max_elements or (inputs.causal and rows > CAUSAL_TILE_ROWS):
        return False
    return len(sequences) * work(rows, keys) <= spare + sum(work(s.num_rows, s.seq_len) for s in sequences)


def _batch(sequences: list[Sequence], device: torch.device) -> Batch:
    num_rows, num_keys = max(s.num_rows for s in sequences), max(s.seq_len for s in sequences)
    token_index = key_index = real_rows = None
    if len(sequences) > 1:
        facts = torch.tensor([(s.token, s.num_rows, s.key, s.seq_len) for s in sequences])[:, :, None]
        row = torch.arange(num_rows)  # [num_rows]
        tokens = facts[:, 0] + torch.minimum(row, facts[:, 1] - 1)
        key_index = facts[:, 2] + torch.minimum(torch.arange(num_keys), facts[:, 3] - 1)
        places = (row < facts[:, 1]).flatten().nonzero()[:, 0]
        real_rows = torch.stack((tokens.flatten()[places], places)).to(device)
        token_index, key_index = tokens.to(device), key_index.to(device)
    return Batch(tuple(sequences), num_rows, num_keys, sequences[0].cached_len, token_index, key_index, real_rows)
