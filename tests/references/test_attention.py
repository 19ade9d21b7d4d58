"""The float64 reference against a second implementation, against identities, and against its own memory bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from references.attention import AttentionInputs, Rounding, attend
from references.naive import naive_attention

ROUNDINGS = {
    "fp32": Rounding(2.0**-24),
    "bf16": Rounding(2.0**-8),
    "fp16": Rounding(2.0**-11, 2.0**-25),
    "fp8_e4m3": Rounding(2.0**-4, 2.0**-10, row_sums=True),
}
LENGTHS = (  # (query_lens, seq_lens)
    ((3, 1, 5, 1, 2), (7, 6, 5, 1, 12)),  # chunked prefill, decode, prefill, first token
    ((4, 1, 2, 3), (2, 0, 5, 0)),  # rows before the first key, empty sequences
)


def make_inputs(
    query_lens: tuple[int, ...] = (3, 1, 5),
    seq_lens: tuple[int, ...] = (7, 6, 5),
    kv_heads: int = 2,
    group: int = 3,
    size: int = 8,
    size_v: int = 5,
    seed: int = 0,
    alibi: bool = False,
    sinks: bool = False,
    **features: Any,
) -> AttentionInputs:
    g = torch.Generator().manual_seed(seed)
    heads = kv_heads * group

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return AttentionInputs(
        q=2 * normal(sum(query_lens), heads, size).to(torch.float16),
        k=normal(sum(seq_lens), kv_heads, size).float(),
        v=normal(sum(seq_lens), kv_heads, size_v),
        query_lens=query_lens,
        seq_lens=seq_lens,
        softmax_scale=features.pop("softmax_scale", size**-0.5),
        alibi_slopes=normal(heads).abs().float() if alibi else None,
        sinks=normal(heads).float() if sinks else None,
        **features,
    )


def features() -> Iterator[dict[str, Any]]:
    for causal in (True, False):
        for window in (None, 1, 3):
            yield {"causal": causal, "sliding_window": window}
            yield {"causal": causal, "sliding_window": window, "sinks": True, "alibi": True, "logits_soft_cap": 1.5}
    yield {"sliding_window": 2, "sink_tokens": 1}
    yield {"sliding_window": 1, "sink_tokens": 3, "sinks": True, "alibi": True}
    yield {"sliding_window": 1, "sink_tokens": 2, "causal": False}
    yield {"alibi": True}
    yield {"sinks": True}
    yield {"logits_soft_cap": 0.7}


def assert_equal(name: str, got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-13, msg=lambda text: f"{name}: {text}")


MOMENTS = ("abs_pv", "cast_square", "cast_sum", "flush_sum")
EXACT = ("out", "lse", "num_visible", "row_mass", "row_square", "peak")
QUANTITIES = (*EXACT, *MOMENTS)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["usual", "empty"])
@pytest.mark.parametrize("feature", list(features()), ids=str)
@pytest.mark.parametrize("max_elements", [1, 60, 1 << 25])
def test_agrees_with_the_naive_implementation(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], feature: dict[str, Any], max_elements: int
) -> None:
    inputs = make_inputs(*lengths, **dict(feature))
    rounding = ROUNDINGS["fp8_e4m3"]
    got, want = attend(inputs, rounding, max_elements=max_elements), naive_attention(inputs, rounding)
    for name in QUANTITIES:
        assert_equal(name, getattr(got, name), getattr(want, name))
    assert bool((got.logit_bound >= want.largest_logit - 1e-12).all())
    assert bool((got.largest_logit >= want.largest_logit - 1e-12).all())
    assert bool((got.largest_logit <= got.logit_bound + 1e-12).all())
    assert bool((got.offset >= want.offset - 1e-12).all())
    assert float(got.offset.mean()) <= 2.5 * float(want.offset.mean()) + 1e-12


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS.keys())
def test_moments_agree_for_every_rounding(rounding: Rounding) -> None:
    inputs = make_inputs((6, 1), (40, 30), softmax_scale=4.0)  # peaked: keys in the flush zone of fp16 and fp8
    got, want = attend(inputs, rounding), naive_attention(inputs, rounding)
    for name in QUANTITIES:
        assert_equal(name, getattr(got, name), getattr(want, name))
    assert bool((got.flush_sum > 0).any()) == (rounding.half_subnormal > 0)


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS.keys())
def test_row_sums_are_the_moments_of_a_value_of_one(rounding: Rounding) -> None:
    inputs = make_inputs((6, 1), (40, 30), softmax_scale=1.5)
    ones = replace(inputs, v=torch.ones_like(inputs.v[..., :1]))
    got = attend(ones, replace(rounding, row_sums=True))
    for row, element in (
        ("row_cast_square", "cast_square"),
        ("row_cast_sum", "cast_sum"),
        ("row_flush_sum", "flush_sum"),
    ):
        assert_equal(row, getattr(got, row), getattr(got, element)[..., 0])


@pytest.mark.parametrize("fault", ["causal", "window", "sink_tokens", "scale", "gqa", "cap"])
def test_the_comparison_sees_a_wrong_reference(fault: str) -> None:
    """The agreement above is not vacuous: a reference with one fault differs by far more than 1e-12."""
    inputs = make_inputs(sliding_window=3, sink_tokens=1, logits_soft_cap=2.0)
    wrong = {
        "causal": replace(inputs, causal=False),
        "window": replace(inputs, sliding_window=4),
        "sink_tokens": replace(inputs, sink_tokens=2),
        "scale": replace(inputs, softmax_scale=inputs.softmax_scale * 1.001),
        "gqa": replace(inputs, k=inputs.k.flip(1)),
        "cap": replace(inputs, logits_soft_cap=None),
    }[fault]
    want = naive_attention(inputs, ROUNDINGS["fp32"]).out
    assert float((attend(wrong, ROUNDINGS["fp32"]).out - want).abs().max()) > 1e-6


# Identities: results known without any implementation.


def test_constant_value_is_returned() -> None:
    inputs = make_inputs()
    got = attend(replace(inputs, v=torch.full_like(inputs.v, 3.25)), ROUNDINGS["bf16"])
    assert_equal("out", got.out, torch.full_like(got.out, 3.25))


def test_one_key_is_copied() -> None:
    inputs = make_inputs((1, 1), (1, 1))
    got = attend(inputs, ROUNDINGS["bf16"])
    assert torch.equal(got.out, inputs.v.repeat_interleave(3, dim=1))
    scores = (inputs.q.double() * inputs.k.double().repeat_interleave(3, dim=1)).sum(-1) * inputs.softmax_scale
    assert_equal("lse", got.lse, scores)


def test_keys_given_twice_add_ln_2() -> None:
    inputs = make_inputs((2, 1), (9, 4), causal=False)
    once = attend(inputs, ROUNDINGS["bf16"])
    k = torch.cat([piece for piece in torch.split(inputs.k, list(inputs.seq_lens)) for _ in range(2)])
    v = torch.cat([piece for piece in torch.split(inputs.v, list(inputs.seq_lens)) for _ in range(2)])
    twice = attend(replace(inputs, k=k, v=v, seq_lens=(18, 8)), ROUNDINGS["bf16"])
    assert_equal("out", twice.out, once.out)
    assert_equal("lse", twice.lse, once.lse + math.log(2))


def test_order_of_keys_does_not_matter() -> None:
    inputs = make_inputs((1,), (30,), causal=False)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = replace(inputs, k=inputs.k[order], v=inputs.v[order])
    assert_equal("out", attend(shuffled, ROUNDINGS["bf16"]).out, attend(inputs, ROUNDINGS["bf16"]).out)


def test_a_window_of_the_sequence_is_no_window() -> None:
    inputs = make_inputs((5, 1), (20, 8))
    windowed = attend(replace(inputs, sliding_window=20), ROUNDINGS["bf16"])
    assert torch.equal(windowed.out, attend(inputs, ROUNDINGS["bf16"]).out)


def test_large_logits_do_not_overflow() -> None:
    inputs = make_inputs(softmax_scale=1e4)
    got = attend(inputs, ROUNDINGS["fp16"])
    assert bool(torch.isfinite(got.out).all())
    assert bool(torch.isfinite(got.lse).all())


def test_inputs_are_left_alone() -> None:
    inputs = make_inputs(alibi=True, sinks=True, sliding_window=3, logits_soft_cap=2.0)
    inputs = replace(inputs, q=inputs.q.double(), k=inputs.k.double())
    copies = [inputs.q.clone(), inputs.k.clone(), inputs.v.clone()]
    attend(inputs, ROUNDINGS["fp16"])
    assert all(torch.equal(a, b) for a, b in zip(copies, (inputs.q, inputs.k, inputs.v), strict=True))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"query_lens": (3, 1)}, "query_lens and seq_lens"),
        ({"query_lens": (3, 1, 6)}, "q tokens"),
        ({"seq_lens": (7, 6, 6)}, "k: expected"),
        ({"v": torch.zeros(18, 4, 5)}, "k: expected"),
        ({"cached_lens": (1, 2)}, "cached_lens"),
        ({"q_cached": torch.zeros(9, 6, 8)}, "q_cached needs cached_lens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        replace(make_inputs(), **change)


def test_bounds_on_the_products_hold_for_every_key() -> None:
    """Norms by Cauchy-Schwarz, over keys of the own sequence and kv head only; repeats are counted there as well."""
    inputs = make_inputs((3, 1), (20, 9), causal=False)
    k = inputs.k.clone()
    k[22:26, 1] = k[21, 1]  # one key of the second sequence, 5 times over in one kv head
    k[:, 0] *= 1e-3
    k[0, 0] = 100  # of the first sequence alone
    got = attend(replace(inputs, k=k), ROUNDINGS["bf16"])
    for rows, keys in ((slice(0, 3), slice(0, 20)), (slice(3, 4), slice(20, 29))):
        seen = k[keys].double().repeat_interleave(3, dim=1)  # [keys, num_q_heads, d]
        terms = inputs.q[rows, None].double() * seen * inputs.softmax_scale  # [rows, keys, num_q_heads, d]
        largest_square = terms.square().sum(-1).sqrt().amax(1)
        assert bool((got.dot_bound[rows] >= largest_square - 1e-12).all())
        assert bool((got.dot_bound[rows] <= got.logit_bound[rows] + 1e-12).all())
        assert_equal("largest_logit", got.largest_logit[rows], terms.sum(-1).abs().amax(1))
    assert float(got.logit_bound[:3, 0].min()) > 30 * float(got.logit_bound[3, 0])
    assert got.key_repeats[3].tolist() == [1, 1, 1, 5, 5, 5]
    assert bool((got.key_repeats[:3] == 1).all())


@pytest.mark.parametrize("feature", list(features()), ids=str)
def test_a_sample_of_rows_has_the_result_of_all_rows(feature: dict[str, Any]) -> None:
    inputs = make_inputs((6, 1, 5, 2), (9, 6, 3, 0), **dict(feature))
    picked = ((0, 2, 5), (0,), (0, 1, 4), (1,))  # rows of each sequence; the third has two before its first key
    first = (0, 6, 7, 12)
    positions = tuple(
        tuple(row + seq_len - query_len for row in rows)
        for rows, query_len, seq_len in zip(picked, inputs.query_lens, inputs.seq_lens, strict=True)
    )
    tokens = [start + row for start, rows in zip(first, picked, strict=True) for row in rows]
    sample = replace(inputs, q=inputs.q[tokens], query_lens=tuple(map(len, picked)))
    rounding = ROUNDINGS["fp8_e4m3"]
    whole, got = attend(inputs, rounding), attend(sample, rounding, positions=positions)
    for name in (*QUANTITIES, "logit_bound", "dot_bound", "max_abs_v", "key_repeats"):
        assert_equal(name, getattr(got, name), getattr(whole, name)[tokens])
    wrong = attend(sample, rounding)  # taken for the last rows of each sequence
    assert not torch.equal(wrong.num_visible, got.num_visible) or not inputs.causal  # else every row sees all
