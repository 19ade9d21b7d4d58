"""Pools of a given size: dense and aliased caches hold the same bits; a page that a sequence has twice, one content."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.cache import page_pool
from harness.cache import pool as pools
from harness.cache.build import KVCache, build_cache
from harness.cache.content import Content
from harness.cache.layouts import by_slot
from harness.cache.quantise import bits_of
from harness.cache.verify import verify_cache
from harness.case import Case, Placement, Rows
from harness.errors import SetupBug
from harness.kernel.failures import memory_shortage
from harness.problem.problem import Problem, build_problem

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
ROWS = Rows("r", (3, 1), (20, 30))  # 2 pages each
CASE = Case(
    "m", "k", ROWS, num_q_heads=2, head_size=64, kv_dtype="fp8_e4m3", descales_per="page", num_pages=300,
    pool="aliased", placement=Placement("explicit", "far", ((260, 7), (261, 299))),
)  # fmt: skip
TWICE = replace(CASE, rows=Rows("r", (3, 1), (20, 40)), placement=Placement("explicit", "t", ((260, 7), (8, 261, 8))))


def built(case: Case, device: torch.device, content: Content = Content.ALL) -> tuple[Problem, KVCache]:
    problem = build_problem(case, device)
    return problem, build_cache(problem, content)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("strides", ["compact", "cache"])
@pytest.mark.parametrize("layout", ["linear_nhd", "hnd", "vllm_classic", "vectorized"])
def test_dense_and_aliased_caches_have_the_same_strides_and_bits(
    layout: str, strides: str, device: torch.device
) -> None:
    case = replace(CASE, layout=layout, strides=strides)
    problem, aliased = built(case, device)
    verify_cache(problem, aliased, Content.ALL)
    _, dense = built(replace(case, pool="dense"), device)
    assert {name: pool.kind for name, pool in aliased.pools.items()} == {"k": "aliased", "v": "aliased"}
    assert dense.pools == {}
    for one, other in ((aliased.k, dense.k), (aliased.v, dense.v)):
        assert (one.shape, one.stride()) == (other.shape, other.stride())
        assert one.shape[0] == 300
        assert torch.equal(bits_of(one), bits_of(other))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("kind", ["aliased", "dense"])
@pytest.mark.parametrize("where", ["a tail", "an unused page", "page 0", "a neighbour's token"])
def test_what_should_not_be_there_is_red_before_the_launch(where: str, kind: str, device: torch.device) -> None:
    problem, cache = built(replace(CASE, pool=kind), device)
    verify_cache(problem, cache, Content.ALL)
    slots = by_slot(bits_of(cache.v), "linear_nhd", "v").view  # [pages, slot, heads, dim]
    if where == "a neighbour's token":
        slots[261] = slots[260].clone()
    else:
        slots[{"a tail": (299, 15), "an unused page": (150, 3), "page 0": (0, 0)}[where]] = 1
    with pytest.raises(SetupBug) as caught:
        verify_cache(problem, cache, Content.ALL)
    assert caught.value.tensor == "v_cache"


def test_a_dense_pool_is_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cache.dead._AT_ONCE", 1000)
    problem, cache = built(replace(CASE, pool="dense"), DEVICES[0])
    verify_cache(problem, cache, Content.ALL)
    bits_of(cache.k)[150, 3, 1, 5] = 1
    with pytest.raises(SetupBug, match=r"poison in page 150 \(unused\), slot 3"):
        verify_cache(problem, cache, Content.ALL)


@pytest.mark.parametrize(("used", "num_pages", "kind"), [(2, 300, "aliased"), (2, 7, "dense"), (2, 100, "dense")])
def test_auto_aliases_what_is_large_and_mostly_unused(
    used: int, num_pages: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_bytes = 16 * 2 * 64
    monkeypatch.setattr(page_pool, "LARGE", 5 * page_bytes if num_pages == 7 else 200 * page_bytes)
    rows, pages = Rows("r", (1,), (20,)), Placement("explicit", "two", ((2, 5),))
    _, cache = built(replace(CASE, rows=rows, placement=pages, num_pages=num_pages, pool="auto"), torch.device("cpu"))
    assert {pool.kind for pool in cache.pools.values()} == ({"aliased"} if kind == "aliased" else set())


def test_a_large_dense_pool_is_asked_for_first_and_the_words_name_whose_memory_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_pool, "LARGE", 1000)
    monkeypatch.setattr(pools, "available", lambda device: 1 << 20)
    problem = build_problem(replace(CASE, pool="dense"), "cpu")
    with pytest.raises(MemoryError) as caught:
        build_cache(problem, Content.ALL)
    said = "a dense pool needs 1,228,800 bytes on cpu, and 1,048,576 are free"
    assert memory_shortage(caught.value) == f"host memory: {said}"
    with pytest.raises(MemoryError) as caught:
        pools.require_memory(1 << 20, torch.device("cuda"))
    assert memory_shortage(caught.value) == (
        "device memory: a dense pool needs 1,048,576 bytes on cuda, and 1,048,576 are free"
    )


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("content", list(Content))
def test_a_page_that_a_sequence_has_twice_holds_the_same_tokens_and_descales(
    content: Content, device: torch.device
) -> None:
    problem, cache = built(TWICE, device, content)
    verify_cache(problem, cache, content)
    start = problem.key_start[1]
    for tensor in (problem.k, problem.v, cache.key_payload.float(), cache.value_payload.float()):
        assert torch.equal(tensor[start : start + 9], tensor[start + 32 : start + 41])
        assert not torch.equal(tensor[start : start + 9], tensor[start + 16 : start + 25])
    assert problem.structured
    by_page, by_token = problem.descales, build_problem(replace(TWICE, descales_per="token"), device).descales
    for descales, size in ((by_page[2:], 1), (by_token[start:], 16)):  # of the second sequence
        count = min(size, 9)
        assert torch.equal(descales[:count], descales[2 * size : 2 * size + count])
        assert not torch.equal(descales[:count], descales[size : size + count])


@pytest.mark.parametrize("where", ["the shared page", "behind both ends", "a page of one's own"])
def test_a_page_held_twice_is_verified_once_for_all(where: str) -> None:
    problem, cache = built(TWICE, DEVICES[0])
    slot: Any = {"the shared page": (8, 12), "behind both ends": (8, 9), "a page of one's own": (261, 3)}[where]
    cache.k[slot] = cache.k[261, 4] if where != "a page of one's own" else torch.nan
    with pytest.raises(SetupBug):
        verify_cache(problem, cache, Content.ALL)
