"""Every law keeps its promise on dense float64 scores, and the check of the promise is red for another law."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from harness.case import Case, Placement, Rows
from harness.dtypes import element_type
from harness.errors import LawError, PlacementError
from harness.problem.admission import LAWS, law_refusal
from harness.problem.masks import visible
from harness.problem.problem import Problem, build_problem

MIXED = Rows("mixed", (5, 1, 40, 1, 4, 1), (100, 300, 0, 47, -2, -1))
BASE = Case("m", "k", MIXED, num_q_heads=8, gqa_ratio=2, head_size=64, page_size=16)
VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 17},
    "window of one": {"sliding_window": 1},
    "window and sink tokens": {"sliding_window": 17, "sink_tokens": 3},
    "not causal": {"causal": False, "sliding_window": 33},
    "alibi and sinks": {"alibi": True, "sinks": True},
    "sinks": {"sinks": True, "dtype": "bf16"},
    "fp8 e4m3": {"kv_dtype": "fp8_e4m3"},
    "fp8 e5m2, head 24": {"kv_dtype": "fp8_e5m2", "dtype": "bf16", "head_size": 24},
    "fp32, head 16": {"dtype": "fp32", "head_size": 16, "gqa_ratio": 8},
}


def stored(values: torch.Tensor, descale: torch.Tensor, case: Case) -> torch.Tensor:
    """What a right kernel reads back: float64."""
    if case.kv_dtype == "auto":
        return values.double()
    return (values.float() / descale).to(element_type(case.kv_dtype).torch).double() * descale


def rows_of(problem: Problem) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per sequence with keys: scores [tokens, heads, keys], seen [tokens, keys], query positions [tokens]."""
    case, token = problem.case, 0
    k = stored(problem.k, problem.descale("k"), case).repeat_interleave(case.gqa_ratio, dim=1)
    for seq, (query_len, context) in enumerate(zip(case.rows.query_lens, case.rows.context_lens, strict=True)):
        keys = k[problem.key_start[seq] : problem.key_start[seq + 1]]
        q = problem.q[token : token + query_len].double()
        token += query_len
        if not len(keys):
            continue
        pos, key = torch.arange(context, context + query_len), torch.arange(len(keys))
        scores = torch.einsum("thd,nhd->thn", q, keys) * problem.softmax_scale
        if case.logits_soft_cap:
            scores = case.logits_soft_cap * torch.tanh(scores / case.logits_soft_cap)
        if problem.alibi_slopes is not None:
            scores = scores + problem.alibi_slopes.double()[:, None] * (key - pos[:, None, None])
        yield scores, visible(pos[:, None], key, len(keys), case.causal, case.sliding_window, case.sink_tokens), pos


