"""Descales: spread as they are named, inside the range of the stored type, one for what a prefix shares."""

from dataclasses import replace

import pytest
import torch

from harness.case import Case, Placement, Rows
from harness.dtypes import element_type
from harness.errors import LawError
from harness.problem.admission import LAWS, descales_refusal
from harness.problem.needle import GAP
from harness.problem.payload import payload_of
from harness.problem.problem import Problem, build_problem

ROWS = Rows("r", (5, 1, 7, 1, 3), (340, 1060, -3, -1, 133))
PLAIN = Case("m", "k", ROWS, num_q_heads=8, gqa_ratio=2, head_size=32, kv_dtype="fp8_e4m3")
CASE = replace(PLAIN, descales_per="page")


def test_loud_descales_span_a_factor_and_are_independent() -> None:
    drawn = build_problem(CASE, "cpu").descales
    assert drawn.shape == (22 + 67 + 1 + 0 + 9, 4, 2)
    for kind in range(2):
        assert float(drawn[..., kind].max() / drawn[..., kind].min()) > 16
        assert float(drawn[..., kind].max()) < 1
    logs = drawn.log2().flatten(0, 1)  # [pages * heads, K and V]
    assert 1.2 < float(logs.std(dim=0).min()) < 1.7  # 5 octaves / sqrt(12) = 1.44
    assert abs(float(torch.corrcoef(logs.T)[0, 1])) < 0.2
    neighbours = torch.corrcoef(torch.stack([drawn[:-1, :, 0].flatten(), drawn[1:, :, 0].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.2
    assert len(drawn.unique()) > 0.9 * drawn.numel()


def test_every_token_has_a_loud_descale_of_its_own() -> None:
    problem = build_problem(replace(PLAIN, descales_per="token"), "cpu")
    assert problem.descales.shape == (problem.key_start[-1], 4, 2)
    assert torch.equal(problem.descale("v")[..., 0], problem.descales[..., 1])
    logs = problem.descales.log2()
    assert float(logs.amax() - logs.amin()) > 4
    assert 0.8 < float((logs[1:] - logs[:-1]).abs().mean()) < 2.4  # neighbours are a factor of three apart
    assert len(problem.descales.unique()) > 0.5 * problem.descales.numel()


@pytest.mark.parametrize("heads", [2, 3, 8, 32])
def test_loud_descales_of_heads_are_never_near_each_other(heads: int) -> None:
    for seed in range(8):
        case = replace(PLAIN, descales_per="head", num_q_heads=heads, gqa_ratio=1, data_seed=seed)
        drawn = build_problem(case, "cpu").descales  # [1, heads, 2]
        assert drawn.shape == (1, heads, 2)
        octaves = drawn[0].log2().sort(dim=0).values.diff(dim=0)
        assert float(octaves.min()) > 2.0 / heads
        assert build_problem(case, "cpu").descale("k").shape == (1, heads, 1)


@pytest.mark.parametrize("per", ["head", "page", "token"])
def test_quiet_descales_are_within_two_percent_and_equal_ones_are_equal(per: str) -> None:
    quiet, equal = (
        build_problem(replace(PLAIN, descales_per=per, descales=law), "cpu").descales for law in ("quiet", "equal")
    )
    whole = build_problem(PLAIN, "cpu").descales[0, 0].tolist()
    for kind, scale in enumerate(whole):
        drawn = quiet[..., kind]
        assert (1.015 if per != "head" else 1.002) < float(drawn.max() / drawn.min()) <= 1.02 + 1e-6
        assert float(drawn.min()) >= scale
        assert len(drawn.unique()) > 0.9 * drawn.numel()
        assert equal[..., kind].unique().tolist() == [scale]
    assert equal.shape == quiet.shape


def test_one_and_per_tensor() -> None:
    one, loud = (build_problem(replace(PLAIN, descales=d), "cpu") for d in ("one", "loud"))
    assert one.descales.tolist() == [[[1.0, 1.0]]]
    assert loud.descales.shape == (1, 1, 2)
    assert loud.descale("k").shape == (1, 1, 1)
    for per in ("tensor", "head", "page", "token"):
        assert bool((build_problem(replace(PLAIN, descales_per=per, descales="one"), "cpu").descales == 1).all())
        for name in ("q", "k", "v"):  # descales are no part of the values
            assert torch.equal(
                getattr(one, name), getattr(build_problem(replace(PLAIN, descales_per=per), "cpu"), name)
            )


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("descales", ["quiet", "loud"])
@pytest.mark.parametrize("data", LAWS)
def test_nothing_saturates_and_every_key_has_the_descale_of_its_page(data: str, descales: str, kv_dtype: str) -> None:
    case = replace(CASE, data=data, descales=descales, kv_dtype=kv_dtype)
    problem = build_problem(case, "cpu")
    for which, values in (("k", problem.k), ("v", problem.v)):
        descale = problem.descale(which)
        assert descale.shape == (*values.shape[:2], 1)
        stored = element_type(kv_dtype)  # needles are keys as they are stored, rounded to the dtype of the case
        assert float((values.double() / descale).abs().max()) <= stored.largest + stored.half_subnormal
        first_page = descale[:16]
        assert bool((first_page == first_page[:1]).all())
        assert not torch.equal(first_page[0], descale[16])
    page = problem.descales[22 + 3]  # page 3 of sequence 1
    at = problem.key_start[1] + 3 * 16
    assert torch.equal(torch.stack([problem.descale(w)[at, :, 0] for w in "kv"], dim=1), page)


def test_outliers_raise_the_descale_of_their_page_only() -> None:
    plain, outliers = (build_problem(replace(CASE, data=d), "cpu").descales for d in ("normal", "outliers"))
    raised = (outliers > plain).float().mean()
    assert 0.0 < float(raised) < 0.3
    assert bool((outliers >= plain).all())


def test_a_shared_page_has_one_descale() -> None:
    rows = Rows("r", (3, 1, 4, 5), (70, 50, 0, 60))
    case = replace(CASE, rows=rows, placement=Placement("shared_prefix", "shared"))
    drawn = build_problem(case, "cpu").descales
    # pages: 5, 4, 1, 5, of which the first 3 are shared where there is context
    first, second, third, fourth = drawn.split([5, 4, 1, 5])
    assert torch.equal(first[:3], second[:3])
    assert torch.equal(first[:3], fourth[:3])
    assert not torch.equal(first[0], third[0])
    assert not torch.equal(first[3], second[3])
    apart = build_problem(replace(case, placement=Placement()), "cpu").descales
    assert not torch.equal(apart[:3], apart[5:8])
    tokens = build_problem(replace(case, descales_per="token"), "cpu").descales
    first, second, third, fourth = tokens.split([73, 51, 4, 65])
    assert torch.equal(first[:48], second[:48])
    assert torch.equal(first[:48], fourth[:48])
    assert not torch.equal(first[:4], third)
    assert not torch.equal(first[48], second[48])


def stored_queries(problem: Problem) -> torch.Tensor:
    """Values of q, float64."""
    return problem.q.double() * problem.q_descale


@pytest.mark.parametrize("q_dtype", ["fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz"])
@pytest.mark.parametrize("data", ["normal", "probe", "outliers", "large"])
def test_an_8_bit_query_is_the_drawn_one_rounded_at_its_own_descale(data: str, q_dtype: str) -> None:
    plain, stored = (build_problem(replace(PLAIN, data=data, q_dtype=q), "cpu") for q in ("auto", q_dtype))
    assert plain.q_descale == 1.0
    element = element_type(q_dtype)
    assert stored.q.dtype == element.torch
    assert stored.q_descale not in (1.0, *plain.descales.flatten().tolist())
    error = (stored_queries(stored) - plain.q.double()).abs()
    step = element.unit_roundoff * plain.q.double().abs() + element.half_subnormal * stored.q_descale
    assert bool((error <= step * (1 + 2.0**-20)).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize("per", ["tensor", "head", "token"])
@pytest.mark.parametrize("fp8", ["fp8_e4m3", "fp8_e5m2fnuz"])
def test_8_bit_needles_are_keys_as_they_are_stored(fp8: str, per: str) -> None:
    rows = Rows("r", (5, 1, 3), (34, 60, -1))
    case = replace(PLAIN, rows=rows, kv_dtype=fp8, q_dtype=fp8, descales_per=per, data="needle", sinks=True)
    problem = build_problem(case, "cpu")
    payload = payload_of(problem.k, problem.descale("k"), element_type(fp8)).view(torch.uint8)  # [keys, kv heads, d]
    k = payload.view(element_type(fp8).torch).double() * problem.descale("k").double()
    for token, end in ((0, 35), (4, 39), (5, 100)):
        start = 0 if token < 5 else 39
        for head in range(8):
            stored = problem.q[token, head].view(torch.uint8)
            own = (payload[start:end, head // 2] == stored).all(dim=1)
            assert int(own.sum()) == 1
            scores = k[start:end, head // 2] @ stored_queries(problem)[token, head] * problem.softmax_scale
            rivals = torch.cat([scores[~own], torch.zeros(1, dtype=torch.float64)])
            assert float(scores[own] - rivals.max()) > GAP
    assert not bool(problem.q[6].view(torch.uint8).any())  # a query before the first key


def test_an_8_bit_output_has_a_scale_at_which_large_values_saturate() -> None:
    for out_dtype in ("fp8_e4m3", "fp8_e5m2fnuz"):
        scale = build_problem(replace(PLAIN, out_dtype=out_dtype), "cpu").output_scale
        assert 1.5 <= scale * element_type(out_dtype).largest <= 3.0
    assert build_problem(PLAIN, "cpu").output_scale == 1.0


def test_what_a_case_refuses() -> None:
    auto = replace(PLAIN, kv_dtype="auto")
    assert descales_refusal(auto) is None
    for case, words in (
        (replace(auto, descales_per="page"), "descales_per page: a cache of kv_dtype auto has no descales"),
        (replace(auto, descales="one"), "descales one: a cache of kv_dtype auto has none"),
        (replace(PLAIN, descales="quiet"), "descales quiet: one per tensor has nothing to be quiet with"),
        (replace(PLAIN, descales="equal"), "descales equal: one per tensor has nothing to be equal with"),
        (replace(PLAIN, descales="lod"), "unknown descales 'lod'; known: loud, quiet, equal, one"),
        (replace(PLAIN, descales_per="dim"), "unknown descales_per 'dim'; known: tensor, head, page, token"),
        (
            replace(PLAIN, data="needle", q_dtype="fp8_e5m2"),
            "needle: a query stored as fp8_e5m2 holds no key stored as fp8_e4m3",
        ),
    ):
        with pytest.raises(LawError, match=words):
            build_problem(case, "cpu")
    assert descales_refusal(replace(auto, q_dtype="fp8_e4m3", descales="one")) is None
