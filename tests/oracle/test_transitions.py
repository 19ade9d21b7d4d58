"""Tier 2 at page transitions: silent on honest kernels, sees tiles that the statistics of pages dilute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.kernel.numerics import NumericsProfile
from harness.oracle.gain_findings import Z_LIMIT
from harness.oracle.gains import K_STALE, V_STALE
from harness.oracle.matched_filter import PageFilter, find_gains
from harness.oracle.row_noise import patterns_alike
from harness.oracle.stale import DROPPED, NEIGHBOUR, Stale, by_key, scaled
from harness.oracle.transitions import find_stale, of_heads, stale_sizes
from references.attention import AttentionInputs
from references.rows import attention_rows
from tests.oracle.cases import FEATURES, judged, make_case, ratios
from tests.oracle.emulated_kernel import Schedule, run_emulated
from tests.oracle.test_matched_filter import FP8_P, PROFILES, SMALL, filter_of

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def filters_of(
    inputs: AttentionInputs, profile: NumericsProfile, page_size: int, q_dtype: str = "bf16", spread: float = 0.02
) -> PageFilter:
    """With descales within `spread` of one another; the pages are those of filter_of, on the device of `inputs`."""
    filters = filter_of(inputs, profile, q_dtype, page_size)
    g = torch.Generator().manual_seed(5)
    shape = (100 * len(inputs.seq_lens), inputs.k.shape[1], 2)
    return replace(filters, block_descale=(1 + spread * torch.rand(shape, generator=g)).to(inputs.q.device))


def with_stale(inputs: AttentionInputs, filters: PageFilter, stale: Stale) -> AttentionInputs:
    """What a kernel sees that scales the keys of each sequence as `stale` says."""
    assert filters.block_descale is not None
    k, v, start = inputs.k.clone(), inputs.v.clone(), 0
    for sequence, (pages, seq_len) in enumerate(zip(filters.pages, inputs.seq_lens, strict=True)):
        if seq_len and stale.sequence in (None, sequence):
            descales = filters.block_descale[list(pages)]
            gains = stale.used(descales, filters.page_size, seq_len) / by_key(descales, filters.page_size, seq_len)
            k[start : start + seq_len] *= gains[..., :1]
            v[start : start + seq_len] *= gains[..., 1:]
        start += seq_len
    return replace(inputs, k=k, v=v)


@pytest.mark.parametrize("q_dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("profile", PROFILES)
def test_honest_kernels_stay_below_the_limit(profile: str, q_dtype: str) -> None:
    declared = PROFILES[profile]
    for seed, feature in enumerate(FEATURES):
        inputs = make_case("normal", q_dtype, seed=seed, **SMALL, **FEATURES[feature])
        schedule = Schedule(tile=32, reverse=bool(seed % 2), splits=seed % 3 + 1)
        out, _ = run_emulated(inputs, declared, q_dtype, schedule)
        found = find_stale(inputs, out.float() * declared.out_scale, filters_of(inputs, declared, 48, q_dtype))
        assert found.num_statistics > 20
        assert found.z < 5
        assert not found.gains


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tensors", ["K", "V"])
@pytest.mark.parametrize("step", [1, -1])
def test_a_tile_that_pages_dilute_is_seen(tensors: str, step: int, device: str) -> None:
    """64 of 512 keys of a page, descales within 2 %, P in 8 bits: no element is wrong, and no page stands out."""
    shape: dict[str, Any] = {"lengths": ((128,), (1024,)), "kv_heads": 4, "group": 4, "size": 128, "causal": False}
    inputs = make_case("normal", "bf16", **shape)
    stale = Stale(tensors, NEIGHBOUR, step, 64)
    out, _ = run_emulated(with_stale(inputs, filters_of(inputs, FP8_P, 512), stale), FP8_P, "bf16")
    assert ratios(judged(inputs, out, None, FP8_P, "bf16"))["out"] < 1
    there = replace(inputs, q=inputs.q.to(device), k=inputs.k.to(device), v=inputs.v.to(device))
    filters = filters_of(there, FP8_P, 512)
    found, sizes = find_stale(there, out.to(device), filters), stale_sizes(there, filters)
    best = found.gains[0]
    assert best.z > 2 * abs(find_gains(there, out.to(device), filters).z)
    assert (best.kind, best.step, best.num_keys) == ((K_STALE if tensors == "K" else V_STALE), step, 64)
    slot = 0 if step > 0 else 1
    assert (best.sequence, best.slot, best.page, best.other_page) == (0, slot, slot, slot + step)
    assert best.estimate == pytest.approx(1, abs=0.25)
    assert best.z == pytest.approx(sizes[tensors, step] * Z_LIMIT, rel=0.35)  # known before the launch


def test_transitions_and_sequences_add_up() -> None:
    """Decode rows of several pages each: what no single transition shows, all of them together do."""
    inputs = make_case("normal", "bf16", lengths=((1,) * 6, (300, 280, 310, 64, 320, 290)), group=8, size=128)
    filters = filters_of(inputs, NumericsProfile(), 64, spread=0.03)
    out, _ = run_emulated(with_stale(inputs, filters, Stale("K", NEIGHBOUR, 1)), NumericsProfile(), "bf16")
    found = find_stale(inputs, out, filters)
    assert (found.gains[0].sequence, found.gains[0].kv_head, found.gains[0].slot) == (None, None, None)
    alone = find_stale(*_of_sequence(inputs, out, filters, 0))
    assert found.z > 1.5 * alone.z


def _of_sequence(
    inputs: AttentionInputs, out: torch.Tensor, filters: PageFilter, sequence: int
) -> tuple[AttentionInputs, torch.Tensor, PageFilter]:
    key = sum(inputs.seq_lens[:sequence])
    keys, lens = slice(key, key + inputs.seq_lens[sequence]), inputs.seq_lens[sequence : sequence + 1]
    own = replace(
        inputs, q=inputs.q[sequence : sequence + 1], k=inputs.k[keys], v=inputs.v[keys], query_lens=(1,), seq_lens=lens
    )
    return (
        own,
        out[sequence : sequence + 1],
        replace(filters, pages=filters.pages[sequence : sequence + 1], cached_lens=lens),
    )


@pytest.mark.parametrize("feature", [*FEATURES, "loud"])
def test_changes_are_exact(feature: str) -> None:
    inputs = make_case("normal", "bf16", lengths=((20,), (150,)), **FEATURES.get(feature, {}))
    filters = filters_of(inputs, FP8_P, 48, spread=30.0 if feature == "loud" else 0.02)
    assert filters.block_descale is not None
    descales = filters.block_descale[list(filters.pages[0])]
    for stale in (Stale("K and V", NEIGHBOUR, 1, 16), Stale("K", NEIGHBOUR, -1), Stale("V", DROPPED, heads=(1,))):
        rows, wrong = (attention_rows(i, [0], [range(20)]) for i in (inputs, with_stale(inputs, filters, stale)))
        changed = scaled(rows, by_key(descales, 48, 150), stale.used(descales, 48, 150))
        torch.testing.assert_close(changed[None], wrong.out - rows.out, rtol=1e-3, atol=1e-6)


def test_which_keys_are_scaled_by_what() -> None:
    descales = torch.arange(1.0, 13.0).view(3, 2, 2)  # 3 pages of 4 slots, 10 keys
    own = by_key(descales, 4, 10)
    used = Stale("K", NEIGHBOUR, 1, 2).used(descales, 4, 10)
    assert (used != own).any(2).any(1).nonzero()[:, 0].tolist() == [2, 3, 6, 7]
    assert used[3].tolist() == [[5.0, 2.0], [7.0, 4.0]]
    used = Stale("K and V", NEIGHBOUR, -1, slot=2, heads=(1,)).used(descales, 4, 10)
    assert (used != own).any(2).any(1).nonzero()[:, 0].tolist() == [8, 9]
    assert used[8].tolist() == [[9.0, 10.0], [7.0, 8.0]]


def test_nothing_to_look_at() -> None:
    inputs = make_case("normal", "bf16", **SMALL)
    out, _ = run_emulated(inputs, NumericsProfile(), "bf16")
    per_tensor = filter_of(inputs, NumericsProfile(), "bf16", 48)
    one_page = filters_of(inputs, NumericsProfile(), 160)
    equal = filters_of(inputs, NumericsProfile(), 48, spread=0.0)
    for filters in (per_tensor, one_page, equal):
        assert find_stale(inputs, out, filters).num_statistics == 0


def test_heads_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_case("normal", "bf16", **SMALL, kv_heads=3, sinks=True, alibi=True)
    filters = filters_of(inputs, NumericsProfile(), 48)
    out, _ = run_emulated(with_stale(inputs, filters, Stale("K", NEIGHBOUR, 1, 32)), NumericsProfile(), "bf16")
    together = find_stale(inputs, out, filters)
    assert of_heads(inputs, slice(1, 2)).q.shape[1] == 2
    monkeypatch.setattr("harness.oracle.transitions.MAX_ELEMENTS", {"cpu": 1})
    apart = find_stale(inputs, out, filters)
    assert apart.num_statistics == together.num_statistics
    assert apart.z == pytest.approx(together.z, rel=1e-3)


@pytest.mark.parametrize("spread", [0.004, 0.02, 0.04, 0.08])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_whose_p_rounds_alike_are_counted(spread: float, causal: bool) -> None:
    """Two rows whose logits differ by a constant and a little noise: the correlation of what rounding to e4m3 does."""
    g = torch.Generator().manual_seed(0)
    n = 256
    one = 0.3 * torch.randn(n, generator=g)
    other = one + 0.7 + spread * torch.randn(n, generator=g)
    inputs = AttentionInputs(
        q=torch.stack((one, other))[:, None], k=torch.eye(n)[:, None], v=torch.randn(n, 1, 64, generator=g),
        query_lens=(2,), seq_lens=(n,), softmax_scale=1.0, causal=causal,
    )  # fmt: skip
    rows = attention_rows(inputs, [0], [range(2)])
    counted = float(patterns_alike(rows, FP8_P, "fp32")[0, 0, 0]) - 1
    x = torch.randn(100_000, generator=g, dtype=torch.float64)
    y = x + spread * torch.randn(100_000, generator=g, dtype=torch.float64)
    errors = [p.exp().float().to(torch.float8_e4m3fn).double() / p.exp() - 1 for p in (x, y)]
    correlation = float(torch.corrcoef(torch.stack(errors))[0, 1])
    assert correlation - 0.05 < counted < correlation + 0.4  # by the widest steps
