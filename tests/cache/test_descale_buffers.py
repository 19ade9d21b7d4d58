"""Descales by head and token: honest buffers are green, strided ones too; a wrong one is found and its owner named."""

from __future__ import annotations

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
from harness.case import Case, Rows
from harness.errors import SetupBug
from harness.problem.problem import Problem, build_problem

ROWS = Rows("r", (5, 1, 7, 1, 3, 1), (40, 60, -3, -1, 33, 100))
CASE = Case("m", "k", ROWS, num_q_heads=6, gqa_ratio=2, head_size=24, kv_dtype="int8", strides="cache")
Edit = Callable[[KVCache], KVCache]


@pytest.mark.parametrize("content", Content)
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz", "int8"])
def test_honest_caches_are_green(kv_dtype: str, content: Content) -> None:
    grid = itertools.product(["tensor", "head", "page", "token"], ["compact", "cache", "all"], ["nan", "loud"])
    for number, (per, strides, tail) in enumerate(grid):
        case = replace(
            CASE,
            kv_dtype=kv_dtype,
            descales_per=per,
            strides=strides,
            tail=tail,
            page_size=(1, 16, 24)[number % 3],
            layout=("linear_nhd", "vllm_classic")[number % 2],
            dtype=("fp16", "bf16", "fp32")[number % 3],
        )
        problem = build_problem(case, "cpu")
        cache = build_cache(problem, content)
        verify_cache(problem, cache, content)
        k, v = effective_kv(problem, cache, content)
        assert 0.9 < float(k.std()) < 1.1
        assert 0.9 < float(v.std()) < 1.1
        live = sum(cache.cached_lens)
        for scale in (cache.k_scale, cache.v_scale):
            assert scale.shape == ((3,) if per == "head" else (1,))
            assert bool(scale.isnan().all()) == (per in ("page", "token"))
        for buffer in (cache.k_token_descale, cache.v_token_descale):
            assert (buffer is not None) == (per == "token")
            if buffer is not None:
                assert buffer.shape == (cache.num_pages, case.page_size, 3)
                assert int((~buffer.isnan()).sum()) == 3 * live


def test_the_strides_of_views_follow_from_no_shape() -> None:
    problem = build_problem(replace(CASE, descales_per="token"), "cpu")
    by_token = build_cache(problem, Content.ALL)
    by_head = build_cache(build_problem(replace(CASE, descales_per="head"), "cpu"), Content.ALL)
    k, v = by_token.k_token_descale, by_token.v_token_descale
    assert k is not None
    assert v is not None
    assert k.stride() == (4 * 18, 1, 18)  # head by head
    assert v.stride() == (17 * 6, 6, 1)
    assert (by_head.k_scale.stride(0), by_head.v_scale.stride(0)) == (3, 2)


def red(per: str, edit: Edit) -> tuple[SetupBug, KVCache]:
    problem = build_problem(replace(CASE, descales_per=per), "cpu")
    cache = build_cache(problem, Content.ALL)
    with pytest.raises(SetupBug) as caught:
        verify_cache(problem, edit(cache), Content.ALL)
    return caught.value, cache


def in_place(change: Callable[[torch.Tensor, KVCache], object], name: str = "v_token_descale") -> Edit:
    def edit(cache: KVCache) -> KVCache:
        change(getattr(cache, name), cache)
        return cache

    return edit


def test_a_wrong_token_descale_is_found_and_its_owner_named() -> None:
    page = build_cache(build_problem(replace(CASE, descales_per="token"), "cpu"), Content.ALL).pages[5][2]
    place = f" for kv head 1 of sequence 5, position 35 (page {page}, slot 3)"
    for change, got in (
        (lambda t, c: t[page, 3, 1].copy_(t[page, 4, 1]), f"like kv head 1 of page {page}, slot 4"),
        (lambda t, c: t[page, 3, 1].copy_(t[page, 3, 2]), f"like kv head 2 of page {page}, slot 3"),
        (lambda t, c: t[page, 3, 1].fill_(math.nan), "NaN"),
        (lambda t, c: t[page, 3, 1].mul_(1 + 2.0**-22), ""),
        (lambda t, c: t[page, 3, 1].copy_(c.k_token_descale[page, 3, 1]), ""),
    ):
        bug, _ = red("token", in_place(change))
        assert bug.tensor == "v_token_descale"
        assert bug.expected.endswith(place)
        assert bug.got.endswith(got)


