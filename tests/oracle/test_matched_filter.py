"""The matched filter: silent on honest kernels, names page, KV head, kind and size of a gain, and knows its limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.kernel.numerics import NumericsProfile, PerKey
from harness.oracle import row_noise, sampling
from harness.oracle.gain_findings import FALSE_ALARM, Z_LIMIT
from harness.oracle.gains import K_DESCALE, ROW_GAIN, SPLIT_AVERAGE, V_DESCALE
from harness.oracle.matched_filter import PageFilter, find_gains, least_gains, least_of_pages
from harness.oracle.row_noise import by_gram, weighted_squares
from harness.oracle.sampling import sampled
from harness.oracle.splits import averaged
from harness.oracle.tolerance import rounding_of
from references.attention import AttentionInputs, attend
from references.rows import attention_rows
from tests.oracle.cases import FEATURES, judged, make_case, ratios
from tests.oracle.emulated_kernel import Schedule, run_emulated

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROFILES = {
    "same": NumericsProfile(),
    "fp32 P": NumericsProfile(p_dtype="fp32", mma="simt"),
    "fp8 P": NumericsProfile(p_dtype="fp8_e4m3", p_scale=256.0, mma="mma_sync"),
    "sum after cast": NumericsProfile(sum_after_cast=True),
    "fp16 partials": NumericsProfile(split_partial_dtype="fp16"),
    "fp8 output": NumericsProfile(out_dtype="fp8_e4m3", out_scale=0.01),
}
SMALL: dict[str, Any] = {"lengths": ((20, 1, 12, 3), (150, 130, 12, 1))}
FP8_P = PROFILES["fp8 P"]


def filter_of(inputs: AttentionInputs, profile: NumericsProfile, q_dtype: str, page_size: int = 16) -> PageFilter:
    """Sequence s has pages 100 s + slot."""
    pages = tuple(tuple(100 * s + i for i in range(-(-n // page_size))) for s, n in enumerate(inputs.seq_lens))
    return PageFilter(profile, q_dtype, page_size, pages, inputs.seq_lens)


def page_gain(inputs: AttentionInputs, which: str, gain: float, keys: slice, head: int) -> AttentionInputs:
    changed = getattr(inputs, which).clone()
    changed[keys, head] *= 1 + gain
    return replace(inputs, **{which: changed})


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("law", ["normal", "outliers"])
def test_honest_kernels_stay_below_the_limit(law: str, profile: str, q_dtype: str) -> None:
    """252 runs; with a limit of 7 the worst of them may be expected near 4."""
    declared = PROFILES[profile]
    for seed, feature in enumerate(FEATURES):
        inputs = make_case(law, q_dtype, seed=seed, **SMALL, **FEATURES[feature])
        schedule = Schedule(tile=32, reverse=bool(seed % 2), splits=seed % 3 + 1)
        out, _ = run_emulated(inputs, declared, q_dtype, schedule)
        found = find_gains(inputs, out.float() * declared.out_scale, filter_of(inputs, declared, q_dtype))
        assert found.num_statistics > 20
        assert found.z < 5
        assert not found.gains


def _smooth(inputs: AttentionInputs, spread: float) -> AttentionInputs:
    """Logits that are nearly equal: roundings repeat from key to key and from row to row."""
    return replace(inputs, q=inputs.q * spread)


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.03, 0.3, 10.0])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_data_that_is_not_generic_gives_no_false_alarm(spread: float, mean: float, q_dtype: str) -> None:
    """Near-uniform and near-needle softmax, values with a mean, values in +-1e-3 (subnormal outputs in fp16)."""
    for seed in range(2):
        inputs = _smooth(make_case("normal", q_dtype, seed=seed, group=4, **SMALL), spread)
        for size in (1.0, 1e-4):
            scaled = replace(inputs, v=(size * (inputs.v + mean)).to(inputs.q.dtype).float())
            out, _ = run_emulated(scaled, NumericsProfile(), q_dtype)
            assert find_gains(scaled, out, filter_of(scaled, NumericsProfile(), q_dtype)).z < Z_LIMIT


def test_one_key_beside_a_sink_is_not_looked_at() -> None:
    """Its output is p v, and V of eight bits has four mantissas: the dims of a row round alike, not on their own."""
    inputs = make_case("normal", "bf16", lengths=((64,), (64,)), group=4, size=128, sinks=True, causal=False)
    k = torch.zeros_like(inputs.k)
    k[30] = 8.0  # all but e^-20 of what the sink leaves
    coarse = inputs.v.to(torch.float8_e5m2).float()
    alone = replace(inputs, q=inputs.q * 0.1 + 0.3, k=k, v=coarse, sinks=torch.linspace(26.0, 28.0, 8))
    profile = PROFILES["fp32 P"]
    out, _ = run_emulated(alone, profile, "bf16")
    found = find_gains(alone, out, filter_of(alone, profile, "bf16"))
    assert (found.z, found.num_statistics) == (0.0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sink", [12.0, 16.0, 20.0])
def test_p_that_a_sink_makes_small_is_rounded_as_coarsely(sink: float, device: str) -> None:
    """A kernel that begins its maximum with the sink has P of float16 subnormal, or flushed to zero as a whole."""
    plain = make_case("normal", "fp16", lengths=((12,), (60,)), group=4)
    inputs = replace(plain, v=plain.v * 1024, sinks=torch.full((8,), sink))
    rows = attention_rows(inputs, [0], [range(12)])
    x = (rows.scores - sink).exp().masked_fill(~rows.visible, 0.0)  # [1, num_kv_heads, 12 * group, n]
    total = 1 + x.sum(-1, keepdim=True)
    wrong = (x.half().double() @ rows.v / total).half()[0]
    out = wrong.view(2, 12, 4, 64).transpose(0, 1).flatten(1, 2)
    q, k, v, sinks = (y.to(device) for y in (inputs.q, inputs.k, inputs.v, torch.full((8,), sink)))
    there = replace(inputs, q=q, k=k, v=v, sinks=sinks)
    assert find_gains(there, out.to(device), filter_of(there, NumericsProfile(), "fp16")).z < 5


def test_outputs_that_round_to_zero_give_no_false_alarm() -> None:
    """A sink leaves outputs of less than half the smallest float16: each error is the output, whatever its sign."""
    inputs = make_case("normal", "fp16", lengths=((12, 1), (60, 37)), group=4, size=128)
    logits = NumericsProfile(p_dtype="fp32", mma="simt")
    for sink in (14.0, 15.0, 16.0, 17.0, 18.0):
        tiny = replace(inputs, sinks=torch.full((8,), 5 + sink))
        out = attend(tiny, rounding_of(logits, "fp16")).out.half()
        assert find_gains(tiny, out, filter_of(tiny, logits, "fp16")).z < Z_LIMIT


def test_parts_of_a_sequence_are_cut_into_the_same_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_case("normal", "bf16", lengths=((64, 8, 1), (256, 40, 1000)), group=4)
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    filters = replace(filter_of(inputs, NumericsProfile(), "bf16"), num_splits=3)
    together = find_gains(inputs, out, filters)
    monkeypatch.setitem(sampling.ELEMENTS, inputs.q.device.type, 1 << 16)
    assert find_gains(inputs, out, filters).z == pytest.approx(together.z, rel=1e-2)


def test_rows_that_round_alike_are_counted_across_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same query in every row: one rounding error, 64 times, however the rows are parted."""
    inputs = make_case("normal", "bf16", lengths=((64,), (128,)), group=4, causal=False)
    inputs = replace(inputs, q=inputs.q[:1].expand(64, -1, -1).contiguous())
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    filters = filter_of(inputs, NumericsProfile(), "bf16")
    together = find_gains(inputs, out, filters)
    assert math.isfinite(together.least_v)
    monkeypatch.setitem(sampling.ELEMENTS, inputs.q.device.type, 1 << 16)
    assert len(list(sampling.batches(inputs, filters.page_size))) > 4
    apart = find_gains(inputs, out, filters)
    assert apart.least_v == pytest.approx(together.least_v, rel=1e-3)
    assert apart.z == pytest.approx(together.z, rel=1e-3)


