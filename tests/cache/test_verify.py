"""Honest caches are green; every planted set-up fault is red, in the kernel's terms."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from harness.cache.build import KVCache, build_cache
from harness.cache.content import Content
from harness.cache.layouts import by_slot
from harness.cache.quantise import bits_of, quantise
from harness.cache.verify import verify_cache
from harness.case import Case, Placement, Rows
from harness.dtypes import element_type
from harness.errors import SetupBug
from harness.layout import LAYOUTS
from harness.problem.admission import layout_refusal
from harness.problem.problem import Problem, build_problem

ROWS = Rows("r", (5, 1, 7, 1, 3, 1), (40, 60, -3, -1, 33, 500))
CASE = Case("m", "k", ROWS, num_q_heads=4, gqa_ratio=2, head_size=24, kv_dtype="fp8_e4m3")


@pytest.mark.parametrize("content", Content)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_honest_caches_are_green(content: Content, layout: str) -> None:
    grid = itertools.product(
        ["compact", "all"],
        ["auto", "fp8_e4m3", "fp8_e5m2"],
        ["nan", "loud"],
        [1, 16, 24, 544],
        ["shuffled", "reversed"],
    )
    # every fifth, other ones of each layout and content class
    some = itertools.islice(enumerate(grid), (list(LAYOUTS).index(layout) + list(Content).index(content)) % 5, None, 5)
    for number, (strides, kv_dtype, tail, page_size, kind) in some:
        case = replace(
            CASE,
            layout=layout,
            strides=strides,
            kv_dtype=kv_dtype,
            tail=tail,
            page_size=page_size,
            placement=Placement(kind, kind),
            dtype=("fp16", "bf16", "fp32")[number % 3],
            table_padding=("poison_page", "out_of_range", "exact")[number % 3],
            head_size_v=(None, 16)[number % 2],
            page_table=("block_table", "kv_indices")[number // 3 % 2],
            head_size=32 if layout == "vectorized" else 24,
        )
        if layout_refusal(case) is None:
            problem = build_problem(case, "cpu")
            verify_cache(problem, build_cache(problem, content), content)


@pytest.mark.parametrize("content", Content)
def test_a_shared_prefix_is_green(content: Content) -> None:
    case = replace(CASE, rows=Rows("r", (5, 1, 3), (40, 60, 33)), placement=Placement("shared_prefix", "shared"))
    problem = build_problem(case, "cpu")
    verify_cache(problem, build_cache(problem, content), content)


def red(problem: Problem, cache: KVCache, content: Content) -> SetupBug:
    with pytest.raises(SetupBug) as caught:
        verify_cache(problem, cache, content)
    return caught.value


def edited(cache: KVCache, layout: str, edit: Callable[[torch.Tensor, str], None]) -> KVCache:
    """`cache` with `edit` (slots [page, slot, ...] as integers, "k" or "v") applied to copies of its pools."""
    k, v = cache.k.clone(), cache.v.clone()
    for tensor, which in ((k, "k"), (v, "v")):
        edit(by_slot(bits_of(tensor), layout, which).view, which)
    return replace(cache, k=k, v=v)


def test_the_newest_token_of_a_decode_row_is_missing() -> None:
    problem = build_problem(CASE, "cpu")
    cache = build_cache(problem, Content.BY_PHASE, cached_lens=(40, 60, 0, 0, 33, 500))
    bug = red(problem, cache, Content.BY_PHASE)
    assert bug.tensor == "k_cache"
    assert bug.expected == (
        "decode row, sequence 1: positions 0..60 (content class by_phase: a decode kernel has no other source for the "
        "current token)"
    )
    assert bug.got == "position 60 is poison"


def test_a_token_too_many_or_too_few_is_red_in_every_class() -> None:
    problem = build_problem(CASE, "cpu")
    for content in Content:
        honest = build_cache(problem, content)
        for seq, change in itertools.product((0, 5), (-1, 1)):
            lens = list(honest.cached_lens)
            lens[seq] = min(lens[seq] + change, CASE.rows.seq_lens[seq])
            if tuple(lens) != honest.cached_lens:
                bug = red(problem, build_cache(problem, content, cached_lens=lens), content)
                assert f"sequence {seq}:" in bug.expected


def test_new_tokens_where_only_the_context_belongs() -> None:
    problem = build_problem(CASE, "cpu")
    bug = red(problem, build_cache(problem, Content.ALL), Content.BY_PHASE)
    assert "prefill row, sequence 0: positions 0..39" in bug.expected
    assert bug.got == "position 40 holds the token of sequence 0, position 40"


@pytest.mark.parametrize("layout", ["linear_nhd", "vllm_classic"])
def test_a_token_in_the_wrong_slot(layout: str) -> None:
    problem = build_problem(replace(CASE, layout=layout), "cpu")
    cache = build_cache(problem, Content.ALL)
    page = cache.pages[5][2]  # positions 32..47 of sequence 5

    def shift(slots: torch.Tensor, which: str) -> None:
        if which == "v":
            slots[page] = slots[page].roll(1, 0)

    bug = red(problem, edited(cache, layout, shift), Content.ALL)
    assert bug.tensor == "v_cache"
    assert "decode row, sequence 5: positions 0..500" in bug.expected
    assert bug.got == "position 32 holds the token of sequence 5, position 47"


def test_swapped_pages_and_a_swapped_table() -> None:
    problem = build_problem(CASE, "cpu")
    cache = build_cache(problem, Content.ALL)
    a, b = cache.pages[1][0], cache.pages[5][1]

    def swap(slots: torch.Tensor, which: str) -> None:
        slots[[a, b]] = slots[[b, a]]

    bug = red(problem, edited(cache, CASE.layout, swap), Content.ALL)
    assert bug.got == "position 0 holds the token of sequence 5, position 16"
    table = cache.block_table.clone()
    table[5, [0, 1]] = table[5, [1, 0]]
    bug = red(problem, replace(cache, block_table=table), Content.ALL)
    assert bug.got == "position 0 holds the token of sequence 5, position 16"
    table[5, 3] = cache.num_pages
    assert red(problem, replace(cache, block_table=table), Content.ALL).tensor == "block_table"


def test_a_wrong_list_of_pages() -> None:
    problem = build_problem(replace(CASE, page_table="kv_indices"), "cpu")
    cache = build_cache(problem, Content.ALL)
    assert cache.kv_page_indices is not None
    assert cache.kv_indptr is not None
    first = int(cache.kv_indptr[5])

    def listed(entry: int, page: int) -> KVCache:
        assert cache.kv_page_indices is not None
        pages = cache.kv_page_indices.clone()
        pages[entry] = page
        return replace(cache, kv_page_indices=pages)

    bug = red(problem, listed(first + 1, cache.pages[5][0]), Content.ALL)
    assert bug.got == "position 16 holds the token of sequence 5, position 0"
    assert red(problem, listed(first, cache.num_pages), Content.ALL).tensor == "kv_page_indices"
    short = replace(cache, kv_page_indices=cache.kv_page_indices[: first + 3])
    assert red(problem, short, Content.ALL).expected == f"32 page ids in [0, {cache.num_pages}) for sequence 5"
    bug = red(problem, replace(cache, kv_indptr=cache.kv_indptr + 1), Content.ALL)
    assert bug.got == "position 0 holds the token of sequence 0, position 16"


@pytest.mark.parametrize("strides", ["compact", "cache"])
def test_a_pool_of_zeros(strides: str) -> None:
    problem = build_problem(replace(CASE, strides=strides), "cpu")
    bug = red(problem, build_cache(problem, Content.ALL, poison=0.0), Content.ALL)
    assert bug.got == "position 45 is zero"  # the tail of the last page of sequence 0


@pytest.mark.parametrize("layout", ["linear_nhd", "vllm_classic"])
def test_memory_that_no_token_owns(layout: str) -> None:
    problem = build_problem(replace(CASE, layout=layout, strides="cache"), "cpu")
    cache = build_cache(problem, Content.ALL)
    unused = min(set(range(1, cache.num_pages)) - {page for pages in cache.pages for page in pages})

    def poke(page: int, slot: int) -> Callable[[torch.Tensor, str], None]:
        def edit(slots: torch.Tensor, which: str) -> None:
            slots[(page, slot, 1, *(0 for _ in slots.shape[3:]))] = 0

        return edit

    # clones of strided views are compact: write into the storage of the cache itself instead
    for page, slot, words in ((unused, 3, f"page {unused} (unused), slot 3"), (0, 7, "page 0 (the null page), slot 7")):
        spoiled = build_cache(problem, Content.ALL)
        poke(page, slot)(by_slot(bits_of(spoiled.v), layout, "v").view, "v")
        bug = red(problem, spoiled, Content.ALL)
        assert (bug.tensor, bug.expected, bug.got) == ("v_cache", f"poison in {words}", "0")
    spoiled = build_cache(problem, Content.ALL)
    bits_of(spoiled.k).as_strided((1,), (1,), spoiled.k.stride(0) * 3 - 1).fill_(1)
    assert red(problem, spoiled, Content.ALL).expected == "poison in the stride gap in page 2"


def test_a_missing_descale() -> None:
    problem = build_problem(CASE, "cpu")
    cache = build_cache(problem, Content.ALL)
    stored = element_type(CASE.kv_dtype)
    unscaled = quantise(problem.v, 1.0, stored)
    bug = red(problem, replace(cache, value_payload=unscaled), Content.ALL)  # the builder's own mistake
    assert bug.tensor == "v_cache"
    assert "stored as fp8_e4m3 at descale" in bug.expected
    other = build_cache(replace(problem, descales=torch.ones(1, 1, 2)), Content.ALL)
    bug = red(problem, replace(cache, v=other.v), Content.ALL)
    assert bug.got == "position 0 holds its value without the descale"
    bug = red(problem, replace(cache, k_scale=torch.ones(1)), Content.ALL)
    assert (bug.tensor, bug.got) == ("k_scale", "1")


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e5m2"])
def test_k_and_v_exchanged(kv_dtype: str) -> None:
    problem = build_problem(replace(CASE, kv_dtype=kv_dtype), "cpu")
    cache = build_cache(problem, Content.ALL)
    bug = red(problem, replace(cache, k=cache.v, v=cache.k), Content.ALL)
    assert bug.got == "position 0 holds v of the token of sequence 0, position 0"
    both = replace(cache, k=cache.v, v=cache.k, key_payload=cache.value_payload, value_payload=cache.key_payload)
    assert re.match("k_cache: expected .* at sequence 0, position 0, head 0", str(red(problem, both, Content.ALL)))


def test_one_flipped_bit() -> None:
    problem = build_problem(CASE, "cpu")
    cache = build_cache(problem, Content.ALL)
    page = cache.pages[5][31]

    def flip(slots: torch.Tensor, which: str) -> None:
        slots[page, 4, 1, 23] ^= 1

    bug = red(problem, edited(cache, CASE.layout, flip), Content.ALL)
    assert bug.got.startswith("position 500, head 1, dim 23 holds ")


def test_new_tokens_arrive_where_the_contract_takes_them() -> None:
    problem = build_problem(CASE, "cpu")
    context, by_phase = (build_cache(problem, content) for content in (Content.CONTEXT, Content.BY_PHASE))
    assert build_cache(problem, Content.ALL).new_k is None
    for cache, decode_given in ((context, True), (by_phase, False)):
        assert cache.new_k is not None
        assert torch.equal(cache.new_k[:5], problem.k[40:45])  # prefill row, positions 40..44
        assert bool(cache.new_k[6:9].isnan().all())  # before the first key
        assert torch.equal(cache.new_k[9:13], problem.k[problem.key_start[2] : problem.key_start[2] + 4])
        assert bool(cache.new_k[17].isnan().all()) != decode_given
    bug = red(problem, replace(by_phase, new_v=context.new_v), Content.BY_PHASE)
    assert (bug.tensor, bug.expected) == (
        "v",
        "decode row, sequence 1, token 0: poison: a kernel must not take this token from here",
    )
    bug = red(problem, replace(context, new_k=by_phase.new_k), Content.CONTEXT)
    assert (bug.expected, bug.got) == ("decode row, sequence 1, token 0: its new token", "poison")
    assert red(problem, replace(context, new_k=None), Content.CONTEXT).tensor == "k"