def test_a_wrong_descale_of_a_head_is_found() -> None:
    bug, cache = red("head", in_place(lambda t, c: t[1].copy_(t[2]), "k_scale"))
    assert (bug.tensor, bug.expected.split(" ", 1)[1]) == ("k_scale", "for kv head 1")
    assert bug.got == f"{float(cache.k_scale[2]):g}, like kv head 2"
    bug, _ = red("head", lambda cache: replace(cache, k_scale=cache.k_scale[:1]))
    assert (bug.tensor, bug.expected, bug.got) == ("k_scale", "3 descales", "1")


def test_what_nobody_owns_is_nan() -> None:
    def tail(t: torch.Tensor, c: KVCache) -> None:
        t[c.pages[0][-1], 45 % 16] = 0.5

    def gap(t: torch.Tensor, c: KVCache) -> None:
        t.as_strided((1,), (1,), t.stride(0) - 1).fill_(0.25)

    for change in (tail, gap):
        for name in ("k_token_descale", "v_token_descale"):
            bug, _ = red("token", in_place(change, name))
            assert bug.tensor == name
            assert bug.expected.startswith("NaN in page ")
    bug, _ = red("head", in_place(lambda t, c: t.as_strided((1,), (1,), 1).fill_(0.25), "v_scale"))
    assert bug.expected == "NaN in a gap behind kv head 0 where no sequence has a descale"


def test_buffers_of_another_granularity_are_refused() -> None:
    problem = build_problem(replace(CASE, descales_per="token"), "cpu")
    by_token = build_cache(problem, Content.ALL)
    bug, _ = red("page", lambda cache: replace(cache, k_token_descale=by_token.k_token_descale))
    assert (bug.tensor, bug.expected, bug.got) == ("k_token_descale", "None", "a tensor")
    bug, _ = red("token", lambda cache: replace(cache, v_token_descale=None))
    assert (bug.tensor, bug.expected, bug.got) == ("v_token_descale", "a tensor", "None")
    bug, _ = red("token", lambda cache: replace(cache, k_scale=torch.ones(1)))
    assert (bug.tensor, bug.got) == ("k_scale", "1")


def test_an_int8_cache_tells_poison_from_content_by_its_bits() -> None:
    """There is no NaN: -128 stands for it, in words as in bits."""

    def with_content(problem: Problem, cache: KVCache) -> KVCache:
        cache.k[cache.pages[0][-1], 45 % 16] = 127  # behind the last token
        return cache

    problem = build_problem(replace(CASE, descales_per="token"), "cpu")
    cache = build_cache(problem, Content.ALL)
    assert int(cache.key_payload.to(torch.int16).abs().max()) == 127
    assert bool((cache.k[cache.pages[0][-1], 45 % 16] == -128).all())
    with pytest.raises(SetupBug, match="position 45, which nothing may be read from, holds 127"):
        verify_cache(problem, with_content(problem, cache), Content.ALL)
    lost = build_cache(problem, Content.ALL, cached_lens=(45, 60, 4, 0, 36, 101))
    with pytest.raises(SetupBug, match="position 60 is poison"):
        verify_cache(problem, lost, Content.ALL)
    saturated = cache.key_payload.clone()
    saturated[3, 1, 2] = -128
    with pytest.raises(SetupBug, match="payload -128"):
        verify_cache(problem, replace(cache, key_payload=saturated), Content.ALL)