def test_long_sequences_are_looked_at_in_fewer_rows() -> None:
    rows = [sampled(2048, 4, most) for most in (64, 16, 3)]
    assert [len(r) for r in rows] == [64, 16, 3]
    assert all((r[0], r[-1]) == (0, 2047) for r in rows)


@pytest.mark.parametrize("profile", [NumericsProfile(), FP8_P])
def test_splits_of_nearly_equal_weight_that_are_averaged(profile: NumericsProfile) -> None:
    """Random splits weigh about the same, so that averaging them changes little: no element need be off."""
    inputs = make_case("normal", "bf16", lengths=((16,), (1024,)), group=4)
    honest, _ = run_emulated(inputs, profile, "bf16")
    filters = replace(filter_of(inputs, profile, "bf16"), num_splits=2)
    assert find_gains(inputs, honest, filters).z < 5
    rows = attention_rows(inputs, [0], [range(16)])
    wrong = averaged(rows.p[0], rows.v[0], rows.out[0], 512)  # [num_kv_heads, 16 * group, head_size]
    by_token = wrong.unflatten(1, (16, 4)).transpose(0, 1).flatten(1, 2)
    out = (honest.double() + by_token).to(honest.dtype)
    found = find_gains(inputs, out, filters)
    assert (found.best.kind, found.best.sequence) == (SPLIT_AVERAGE, 0)  # type: ignore[union-attr]
    assert found.best.estimate == pytest.approx(1, rel=0.2)  # type: ignore[union-attr]
    assert find_gains(inputs, out, replace(filters, num_splits=1)).z < found.z


