"""Roundings of the kernel inside the reference: other queries for cached keys, weights folded into P, P per key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from references.attention import AttentionInputs, attend
from references.naive import naive_attention
from references.rows import attention_rows
from tests.references.test_attention import QUANTITIES, ROUNDINGS, assert_equal, make_inputs

ROUNDING = replace(ROUNDINGS["fp16"], cached=ROUNDINGS["fp8_e4m3"], row_sums=True)


def emulated_inputs(**features: Any) -> AttentionInputs:
    """Weights folded into P over three orders of magnitude; peaked logits, so that keys are flushed."""
    inputs = make_inputs((3, 1, 4, 2, 1), (20, 16, 4, 18, 1), softmax_scale=2.5, **features)
    g = torch.Generator().manual_seed(7)
    scale = torch.exp(3 * torch.randn(inputs.v.shape[:2], generator=g, dtype=torch.float64))
    q_cached = inputs.q.double() * 1.01 + 0.01
    return replace(inputs, q_cached=q_cached, cached_lens=(17, 16, 0, 9, 0), weight_scale=scale)


@pytest.mark.parametrize("feature", [{}, {"sliding_window": 6, "sinks": True}, {"causal": False}], ids=str)
@pytest.mark.parametrize("max_elements", [1, 100, 1 << 25])
def test_agrees_with_the_naive_implementation(feature: dict[str, Any], max_elements: int) -> None:
    inputs = emulated_inputs(**dict(feature))
    got, want = attend(inputs, ROUNDING, max_elements=max_elements), naive_attention(inputs, ROUNDING)
    for name in QUANTITIES:
        assert_equal(name, getattr(got, name), getattr(want, name))
    assert bool((got.logit_bound >= want.largest_logit - 1e-12).all())
    ones = attend(replace(inputs, v=torch.ones_like(inputs.v[..., :1])), ROUNDING)
    for name in ("cast_square", "cast_sum", "flush_sum"):
        assert_equal(name, getattr(got, f"row_{name}"), getattr(ones, name)[..., 0])


@pytest.mark.parametrize("left_out", ["q_cached", "weight_scale", "cached_rounding", "cached_lens"])
def test_the_comparison_sees_an_emulation_left_out(left_out: str) -> None:
    inputs = emulated_inputs()
    want = naive_attention(inputs, ROUNDING)
    wrong, wrong_rounding = inputs, ROUNDING
    if left_out == "cached_rounding":
        wrong_rounding = replace(ROUNDING, cached=None)
    elif left_out == "cached_lens":
        wrong = replace(inputs, cached_lens=(16, 16, 0, 9, 0))
    else:
        wrong = replace(inputs, **{left_out: None})
    got = attend(wrong, wrong_rounding)
    assert max(float((getattr(got, name) - getattr(want, name)).abs().max()) for name in QUANTITIES) > 1e-6


def test_chosen_rows_meet_the_same_queries() -> None:
    inputs = emulated_inputs(sliding_window=10)
    reference = attend(inputs, ROUNDING)
    rows = attention_rows(inputs, [3, 0], [[0, 1], [1]])
    real = rows.real.repeat_interleave(rows.group, 1)[:, None, :, None]  # [num_seqs, 1, R * group, 1]
    assert_equal("out", rows.out * real, rows.pick(reference.out) * real)
    assert bool((rows.raw.abs().amax(-1) <= rows.pick(reference.logit_bound[..., None])[..., 0] + 1e-12).all())
    without = attention_rows(replace(inputs, q_cached=None), [3, 0], [[0, 1], [1]])
    assert float(((without.out - rows.out) * real).abs().max()) > 1e-6
