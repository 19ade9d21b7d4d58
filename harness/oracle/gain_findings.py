"""From statistics to findings: which of them exceed the limit, strongest place first, and the least that would.

Invariant: a statistic is flagged only above Z_LIMIT standard deviations of honest noise plus every bias that noise may
have; the same page seen by several parts of a batch is one statistic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.oracle.gains import K_DESCALE, MAX_GAINS, SPLIT_AVERAGE, V_DESCALE, Gain, GainFindings

Z_LIMIT = 7.0
FALSE_ALARM = math.erfc(Z_LIMIT / math.sqrt(2))  # probability per statistic, 2.6e-12

Pages = Sequence[Sequence[int]]  # physical pages of each sequence


@dataclass(frozen=True)
class Statistics:
    """Sums over the rows of one batch, float64, on the CPU.

    The quantities are N, D, variance, bias, and the squared error that a signature explains with all rows alike, which
    tells kinds of one place apart.
    """

    sequences: tuple[int, ...]
    pages: torch.Tensor  # [quantities, num_seqs, num_kv_heads, 2 kinds (K, V), pages + 1 (all pages)]
    splits: torch.Tensor  # [quantities, num_seqs, num_kv_heads, ways to cut into splits]
    num_rows: int  # that can have a factor of their own
    worst_row: Gain  # the one whose factor stands out most


def page_table(parts: Sequence[Statistics], pages_of: Pages) -> tuple[list[int], torch.Tensor]:
    """Sums over rows: [5 (product, energy, variance, bias, explained), num_seqs + 1, num_kv_heads, 2, most pages + 1].

    The last sequence stands for the whole batch, the last page for all pages.
    """
    merged: dict[int, torch.Tensor] = {}
    for part in parts:
        for i, sequence in enumerate(part.sequences):
            sums = part.pages[:, i]
            pages = len(pages_of[sequence])
            sums = torch.cat((sums[..., :pages], sums[..., -1:]), dim=-1)  # [5, num_kv_heads, 2, pages + 1]
            merged[sequence] = merged[sequence] + sums if sequence in merged else sums
    if not merged:
        return [], torch.zeros(5, 1, 1, 2, 1, dtype=torch.float64)
    width = max(sums.shape[-1] for sums in merged.values())
    shape = (5, len(merged) + 1, *next(iter(merged.values())).shape[1:3], width)
    table = torch.zeros(shape, dtype=torch.float64)
    for i, sums in enumerate(merged.values()):
        table[:, i, ..., : sums.shape[-1] - 1] = sums[..., :-1]
        table[:, i, ..., -1] = sums[..., -1]
    table[:, -1, ..., -1] = table[:, :-1, ..., -1].sum(1)  # the whole batch
    return list(merged), table


def least_detectable(table: torch.Tensor) -> torch.Tensor:
    """r_min [num_seqs + 1, num_kv_heads, 2, most pages + 1]; inf where nothing is attended to."""
    _, energy, variance, bias, _ = table
    return torch.where(energy > 0, (Z_LIMIT * variance.sqrt() + bias) / energy.clamp(min=1e-300), math.inf)


def findings(parts: Sequence[Statistics], pages_of: Pages) -> GainFindings:
    """All statistics judged: those of pages, of splits, and of single rows."""
    sequences, table = page_table(parts, pages_of)
    product, energy, variance, bias, explained = table  # [num_seqs + 1, num_kv_heads, 2, width]
    width, attended = table.shape[-1], energy > 0
    z = z_scores(product, energy, variance, bias)
    rank = z.abs().amax((2, 3), keepdim=True)  # of each sequence and KV head: first where, then what
    above = (z.abs() > Z_LIMIT).nonzero().tolist()
    above.sort(key=lambda at: (-float(rank[at[0], at[1]]), -float(explained[tuple(at)])))
    found = []
    for i, head, kind, slot in above:
        sequence = [*sequences, None][i]
        in_page = sequence is not None and slot < width - 1
        found.append(
            Gain(
                kind=(K_DESCALE, V_DESCALE)[kind],
                estimate=float(product[i, head, kind, slot] / energy[i, head, kind, slot]),
                z=float(z[i, head, kind, slot]),
                kv_head=head,
                sequence=sequence,
                slot=slot if in_page else None,
                page=pages_of[sequence][slot] if in_page else None,
            )
        )
    others, num_others = _others(parts)
    largest = max([float(z.abs().max()), *(abs(gain.z) for gain in others)])
    for gain in (gain for gain in others if abs(gain.z) > Z_LIMIT):
        strongest = not found or abs(gain.z) > max(abs(other.z) for other in found)
        found.insert(0 if strongest else len(found), gain)
    per_page = least_detectable(table)[:-1, ..., :-1]  # [num_seqs, num_kv_heads, 2, width - 1]
    return GainFindings(
        z=largest,
        num_statistics=int(attended.sum()) + num_others,
        gains=tuple(found[:MAX_GAINS]),
        num_gains=len(found),
        least_k=_typical(per_page[:, :, 0]),
        least_v=_typical(per_page[:, :, 1]),
    )


def _others(parts: Sequence[Statistics]) -> tuple[list[Gain], int]:
    """The row that stands out most, and every way to average splits; and of how many statistics these are."""
    merged: dict[int, torch.Tensor] = {}  # sequence -> [quantities, num_kv_heads, ways]
    for part in parts:
        for i, sequence in enumerate(part.sequences):
            merged[sequence] = merged[sequence] + part.splits[:, i] if sequence in merged else part.splits[:, i]
    gains = [max((part.worst_row for part in parts), key=lambda gain: abs(gain.z))] if parts else []
    count = sum(part.num_rows for part in parts)
    for sequence, sums in merged.items():
        product, energy, variance, bias, _ = sums
        z, there = z_scores(product, energy, variance, bias), energy > 0
        count += int(there.sum())
        for head, way in there.nonzero().tolist():
            estimate = float(product[head, way] / energy[head, way])
            gains.append(Gain(SPLIT_AVERAGE, estimate, float(z[head, way]), kv_head=head, sequence=sequence))
    return gains, count


def z_scores(product: torch.Tensor, energy: torch.Tensor, variance: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Standard deviations beyond the bias, 0 where there is nothing to look at; same shape."""
    size = (product.abs() - bias).clamp(min=0) / variance.clamp(min=1e-300).sqrt()
    return torch.where(energy > 0, size * product.sign(), 0.0)


def _typical(least: torch.Tensor) -> float:
    """Median over the pages that are attended to; inf where there are none."""
    finite = least[least.isfinite()]
    return float(finite.median()) if finite.numel() else math.inf
