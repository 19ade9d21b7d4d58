"""Repeated keys are counted per sequence and kv head, whatever the values and head size."""

from __future__ import annotations

import pytest
import torch

from references.repeats import key_repeats


@pytest.mark.parametrize("head_size", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_what_a_sort_of_whole_keys_counts(head_size: int, dtype: torch.dtype) -> None:
    """Values on a coarse grid, so that short keys repeat by chance."""
    lens = (700, 1, 0, 90)
    k = (torch.randn(sum(lens), 3, head_size, generator=torch.Generator().manual_seed(head_size)) * 2).round().to(dtype)
    found = key_repeats(k, lens)
    start = 0
    for seq, length in enumerate(lens):
        for head in range(3):
            own = k[start : start + length, head]
            want = int(torch.unique(own + 0.0, dim=0, return_counts=True)[1].max()) if length else 0
            assert int(found[seq, head]) == want
        start += length


def test_sequences_are_apart_and_minus_zero_is_zero() -> None:
    k = torch.randn(10, 1, 8, generator=torch.Generator().manual_seed(0))
    k[7] = k[2]  # in another sequence
    assert key_repeats(k, (5, 5)).tolist() == [[1], [1]]
    k[0], k[3] = 0.0, -0.0
    assert key_repeats(k, (5, 5)).tolist() == [[2], [1]]
    assert key_repeats(k[:0], (0,)).tolist() == [[0]]