def test_a_row_with_a_factor_of_its_own() -> None:
    inputs = make_case("normal", "bf16", lengths=((1, 48), (64, 256)), group=4, size=128)
    honest, lse = run_emulated(inputs, FP8_P, "bf16")
    out = honest.clone()
    out[1 + 7, 4:] *= 1.08  # KV head 1 of the row at position 208 + 7
    assert ratios(judged(inputs, out, lse, FP8_P, "bf16"))["out"] < 1  # tier 1 does not see it
    best = find_gains(inputs, out, filter_of(inputs, FP8_P, "bf16")).best
    assert best is not None
    assert (best.kind, best.sequence, best.kv_head, best.position) == (ROW_GAIN, 1, 1, 215)
    assert best.estimate == pytest.approx(0.08, rel=0.1)


def test_the_limit_says_how_often_it_is_wrong() -> None:
    assert math.isclose(FALSE_ALARM, 2.56e-12, rel_tol=0.01)


@pytest.mark.parametrize("num_pages", [2, 32])
@pytest.mark.parametrize(
    ("which", "gain", "profile"),
    [
        ("k", 0.017, NumericsProfile()),
        ("k", 0.017, FP8_P),
        ("v", 0.017, NumericsProfile()),
        ("v", 0.05, FP8_P),
        ("k", 0.05, FP8_P),
    ],
)
def test_one_page_is_named(which: str, gain: float, profile: NumericsProfile, num_pages: int) -> None:
    inputs = make_case("normal", "bf16", lengths=((1, 64), (5, 1024)), group=4)
    page_size = 1024 // num_pages
    slot = num_pages // 2 - 1
    keys = slice(5 + slot * page_size, 5 + (slot + 1) * page_size)
    honest, _ = run_emulated(inputs, profile, "bf16")
    assert find_gains(inputs, honest, filter_of(inputs, profile, "bf16", page_size)).z < 5
    out, lse = run_emulated(page_gain(inputs, which, gain, keys, 1), profile, "bf16")
    found = find_gains(inputs, out, filter_of(inputs, profile, "bf16", page_size))
    best = found.best
    assert best is not None
    assert found.z > Z_LIMIT
    assert (best.kind, best.sequence, best.slot, best.page, best.kv_head) == (
        K_DESCALE if which == "k" else V_DESCALE, 1, slot, 100 + slot, 1,
    )  # fmt: skip
    assert best.estimate == pytest.approx(gain, rel=0.25)
    if num_pages == 32 and gain < 0.02 and profile is FP8_P:
        assert ratios(judged(inputs, out, lse, profile, "bf16"))["out"] < 1  # tier 1 does not see it


def test_a_gain_of_everything_is_one_statistic_of_the_whole_batch() -> None:
    inputs = make_case("normal", "bf16", **SMALL)
    out, _ = run_emulated(replace(inputs, softmax_scale=1.01 * inputs.softmax_scale), NumericsProfile(), "bf16")
    found = find_gains(inputs, out, filter_of(inputs, NumericsProfile(), "bf16"))
    whole = [gain for gain in found.gains if gain.sequence is None and gain.kind == K_DESCALE]
    assert {gain.kv_head for gain in whole} == {0, 1}
    assert all(gain.estimate == pytest.approx(0.01, rel=0.2) for gain in whole)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("profile", [NumericsProfile(), FP8_P])
def test_the_least_gain_is_predicted(which: str, profile: NumericsProfile) -> None:
    """Known before the launch: gains of less than 0.8 of it are not flagged, gains of more than 1.25 of it are."""
    for seed in range(3):
        inputs = make_case("normal", "bf16", lengths=((64,), (256,)), group=4, seed=seed)
        filters = filter_of(inputs, profile, "bf16", 64)
        least = float(least_of_pages(inputs, filters)[0][0, "kv".index(which), 1])
        median = least_gains(inputs, filters)
        assert 0.5 < least / (median.least_k if which == "k" else median.least_v) < 2
        for factor in (0.5, 0.79, 1.26, 2.0):
            changed = page_gain(inputs, which, factor * least, slice(64, 128), 0)
            out, _ = run_emulated(changed, profile, "bf16")
            assert (find_gains(inputs, out, filters).z > Z_LIMIT) is (factor > 1)


