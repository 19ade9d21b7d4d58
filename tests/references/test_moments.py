"""Moments in narrow types, and sequences computed together: bounds that hold, results that do not move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from references.attention import Rounding, attend
from references.batches import batches
from tests.references.test_attention import EXACT, MOMENTS, ROUNDINGS, assert_equal, make_inputs


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS.keys())
@pytest.mark.parametrize("feature", [{}, {"alibi": True, "sinks": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_moments_are_upper_bounds_and_close(
    dtype: torch.dtype, feature: dict[str, Any], rounding: Rounding
) -> None:
    """Sums over unflushed keys may lose keys on the threshold, but only to the flushed ones, which count in full."""
    for scale in (0.3, 3.0):
        inputs = make_inputs((40, 1, 3), (300, 500, 3), softmax_scale=scale, **dict(feature))
        exact, got = attend(inputs, rounding), attend(inputs, rounding, moment_dtype=dtype)
        for name in EXACT:
            assert torch.equal(getattr(got, name), getattr(exact, name))
        for name in ("abs_pv", "flush_sum"):
            assert bool((getattr(got, name) >= getattr(exact, name)).all()), name
        assert bool((got.cast_sum + got.flush_sum >= exact.cast_sum + exact.flush_sum).all())
        spread, exact_spread = got.cast_square.sqrt(), exact.cast_square.sqrt()
        assert bool((spread + got.flush_sum >= exact_spread + exact.flush_sum).all())
        for name in MOMENTS:
            got_sum, exact_sum = float(getattr(got, name).sum()), float(getattr(exact, name).sum())
            assert got_sum <= 1.05 * exact_sum + 1e-30, name


def test_a_sink_above_all_logits_leaves_no_moment_undefined() -> None:
    """Nor zero: p is tiny beside the sink, and so is all that follows from it, in proportion."""
    inputs = make_inputs((2, 1), (30, 40), sinks=True)
    for height in (30.0, 300.0, 3000.0):
        high = replace(inputs, sinks=torch.full((6,), height))
        for dtype in (torch.float64, torch.bfloat16):
            got = attend(high, ROUNDINGS["fp16"], moment_dtype=dtype)
            assert all(bool(x.isfinite().all()) for x in vars(got).values() if isinstance(x, torch.Tensor))
            assert bool((got.abs_pv >= got.out.abs() * (1 - 1e-12)).all())
            assert bool((got.flush_sum >= got.abs_pv * 0.9).all())


def test_the_bound_needs_the_inflation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("references.moments._inflation", lambda dtype, num_terms: (1.0, 1.0))
    inputs = make_inputs((40, 1, 3), (300, 500, 3))
    exact, got = attend(inputs, ROUNDINGS["bf16"]), attend(inputs, ROUNDINGS["bf16"], moment_dtype=torch.bfloat16)
    assert bool((got.abs_pv < exact.abs_pv).any())


@pytest.mark.parametrize("spare", [0, 1 << 24])
@pytest.mark.parametrize("causal", [True, False])
def test_sequences_computed_together_or_alone_agree(causal: bool, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is padded to a common size: no row of another sequence and no padded key gets in."""
    monkeypatch.setattr("references.batches.SPARE_ON_CPU", spare)
    monkeypatch.setattr("references.batches.LARGEST_ON_CPU", 1 << 25)
    query_lens, seq_lens = (1, 5, 1, 9, 1, 4, 1, 3), (1, 5, 30, 12, 200, 2, 0, 200)
    inputs = make_inputs(query_lens, seq_lens, causal=causal, sinks=True, alibi=True, sliding_window=21)
    together = list(batches(inputs, 1 << 25))
    assert len(together) == 1 if spare else len(together) > 1
    got = attend(inputs, ROUNDINGS["fp16"])
    token = key = 0
    for query_len, seq_len in zip(query_lens, seq_lens, strict=True):
        rows, keys = slice(token, token + query_len), slice(key, key + seq_len)
        alone = replace(
            inputs, q=inputs.q[rows], k=inputs.k[keys], v=inputs.v[keys], query_lens=(query_len,), seq_lens=(seq_len,)
        )
        want = attend(alone, ROUNDINGS["fp16"])
        for name, value in vars(want).items():
            if name == "largest_logit":  # hidden keys may be included
                assert bool((got.largest_logit[rows] >= value - 1e-12).all())
            elif isinstance(value, torch.Tensor):
                # the offset is a small difference of large squares of positions
                assert_equal(name, getattr(got, name)[rows], value, rtol=1e-9 if name == "offset" else 1e-12)
        token, key = rows.stop, keys.stop
