"""The hull: ranges agree with a plain loop, honest kernels stay inside, weights that do not sum to one are seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.kernel.numerics import NumericsProfile
from harness.oracle.hull import attended_range, judge_hull
from references.naive import sees
from tests.oracle.cases import FEATURES, make_case
from tests.oracle.emulated_kernel import Schedule, run_emulated

PROFILES = {
    "same": NumericsProfile(),
    "fp8 P": NumericsProfile(p_dtype="fp8_e4m3", p_scale=256.0, mma="mma_sync"),
    "fp8 P, scale 1": NumericsProfile(p_dtype="fp8_e4m3", mma="mma_sync"),
    "sum after cast": NumericsProfile(sum_after_cast=True),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_ranges_agree_with_a_plain_loop(feature: str) -> None:
    inputs = make_case("normal", "fp16", size=4, **dict(FEATURES[feature]))
    low, high = attended_range(inputs)
    token = first_key = 0
    for query_len, seq_len in zip(inputs.query_lens, inputs.seq_lens, strict=True):
        for i in range(query_len):
            seen = [j for j in range(seq_len) if sees(inputs, seq_len - query_len + i, j)]
            values = inputs.v[[first_key + j for j in seen]]  # [seen, heads, dv]
            if inputs.sinks is not None or not seen:
                values = torch.cat((values, torch.zeros_like(inputs.v[:1])))
            torch.testing.assert_close(low[token], values.amin(0), rtol=0, atol=0)
            torch.testing.assert_close(high[token], values.amax(0), rtol=0, atol=0)
            token += 1
        first_key += seq_len


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("law", ["normal", "outliers", "structured"])
def test_honest_outputs_lie_inside(law: str, profile: str, q_dtype: str) -> None:
    for seed, feature in enumerate(FEATURES):
        inputs = make_case(law, q_dtype, seed=seed, **dict(FEATURES[feature]))
        out, _ = run_emulated(inputs, PROFILES[profile], q_dtype, Schedule(splits=seed % 3 + 1))
        assert judge_hull(inputs, out, PROFILES[profile], q_dtype).num_outside == 0


def test_an_8_bit_output_that_saturates_lies_inside() -> None:
    profile = NumericsProfile(out_dtype="fp8_e4m3", out_scale=2.0**-10)  # largest value 0.4375
    inputs = make_case("normal", "bf16", lengths=((4,), (64,)))
    inputs = replace(inputs, v=1 + 0.01 * inputs.v)
    out, _ = run_emulated(inputs, profile, "bf16")
    assert bool((out.float() == 448).all())
    assert judge_hull(inputs, out.float() * profile.out_scale, profile, "bf16").num_outside == 0
    assert judge_hull(inputs, out.float() * profile.out_scale * 0.9, profile, "bf16").num_outside == out.numel()


def test_values_outside_are_counted_and_the_worst_is_named() -> None:
    inputs = make_case("normal", "bf16", lengths=((4, 2), (9, 20)))
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    out[4, 3, 7], out[5, 1, 2] = 40.0, 6.0
    found = judge_hull(inputs, out, NumericsProfile(), "bf16")
    assert (found.num_outside, found.token, found.head, found.dim, found.got) == (2, 4, 3, 7, 40.0)
    assert found.high < 4


def test_weights_that_sum_to_more_than_one_leave_the_hull() -> None:
    """A sum of weights that lacks part of the keys (a lost rescale) makes outputs of a V with a mean too large."""
    inputs = make_case("normal", "bf16", lengths=((4,), (64,)))
    inputs = replace(inputs, v=1 + 0.01 * inputs.v)
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    assert judge_hull(inputs, out, NumericsProfile(), "bf16").num_outside == 0
    assert judge_hull(inputs, out.float() * 1.1, NumericsProfile(), "bf16").num_outside > out.numel() // 2


def test_a_sink_lets_outputs_shrink_towards_zero() -> None:
    inputs = make_case("normal", "bf16", lengths=((4,), (64,)), sinks=True)
    inputs = replace(inputs, v=1 + 0.01 * inputs.v)
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    assert judge_hull(inputs, out, NumericsProfile(), "bf16").num_outside == 0
    assert judge_hull(replace(inputs, sinks=None), out, NumericsProfile(), "bf16").num_outside > out.numel() // 2


def test_not_a_number_is_left_to_others_and_empty_outputs_pass() -> None:
    inputs = make_case("normal", "bf16", lengths=((4,), (9,)))
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    assert judge_hull(inputs, torch.full_like(out, float("nan")), NumericsProfile(), "bf16").num_outside == 0
    assert judge_hull(inputs, out[:0], NumericsProfile(), "bf16").num_elements == 0
