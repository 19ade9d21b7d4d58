"""Split-KV: into how many keys a kernel may cut a sequence, and what an equal-weight merge of the parts would give.

Invariant: how a kernel cuts is not declared, so every usual way is a candidate. Parts without a visible key have no
say.
"""

from __future__ import annotations

import math

import torch

SPLIT_UNITS = (16, 32, 64, 128)  # keys per tile, in which kernels cut splits
MOST_SIZES = len(SPLIT_UNITS) + 1  # of the splits of one sequence: the page is a unit as well


def split_sizes(num_keys: int, num_splits: int, page_size: int) -> list[int]:
    """Numbers of keys that a split may have, ascending; empty where there is but one split."""
    if num_splits < 2:
        return []
    units = {*SPLIT_UNITS, page_size}
    sizes = {max(math.ceil(math.ceil(num_keys / unit) / num_splits), 1) * unit for unit in units}
    return sorted(size for size in sizes if size < num_keys)


def averaged(p: torch.Tensor, v: torch.Tensor, out: torch.Tensor, size: int) -> torch.Tensor:
    """What `out` [..., L, dv] = p v changes by if parts of `size` keys are averaged instead of weighted by their sums.

    p: [..., L, n], v: [..., n, dv]; same shape as `out`.
    """
    parts = -(-p.shape[-1] // size)
    pad = parts * size - p.shape[-1]
    padded = torch.nn.functional.pad(p, (0, pad))
    weights = padded.view(*p.shape[:-1], parts, size).transpose(-2, -3)  # [..., parts, L, size]
    values = torch.nn.functional.pad(v, (0, 0, 0, pad)).view(*v.shape[:-2], parts, size, v.shape[-1])
    mass = weights.sum(-1, keepdim=True)
    means = (weights @ values) / mass.clamp(min=1e-300)
    there = (mass > 0).sum(-3).clamp(min=1)  # [..., L, 1]
    change: torch.Tensor = means.sum(-3) / there - out
    return change
