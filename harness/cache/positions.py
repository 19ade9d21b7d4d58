"""Sequence and position of every packed key.

Invariant: keys are packed sequence after sequence over positions [0, seq_len), as in harness.problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.case import Rows


@dataclass(frozen=True)
class KeyPositions:
    seq: torch.Tensor  # [num_keys] int64
    pos: torch.Tensor  # [num_keys] int64

    def below(self, lens: Sequence[int]) -> torch.Tensor:
        """bool [num_keys]: whether a key is among the first lens[seq] of its sequence."""
        return self.pos < torch.tensor(tuple(lens), device=self.pos.device)[self.seq]


def key_positions(rows: Rows, device: torch.device | str) -> KeyPositions:
    lens = torch.tensor([max(s, 0) for s in rows.seq_lens], device=device)
    seq = torch.repeat_interleave(torch.arange(len(lens), device=device), lens)
    start = lens.cumsum(0) - lens
    return KeyPositions(seq, torch.arange(len(seq), device=device) - start[seq])


def new_token_keys(rows: Rows, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed key of every new token, int64 [num_tokens], and its position, int64 [num_tokens]; meaningless below 0."""
    query_lens = torch.tensor(rows.query_lens, device=device)
    context = torch.tensor(rows.context_lens, device=device)
    lens = (query_lens + context).clamp(min=0)
    seq = torch.repeat_interleave(torch.arange(len(query_lens), device=device), query_lens)
    first_token = query_lens.cumsum(0) - query_lens
    pos = context[seq] + torch.arange(len(seq), device=device) - first_token[seq]
    return (lens.cumsum(0) - lens)[seq] + pos, pos
