"""Pools: large ranges over little memory, dense where that cannot be had, and MemoryError where neither can."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.cache import pool as pools
from harness.cache import pool_cpu
from harness.cache.build import build_cache
from harness.cache.content import Content
from harness.cache.pool import Extent, dense_pool, filled_pool, granules, make_pool
from harness.cache.verify import verify_cache
from harness.case import Case, Rows
from harness.errors import SetupBug
from harness.problem.problem import build_problem

GB = 1 << 30
CUDA = torch.cuda.is_available()
DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if CUDA else [])]
CASE = Case(
    "m", "k", Rows("r", (1, 1), (20, 14)), num_q_heads=4, gqa_ratio=4, head_size=64, data="needle",
    boundary="elements31", boundary_target="k", boundary_position="above",
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_twelve_gigabytes_of_addresses_over_megabytes_of_memory(device: torch.device) -> None:
    own = [(0, 100), (9 * GB + 5, 9 * GB + 6), (-3 * GB, -3 * GB + 10)]
    pool = make_pool(Extent(4 * GB, 8 * GB + 2 * GB, 0x1230), own, device)
    assert pool.kind == "aliased"
    assert (pool.bytes.data_ptr() + pool.base) % (1 << 32) == 0x1230
    assert pool.physical_bytes < 64 << 20
    view = pool.view(torch.float16, (10, 4), (GB // 2, 1))  # rows 1 GB apart
    assert view.data_ptr() == pool.bytes.data_ptr() + pool.base
    assert bool(view.isnan().all())
    view[9, 2:3] = 1.0  # bytes 9 GB + 4 and 5
    changed = [int((part != 0xFF).sum()) for part in pool.parts()]
    assert sum(changed) == 2  # memory of its own: seen at one place only
    assert not any(int((part != 0xFF).sum()) for part in pool.shared)
    view[5, 0] = 1.0  # no memory of its own: every alias shows it
    assert any(int((part != 0xFF).sum()) for part in pool.shared)


def test_a_range_is_unmapped_when_its_last_tensor_is_gone() -> None:
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = mappings()
    pool = make_pool(Extent(GB, 4 * GB, 0), [(0, 1)], torch.device("cpu"))
    view = pool.view(torch.float32, (2,), (GB // 4,))
    del pool
    gc.collect()
    assert mappings() > before + 100
    assert bool(view.isnan().all())  # the view alone keeps it
    del view
    gc.collect()
    assert mappings() < before + 20


def test_more_addresses_than_there_are_is_a_memory_error() -> None:
    before = len(Path("/proc/self/maps").read_text().splitlines()) if pool_cpu.cpu_can_alias() else 0
    with pytest.raises(MemoryError, match=r"cannot be mapped|is free|are free"):
        make_pool(Extent(0, 1 << 60, 0), [], torch.device("cpu"))
    if before:
        assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 20


def test_the_dense_fallback_asks_first_and_behaves_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = filled_pool(Extent(1 << 12, 1 << 16, 0), 0xFF, torch.device("cpu"))
    assert (pool.kind, pool.physical_bytes) == ("dense", (1 << 12) + (1 << 16))
    assert bool(pool.view(torch.float16, (16, 4), (2048, 1)).isnan().all())
    assert sum(int((part != 0xFF).sum()) for part in pool.parts()) == 0
    monkeypatch.setattr(pools, "available", lambda device: 1 << 20)
    with pytest.raises(MemoryError, match="a dense pool needs 69,632 bytes on cpu, and 1,048,576 are free"):
        filled_pool(Extent(1 << 12, 1 << 16, 0), 0xFF, torch.device("cpu"))


def test_a_tensor_is_a_dense_pool() -> None:
    tensor = torch.zeros(4, 5, dtype=torch.float16)[:, :3]
    pool = dense_pool(tensor)
    assert (pool.kind, pool.physical_bytes, pool.own) == ("dense", 40, ((0, 40),))


def test_granules_are_whole_disjoint_and_hold_what_was_asked_for() -> None:
    assert granules([(5000, 5001), (0, 10), (4000, 4100), (-1, 0)], 4096, 0) == [(-4096, 8192)]
    assert granules([(0, 10)], 4096, 100) == [(-100, 3996)]
    assert granules([(10_000, 10_001), (0, 1)], 4096, 0) == [(0, 4096), (8192, 12288)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    "where", ["a tail", "beside a page", "an address without memory of its own", "a decoy", "a page's token"]
)
def test_what_should_not_be_there_is_red_before_the_launch(where: str, device: torch.device) -> None:
    problem = build_problem(CASE, device)
    cache = build_cache(problem, Content.ALL)
    verify_cache(problem, cache, Content.ALL)
    memory = cache.pools["k"].view(torch.int16, (cache.num_pages,), (cache.k.stride(0),))  # first element of each page
    page = cache.pages[1][0]
    if where == "a tail":
        cache.k[page, 15, 0, 0] = 1.0  # 15 of 16 tokens
    elif where == "beside a page":
        memory[page].as_strided((1,), (1,), memory[page].storage_offset() + 1030).fill_(1)
    elif where == "an address without memory of its own":
        memory[page - 5] = 1
    elif where == "a decoy":
        cache.k.as_strided((1,), (1,), int(cache.decoys[0].offsets[0])).fill_(1.0)
    else:
        memory[page] += 1
    with pytest.raises(SetupBug) as caught:
        verify_cache(problem, cache, Content.ALL)
    assert caught.value.tensor == "k_cache"


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("per", ["page", "token"])
@pytest.mark.parametrize("where", ["in use", "beside a page", "an address without memory of its own", "a decoy"])
def test_a_wrong_descale_far_away_is_red_before_the_launch(where: str, per: str, device: torch.device) -> None:
    case = replace(CASE, boundary_target="descale", kv_dtype="fp8_e4m3", descales_per=per, data="probe")
    problem = build_problem(case, device)
    cache = build_cache(problem, Content.ALL)
    verify_cache(problem, cache, Content.ALL)
    name = "kv_block_descale" if per == "page" else "v_token_descale"
    descales = getattr(cache, name)
    page, start = cache.pages[0][0], int(descales.storage_offset())
    at = {
        "in use": start + page * descales.stride(0),
        "beside a page": start + page * descales.stride(0) + descales[0].numel(),
        "an address without memory of its own": start + (page - 3) * descales.stride(0) // 2,
        "a decoy": int(next(d for d in cache.decoys if d.which == name).offsets[0]),
    }
    descales.as_strided((1,), (1,), at[where]).fill_(1.5)
    with pytest.raises(SetupBug) as caught:
        verify_cache(problem, cache, Content.ALL)
    assert caught.value.tensor == name


def test_pages_in_use_are_distinct_and_the_padding_is_none_of_them() -> None:
    for boundary, target in (("carry", "k"), ("bytes32", "v"), ("elements32", "kv"), ("page16", "kv")):
        for position in ("below", "above", "far"):
            case = replace(CASE, boundary=boundary, boundary_target=target, boundary_position=position)
            cache = build_cache(build_problem(case, "cpu"), Content.ALL)
            used = [page for pages in cache.pages for page in pages]
            assert len(set(used)) == len(used) == 3
            assert set(cache.block_table.flatten().tolist()) - set(used)  # the padding is a page of its own
