"""Descales by page: honest caches are green; a wrong descale is found before the launch, and its owner named."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from harness.cache.build import KVCache, build_cache
from harness.cache.content import Content
from harness.cache.effective import effective_kv
from harness.cache.verify import verify_cache
from harness.case import Case, Placement, Rows
from harness.errors import SetupBug
from harness.problem.problem import Problem, build_problem
from harness.run.plant import PLANTS

ROWS = Rows("r", (5, 1, 7, 1, 3, 1), (40, 60, -3, -1, 33, 500))
CASE = Case(
    "m", "k", ROWS, num_q_heads=4, gqa_ratio=2, head_size=24, kv_dtype="fp8_e4m3", descales_per="page", strides="cache"
)


@pytest.mark.parametrize("content", Content)
@pytest.mark.parametrize("descales", ["quiet", "loud"])
def test_honest_caches_are_green(descales: str, content: Content) -> None:
    grid = itertools.product(["compact", "cache", "all"], ["fp8_e4m3", "fp8_e5m2"], [1, 16, 24, 544])
    for number, (strides, kv_dtype, page_size) in enumerate(grid):
        case = replace(
            CASE,
            descales_per="page",
            descales=descales,
            strides=strides,
            kv_dtype=kv_dtype,
            page_size=page_size,
            layout=("linear_nhd", "vllm_classic")[number % 2],
            tail=("nan", "loud")[number % 2],
            dtype=("fp16", "bf16", "fp32")[number % 3],
            table_padding=("poison_page", "out_of_range", "exact")[number % 3],
        )
        problem = build_problem(case, "cpu")
        cache = build_cache(problem, content)
        verify_cache(problem, cache, content)
        block = descale_of(cache)
        assert block.shape == (cache.num_pages, 2, 2)
        assert block.is_contiguous() == (strides == "compact")
        used = {page for pages in cache.pages for page in pages}
        assert {page for page in range(cache.num_pages) if not bool(block[page].isnan().any())} == used
        assert bool(torch.cat([cache.k_scale, cache.v_scale]).isnan().all())


def descale_of(cache: KVCache) -> torch.Tensor:
    assert cache.kv_block_descale is not None
    return cache.kv_block_descale


def test_values_come_back_as_they_were_drawn() -> None:
    """Half a step of e4m3, whatever the descale of the page: payloads are scaled inversely."""
    problem = build_problem(CASE, "cpu")
    cache = build_cache(problem, Content.ALL)
    k, v = effective_kv(problem, cache, Content.ALL)
    for got, value, payload in ((k, problem.k, cache.key_payload), (v, problem.v, cache.value_payload)):
        normal = value.float().abs() > 0.1
        assert float(((got - value.float()).abs() / value.float().abs())[normal].max()) <= 2.0**-4 * 1.001
        assert 0.95 < float(got.std()) < 1.05
        by_page = payload[: 16 * 2].float().unflatten(0, (2, 16)).std(dim=(1, 3))  # [pages, heads]
        assert float(by_page.max() / by_page.min()) > 1.5


def test_a_shared_page_has_one_descale_and_verifies() -> None:
    rows = Rows("r", (5, 1, 3), (40, 60, 33))
    problem = build_problem(replace(CASE, rows=rows, placement=Placement("shared_prefix", "shared")), "cpu")
    cache = build_cache(problem, Content.ALL)
    assert cache.pages[0][:2] == cache.pages[1][:2] == cache.pages[2][:2]
    verify_cache(problem, cache, Content.ALL)
    other = problem.descales.clone()
    other[3 + 1] *= 1.01  # the second sequence believes in another descale of a page that it shares
    bug = red(replace(problem, descales=other), cache)
    assert "quantised with" in bug.hint or "payload" in bug.hint


def red(problem: Problem, cache: KVCache) -> SetupBug:
    with pytest.raises(SetupBug) as caught:
        verify_cache(problem, cache, Content.ALL)
    return caught.value


def edited(edit: Callable[[torch.Tensor, KVCache], None]) -> tuple[Problem, KVCache]:
    problem = build_problem(CASE, "cpu")
    cache = build_cache(problem, Content.ALL)
    edit(descale_of(cache), cache)
    return problem, cache


def test_a_wrong_descale_is_found_and_its_owner_named() -> None:
    def neighbour(block: torch.Tensor, cache: KVCache) -> None:
        block[cache.pages[5][3]] = block[cache.pages[5][4]]

    def other_head(block: torch.Tensor, cache: KVCache) -> None:
        block[cache.pages[5][3], 0] = block[cache.pages[5][3], 1]

    def exchanged(block: torch.Tensor, cache: KVCache) -> None:
        block[cache.pages[5][3]] = block[cache.pages[5][3]].flip(1)

    def dropped(block: torch.Tensor, cache: KVCache) -> None:
        block[cache.pages[5][3], 1, 1] = 1.0

    def forgotten(block: torch.Tensor, cache: KVCache) -> None:
        block[cache.pages[5][3], 1, 0] = math.nan

    def a_little(block: torch.Tensor, cache: KVCache) -> None:
        block[cache.pages[5][3], 1, 0] *= 1 + 2.0**-22

    for edit, kind, head in (
        (neighbour, "K", 0), (other_head, "K", 0), (exchanged, "K", 0), (dropped, "V", 1), (forgotten, "K", 1),
        (a_little, "K", 1),
    ):  # fmt: skip
        problem, cache = edited(edit)
        page, bug = cache.pages[5][3], red(problem, cache)
        assert bug.tensor == "kv_block_descale"
        assert f" for {kind} of kv head {head} in page {page} (page 3 of sequence 5)" in bug.expected
        owner = {
            neighbour: f", like K of kv head 0 in page {cache.pages[5][4]}",
            other_head: f", like K of kv head 1 in page {page}",
            exchanged: f", like K of kv head 0 in page {page}",
            forgotten: "NaN",
        }.get(edit, "")
        assert bug.got.endswith(owner)
    problem, cache = edited(dropped)
    assert red(problem, cache).got.startswith("1")


def test_descales_that_nobody_owns_are_nan() -> None:
    def unused(block: torch.Tensor, cache: KVCache) -> None:
        block[0, 1, 0] = 0.5

    def gap(block: torch.Tensor, cache: KVCache) -> None:
        block.as_strided((1,), (1,), block.stride(0) * 3 - 1).fill_(0.25)

    for edit, page in ((unused, 0), (gap, 2)):
        problem, cache = edited(edit)
        assert red(problem, cache).expected == f"NaN in page {page} where no sequence has a descale"


def test_descales_are_there_where_the_case_has_them_and_only_there() -> None:
    problem, cache = edited(lambda block, cache: None)
    assert red(problem, replace(cache, kv_block_descale=None)).got == "None"
    assert red(problem, replace(cache, k_scale=torch.ones(1))).tensor == "k_scale"
    plain = build_problem(replace(CASE, descales_per="tensor"), "cpu")
    own = build_cache(plain, Content.ALL)
    assert own.kv_block_descale is None
    assert red(plain, replace(own, kv_block_descale=cache.kv_block_descale)).expected == "None"


def test_a_payload_made_with_the_neighbours_descale() -> None:
    """The builder's own mistake: descales and table agree, the payload does not."""
    problem, cache = edited(lambda block, cache: None)
    rolled = build_cache(replace(problem, descales=problem.descales.roll(1, 0)), Content.ALL)
    bug = red(problem, replace(cache, value_payload=rolled.value_payload, v=rolled.v))
    assert bug.tensor == "v_cache"
    assert "at descale" in bug.expected


def test_scales_of_one_stay_a_plant_that_can_be_planted() -> None:
    plant = PLANTS["scale-one"]
    problem = build_problem(plant.case(CASE), "cpu")
    assert problem.descales.tolist() == [[[1.0, 1.0]]]
    auto = replace(CASE, kv_dtype="auto", descales_per="tensor")
    assert plant.case(auto) == auto