def test_parts_and_batches_give_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_case("normal", "bf16", **SMALL)
    out, _ = run_emulated(page_gain(inputs, "k", 0.1, slice(16, 32), 0), NumericsProfile(), "bf16")
    filters = filter_of(inputs, NumericsProfile(), "bf16")
    together = find_gains(inputs, out, filters)
    device = inputs.q.device.type
    monkeypatch.setitem(sampling.ELEMENTS, device, 1 << 12)
    monkeypatch.setitem(sampling.PADDING, device, 0)
    apart = find_gains(inputs, out, filters)
    assert apart.num_statistics == together.num_statistics
    assert apart.num_gains == together.num_gains
    assert apart.z == pytest.approx(together.z, rel=1e-3)
    assert apart.best == replace(
        together.best, z=pytest.approx(together.best.z, rel=1e-3), estimate=pytest.approx(together.best.estimate)
    )  # type: ignore[type-var]


def test_weighted_squares_by_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 50, 8, generator=g), torch.randn(2, 90, 8, generator=g)
    weights = torch.rand(2, 3, 4, 90, generator=g)
    y = torch.einsum("brtd,bnd->brtn", x, v)
    want = torch.einsum("brtn,brwn->brtw", y * y, weights)
    assert by_gram(50, 4, 8)
    assert not by_gram(8, 4, 8)
    for num_rows in (3, 1):
        monkeypatch.setattr(row_noise, "GRAM_ELEMENTS", num_rows * v.numel())
        found = weighted_squares(x[None], weights[None], v[None])[0]
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(weighted_squares(x[None, :, :, :8], weights[None], v[None])[0], want[:, :, :8])


def test_only_keys_in_pages_belong_to_pages() -> None:
    """A gain on new tokens, which lie in no page, is no page's."""
    inputs = make_case("normal", "bf16", lengths=((32,), (128,)))
    out, _ = run_emulated(page_gain(inputs, "v", 0.3, slice(96, 128), 0), NumericsProfile(), "bf16")
    filters = replace(filter_of(inputs, NumericsProfile(), "bf16"), cached_lens=(96,))
    found = find_gains(inputs, out, filters)
    assert all(gain.slot is None or gain.slot < 6 for gain in found.gains)


def test_cached_and_new_keys_may_round_p_differently() -> None:
    profile = NumericsProfile(p_dtype=PerKey("fp8_e4m3", "bf16"), mma="mma_sync")
    inputs = replace(make_case("normal", "bf16", lengths=((32,), (128,))), cached_lens=(96,))
    coarse = least_gains(inputs, filter_of(inputs, profile, "bf16")).least_k
    fine = least_gains(inputs, filter_of(inputs, NumericsProfile(mma="mma_sync"), "bf16")).least_k
    assert fine < coarse


def test_truncated_p_is_not_modelled() -> None:
    inputs = make_case("normal", "fp32", **SMALL)
    profile = NumericsProfile(in32="tf32_rz")
    assert find_gains(inputs, inputs.q, filter_of(inputs, profile, "fp32")).num_statistics == 0


def test_outputs_that_are_no_numbers_are_left_to_tier_1() -> None:
    inputs = make_case("normal", "bf16", **SMALL)
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    out[3, 1, 5] = math.nan
    out[4, 1] = math.inf
    assert find_gains(inputs, out, filter_of(inputs, NumericsProfile(), "bf16")).z < 5


def test_batches_without_keys_or_pages() -> None:
    inputs = make_case("normal", "bf16", lengths=((3, 2), (0, 0)))
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    assert find_gains(inputs, out, filter_of(inputs, NumericsProfile(), "bf16")).num_statistics == 0


def test_a_split_of_one_key_rounds_alike_in_every_row() -> None:
    """Its 16-bit partial is that key's value, with one and the same rounding error in the outputs of all rows."""
    profile = replace(PROFILES["fp16 partials"], split_partial_dtype="bf16")
    inputs = make_case("normal", "fp32", lengths=((128,), (65,)), causal=False)
    k = inputs.k.clone()
    k[64] = 0.75  # most of the mass
    shared = replace(inputs, q=inputs.q + 1, k=k)
    out, _ = run_emulated(shared, profile, "fp32", Schedule(tile=64, splits=2))
    found = find_gains(shared, out, replace(filter_of(shared, profile, "fp32"), num_splits=2))
    assert found.num_statistics > 20
    assert found.z < 5