def masses(problem: Problem, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax [tokens that see a key, heads, keys], sinks in the denominator."""
    some = seen.any(dim=1)
    scores = scores[some].masked_fill(~seen[some][:, None, :], -math.inf)
    if problem.sinks is not None:
        sink = problem.sinks.double()[None, :, None].expand(scores.shape[0], -1, 1)
        return torch.cat([scores, sink], dim=2).softmax(dim=2)[:, :, :-1]
    return scores.softmax(dim=2)


def least_peak(problem: Problem) -> float:
    return min(float(masses(problem, s, seen).amax(dim=2).min()) for s, seen, _ in rows_of(problem) if seen.any())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("data", LAWS)
def test_laws_build_everywhere_and_the_same_each_time(data: str, variant: str) -> None:
    case = replace(BASE, data=data, **VARIANTS[variant])
    if law_refusal(case):
        with pytest.raises(LawError, match=f"^{data}: "):
            build_problem(case, "cpu")
        return
    a, b, c = (build_problem(replace(case, data_seed=seed), "cpu") for seed in (0, 0, 1))
    for name in ("q", "k", "v"):
        x, y, z = (getattr(p, name) for p in (a, b, c))
        assert x.dtype == element_type(case.dtype).torch
        assert bool(x.isfinite().all())
        assert torch.equal(x, y)
        same = (data in ("uniform", "bar_codes") and name == "q") or (data == "bar_codes" and name == "v")
        assert same == torch.equal(x, z)
    assert a.q.shape == (52, 8, case.head_size)
    assert a.k.shape == (a.key_start[-1], case.num_kv_heads, case.head_size)
    assert a.key_start == (0, 105, 406, 446, 494, 496, 496)
    assert a.structured == (data in ("uniform", "needle", "needle_edges", "bar_codes", "tiny"))


@pytest.mark.parametrize("variant", [*VARIANTS, "fp8, loud descales"])
@pytest.mark.parametrize("data", ["needle", "needle_edges"])
def test_a_needle_has_all_the_mass(data: str, variant: str) -> None:
    loud = {"kv_dtype": "fp8_e4m3", "descales_per": "page", "sliding_window": 40}
    case = replace(BASE, data=data, **VARIANTS.get(variant, loud))
    problem = build_problem(case, "cpu")
    for scores, seen, _ in rows_of(problem):
        if seen.any():
            others = masses(problem, scores, seen).sort(dim=2).values[:, :, :-1].sum(dim=2)
            assert float(others.max()) < 2.0**-100
            some = scores[seen.any(dim=1)].masked_fill(~seen[seen.any(dim=1)][:, None, :], -math.inf)
            assert float(some.amax(dim=2).min()) >= 120  # above a phantom key of zeros, too
            if some.shape[2] > 1:
                best, second = some.topk(2, dim=2).values.unbind(dim=2)
                assert float((best - second).min()) >= 120
    assert least_peak(problem) == 1.0
    if case.sliding_window != 1:  # a lone key has all the mass anyway
        assert least_peak(replace(problem, q=problem.q / 64)) < 1.0  # the planted fault: queries too short


def test_needles_visit_every_kind_of_place() -> None:
    case = replace(BASE, data="needle", rows=Rows("one", (40,), (60,)), sliding_window=50)
    problem = build_problem(case, "cpu")
    ((scores, seen, pos),) = rows_of(problem)
    target = scores.masked_fill(~seen[:, None, :], -math.inf).argmax(dim=2)  # [tokens, heads]
    pos = pos[:, None]
    for place in (pos, pos // 16 * 16, pos // 16 * 16 - 1, (pos - 49).clamp(min=0)):
        assert int((target == place).sum()) > 10
    assert len(target.unique()) > 50
    assert bool(seen.gather(1, target).all())


def test_a_needle_that_cannot_be_is_refused() -> None:
    with pytest.raises(LawError, match="needle: a soft cap of 30"):
        build_problem(replace(BASE, data="needle", logits_soft_cap=30.0), "cpu")
    long = replace(BASE, data="needle", alibi=True, rows=Rows("long", (9,), (60_000,)), head_size=16)
    with pytest.raises(LawError, match=r"sequence 0, query \d, head \d would need elements of .*, beyond 65504"):
        build_problem(long, "cpu")
    assert least_peak(build_problem(replace(long, dtype="bf16"), "cpu")) == 1.0
    with pytest.raises(LawError, match="no query singles out the key at position"):
        build_problem(replace(BASE, data="needle", head_size=2), "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_seen_scores_of_negative_are_below_minus_88(variant: str) -> None:
    def highest(problem: Problem) -> float:
        return max(float(s.masked_fill(~seen[:, None, :], -math.inf).max()) for s, seen, _ in rows_of(problem))

    case = replace(BASE, data="negative", **VARIANTS[variant])
    problem = build_problem(case, "cpu")
    assert highest(problem) < -88
    assert highest(build_problem(replace(case, data="normal"), "cpu")) > -88
    if case.sliding_window is None:  # the softmax is no needle: several keys carry mass
        peaks = torch.cat([masses(problem, s, seen).amax(dim=2).flatten() for s, seen, _ in rows_of(problem)])
        assert float(peaks.median()) < 0.9


def test_negative_is_refused_where_scores_cannot_stay_low() -> None:
    with pytest.raises(LawError, match="negative: a soft cap of 50 lifts scores to -49"):
        build_problem(replace(BASE, data="negative", logits_soft_cap=50.0), "cpu")
    with pytest.raises(LawError, match="without a causal mask ALiBi"):
        build_problem(replace(BASE, data="negative", alibi=True, causal=False), "cpu")


@pytest.mark.parametrize("variant", ["plain", "window", "fp8 e4m3", "sinks", "fp8 e5m2, head 24"])
def test_probed_and_masked_keys_carry_much_of_the_mass(variant: str) -> None:
    def moved(problem: Problem) -> tuple[float, float]:
        """Median of the largest mass, and of the mass that a mask one key too wide lets in."""
        case, peaks, leaks = problem.case, [], []
        for scores, seen, pos in rows_of(problem):
            peaks.append(masses(problem, scores, seen).amax(dim=2).flatten())
            wider = seen.clone()
            key = torch.arange(scores.shape[2])
            wider |= seen.any(dim=1, keepdim=True) & (key == pos[:, None] + 1)
            if case.sliding_window:
                wider |= seen.any(dim=1, keepdim=True) & (key == pos[:, None] - case.sliding_window)
            gained = (wider & ~seen)[seen.any(dim=1)]
            leak = (masses(problem, scores, wider) * gained[:, None, :]).sum(dim=2)
            leaks.append(leak[gained.any(dim=1)].flatten())
        return float(torch.cat(peaks).median()), float(torch.cat(leaks).median())

    case = replace(BASE, data="probe", **VARIANTS[variant])
    peak, leak = moved(build_problem(case, "cpu"))
    assert peak > 0.5
    assert leak > 0.25
    peak, leak = moved(build_problem(replace(case, data="normal"), "cpu"))
    assert min(peak, leak) < 0.25


def test_uniform_attends_alike_to_all_seen_keys() -> None:
    problem = build_problem(replace(BASE, data="uniform", sliding_window=17), "cpu")
    for scores, seen, _ in rows_of(problem):
        some = seen[seen.any(dim=1)].double()
        expected = some / some.sum(dim=1, keepdim=True)
        assert torch.allclose(masses(problem, scores, seen), expected[:, None, :].expand(-1, 8, -1), rtol=1e-14, atol=0)


def test_outliers_are_rare_and_large() -> None:
    problem = build_problem(replace(BASE, data="outliers", head_size=128), "cpu")
    share = float((problem.k.float().abs() > 4.4).float().mean())
    assert 3e-4 < share < 1e-3
    assert float(problem.k.abs().max()) > 15


def test_sinks_are_near_the_lse_of_typical_rows() -> None:
    laws = ("normal", "probe", "uniform", "outliers", "negative", "rising", "falling", "large", "biased", "bar_codes")
    for data in laws:
        problem = build_problem(replace(BASE, data=data, sinks=True, rows=Rows("r", (8, 1), (250, 200))), "cpu")
        assert problem.sinks is not None
        lse = torch.cat([s.masked_fill(~seen[:, None, :], -math.inf).logsumexp(2) for s, seen, _ in rows_of(problem)])
        share = torch.sigmoid(problem.sinks.double() - lse)  # of the mass that goes to the sink
        assert 0.02 < float(share.median()) < 0.98, data


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("data", LAWS)
def test_descales_differ_from_one_and_each_other_and_nothing_saturates(data: str, kv_dtype: str) -> None:
    drawn = set()
    for seed in range(4):
        problem = build_problem(replace(BASE, data=data, kv_dtype=kv_dtype, data_seed=seed), "cpu")
        ((k_scale, v_scale),) = problem.descales[0].tolist()
        assert len({1.0, k_scale, v_scale}) == 3
        assert 0.02 <= k_scale < 0.9
        largest = element_type(kv_dtype).largest
        assert float(problem.k.abs().max()) / k_scale <= largest
        assert float(problem.v.abs().max()) / v_scale <= largest
        drawn.add(k_scale)
    assert len(drawn) == 4
    assert build_problem(replace(BASE, data=data), "cpu").descales.tolist() == [[[1.0, 1.0]]]


def test_shared_prefix_is_whole_pages_of_the_same_tokens() -> None:
    case = replace(BASE, placement=Placement("shared_prefix", "shared"), rows=Rows("r", (3, 1, 4), (70, 50, 0)))
    problem = build_problem(case, "cpu")
    assert problem.shared_prefix == 48
    for tensor in (problem.k, problem.v):
        first, second, third = (tensor[start : start + 48] for start in problem.key_start[:3])
        assert torch.equal(first, second)
        assert not torch.equal(tensor[48:50], tensor[problem.key_start[1] + 48 : problem.key_start[1] + 50])
        assert not torch.equal(third[:4], first[:4])
    with pytest.raises(PlacementError, match=r"shared_prefix: no whole page of 16 tokens .*70, 7"):
        build_problem(replace(case, rows=Rows("r", (3, 1), (70, 7))), "cpu")


def test_unknown_law() -> None:
    with pytest.raises(LawError, match="unknown data law 'nomral'; known: normal, probe"):
        build_problem(replace(BASE, data="nomral"), "cpu")
