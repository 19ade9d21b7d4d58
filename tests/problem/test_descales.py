"""Descales by page: spread as they are named, inside the range of the stored type, one per shared page."""

from dataclasses import replace

import pytest
import torch

from harness.case import Case, Placement, Rows
from harness.dtypes import element_type
from harness.errors import LawError
from harness.problem.admission import LAWS, descales_refusal
from harness.problem.problem import Problem, build_problem

ROWS = Rows("r", (5, 1, 7, 1, 3), (340, 1060, -3, -1, 133))
CASE = Case("m", "k", ROWS, num_q_heads=8, gqa_ratio=2, head_size=32, kv_dtype="fp8_e4m3")


def scales(problem: Problem) -> torch.Tensor:
    assert problem.page_descales is not None
    return problem.page_descales


def test_loud_descales_span_a_factor_and_are_independent() -> None:
    drawn = scales(build_problem(replace(CASE, descales="loud"), "cpu"))
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


def test_quiet_descales_are_within_two_percent() -> None:
    problem = build_problem(replace(CASE, descales="quiet"), "cpu")
    per_tensor = build_problem(CASE, "cpu")
    for kind, scale in enumerate((per_tensor.k_scale, per_tensor.v_scale)):
        drawn = scales(problem)[..., kind]
        assert 1.015 < float(drawn.max() / drawn.min()) <= 1.02 + 1e-6
        assert float(drawn.min()) >= scale
        assert len(drawn.unique()) > 0.9 * drawn.numel()


def test_one_and_per_tensor() -> None:
    one, per_tensor = (build_problem(replace(CASE, descales=d), "cpu") for d in ("one", "per_tensor"))
    assert (one.k_scale, one.v_scale) == (1.0, 1.0)
    assert one.page_descales is None is per_tensor.page_descales
    assert one.descale("k").shape == (1, 1, 1)
    assert float(per_tensor.descale("v")) == per_tensor.v_scale
    for name in ("q", "k", "v"):  # descales are no part of the values
        assert torch.equal(getattr(one, name), getattr(per_tensor, name))
        assert torch.equal(getattr(one, name), getattr(build_problem(replace(CASE, descales="loud"), "cpu"), name))


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("descales", ["quiet", "loud"])
@pytest.mark.parametrize("data", LAWS)
def test_nothing_saturates_and_every_key_has_the_descale_of_its_page(data: str, descales: str, kv_dtype: str) -> None:
    case = replace(CASE, data=data, descales=descales, kv_dtype=kv_dtype)
    problem = build_problem(case, "cpu")
    assert problem.k_scale != problem.k_scale  # NaN: nothing may be multiplied with it
    for which, values in (("k", problem.k), ("v", problem.v)):
        descale = problem.descale(which)
        assert descale.shape == (*values.shape[:2], 1)
        assert float((values.double() / descale).abs().max()) <= element_type(kv_dtype).largest
        first_page = descale[:16]
        assert bool((first_page == first_page[:1]).all())
        assert not torch.equal(first_page[0], descale[16])
    page = scales(problem)[22 + 3]  # page 3 of sequence 1
    at = problem.key_start[1] + 3 * 16
    assert torch.equal(torch.stack([problem.descale(w)[at, :, 0] for w in "kv"], dim=1), page)


def test_outliers_raise_the_descale_of_their_page_only() -> None:
    case = replace(CASE, descales="loud")
    plain, outliers = (scales(build_problem(replace(case, data=d), "cpu")) for d in ("normal", "outliers"))
    raised = (outliers > plain).float().mean()
    assert 0.0 < float(raised) < 0.3
    assert bool((outliers >= plain).all())


def test_a_shared_page_has_one_descale() -> None:
    rows = Rows("r", (3, 1, 4, 5), (70, 50, 0, 60))
    case = replace(CASE, rows=rows, placement=Placement("shared_prefix", "shared"), descales="loud")
    drawn = scales(
        build_problem(case, "cpu")
    )  # pages: 5, 4, 1, 5, of which the first 3 are shared where there is context
    first, second, third, fourth = drawn.split([5, 4, 1, 5])
    assert torch.equal(first[:3], second[:3])
    assert torch.equal(first[:3], fourth[:3])
    assert not torch.equal(first[0], third[0])
    assert not torch.equal(first[3], second[3])
    apart = scales(build_problem(replace(case, placement=Placement()), "cpu"))
    assert not torch.equal(apart[:3], apart[5:8])


def test_what_a_cache_without_descales_refuses() -> None:
    assert descales_refusal(replace(CASE, kv_dtype="auto")) is None
    for descales in ("quiet", "loud", "one"):
        case = replace(CASE, kv_dtype="auto", descales=descales)
        with pytest.raises(LawError, match=f"descales {descales}: a cache of kv_dtype auto has none"):
            build_problem(case, "cpu")
    with pytest.raises(LawError, match="unknown descales 'lod'; known: per_tensor, quiet, loud, one"):
        build_problem(replace(CASE, descales="lod"), "cpu")
