"""Guarded outputs and fingerprints see every stray write, and stay quiet about honest ones."""

from __future__ import annotations

import pytest
import torch

from harness.dtypes import ELEMENT_TYPES
from harness.kernel.guarded import MARGIN, GuardedOutput, fingerprint, guarded_output, strided_copy

CPU = torch.device("cpu")


def output(dtype: torch.dtype = torch.float16, strided: bool = True) -> GuardedOutput:
    return guarded_output("out", (3, 2, 5), dtype, CPU, strided)


@pytest.mark.parametrize("name", [name for name, kind in ELEMENT_TYPES.items() if kind.torch.is_floating_point])
@pytest.mark.parametrize("strided", [False, True])
def test_output_starts_as_nan_and_an_honest_write_leaves_the_red_zones_alone(name: str, strided: bool) -> None:
    guarded = output(ELEMENT_TYPES[name].torch, strided)
    assert torch.isnan(guarded.tensor.float()).all()
    assert guarded.unwritten().all()
    guarded.tensor.copy_(torch.zeros(3, 2, 5).to(guarded.tensor.dtype))
    assert guarded.overrun() is None
    assert not guarded.unwritten().any()


@pytest.mark.parametrize(
    ("offset", "words"),
    [(MARGIN - 1, "before out"), (MARGIN + 5, "between the rows of out"), (MARGIN + 90, "behind or between")],
)
def test_one_element_outside_the_output_is_seen(offset: int, words: str) -> None:
    guarded = output()
    guarded.allocation.view(torch.float16)[offset] = 1.0
    overrun = guarded.overrun()
    assert overrun is not None
    assert words in overrun


def test_one_unwritten_element_is_seen() -> None:
    guarded = output()
    guarded.tensor[:, :, :4] = 0.0
    guarded.tensor[0, :, 4] = float("nan")  # a NaN that was computed is not the poison
    guarded.tensor.view(torch.int16)[1, :, 4] = -1  # nor is one that was read from a poisoned cache
    assert guarded.unwritten().nonzero().tolist() == [[2, 0, 4], [2, 1, 4]]


def test_fingerprint_sees_one_bit_exchanged_elements_and_gaps() -> None:
    tensor = strided_copy(torch.arange(30, dtype=torch.float16).view(3, 2, 5))
    assert not tensor.is_contiguous()
    before = fingerprint(tensor)
    assert fingerprint(tensor) == before
    for change in (
        lambda: tensor[0, 0, 0].add_(1),
        lambda: tensor[0, 0].copy_(tensor[0, 0].flip(0)),
        lambda: tensor.as_strided((1,), (1,), tensor.storage_offset() + 5).fill_(0),  # a gap between heads
    ):
        change()
        after = fingerprint(tensor)
        assert after != before
        before = after


def test_fingerprint_counts_a_tail_that_fills_no_word() -> None:
    tensor = torch.zeros(13, dtype=torch.uint8)
    seen = set()
    for i in range(13):
        changed = tensor.clone()
        changed[i] = 1
        seen.add(fingerprint(changed))
    assert len(seen) == 13
