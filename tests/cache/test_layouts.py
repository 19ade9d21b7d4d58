"""Payload -> layout -> readback by plain index arithmetic, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cache.address import address
from harness.cache.layouts import allocate, by_slot
from harness.cache.quantise import bits_of
from harness.dtypes import ELEMENT_TYPES, element_type
from harness.layout import LAYOUTS, cache_shape, vector_size


@pytest.mark.parametrize(
    ("head_size", "element_size", "x"),
    [(128, 2, 8), (128, 1, 16), (128, 4, 4), (24, 2, 8), (24, 1, 8), (80, 1, 16), (96, 1, 16), (6, 2, 2), (7, 2, 1)],
)
def test_vector_size(head_size: int, element_size: int, x: int) -> None:
    assert vector_size(head_size, element_size) == x


def element_at(cache: torch.Tensor, layout: str, which: str, page: int, slot: int, head: int, d: int) -> torch.Tensor:
    """One element by the documented shape of `layout`."""
    x = cache.shape[-1]
    if layout == "linear_3d":
        return cache[page, head, d]
    if layout == "linear_nhd":
        return cache[page, slot, head, d]
    if layout == "hnd":
        return cache[page, head, slot, d]
    if which == "k":
        return cache[page, head, d // x, slot, d % x]
    if layout == "vectorized":
        return cache[page, head, slot // x, d, slot % x]
    return cache[page, head, d, slot]


@settings(deadline=None, derandomize=True, max_examples=100, database=None)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    which=st.sampled_from(["k", "v"]),
    stored=st.sampled_from(list(ELEMENT_TYPES)),
    strided=st.booleans(),
    page_size=st.sampled_from([1, 16, 24, 544]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([8, 24, 80]),
    seed=st.integers(0, 1000),
)
def test_round_trip(
    layout: str, which: str, stored: str, strided: bool, page_size: int, heads: int, dim: int, seed: int
) -> None:
    element, pages = element_type(stored), 3
    page_size = 1 if layout == "linear_3d" else page_size
    shape = cache_shape(layout, which, pages, page_size, heads, dim, element.size)
    cache = allocate(layout, which, shape, element, element.poison, strided, "cpu")
    assert tuple(cache.shape) == shape
    assert cache.stride(-1) == 1
    assert cache.is_contiguous() == (not strided)
    tokens = min(pages * page_size - 1, 40)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(pages * page_size, generator=generator)[:tokens]
    page, slot = place // page_size, place % page_size
    low, high = -(1 << (8 * element.size - 1)), (1 << (8 * element.size - 1)) - 1
    payload = torch.randint(low, high, (tokens, heads, dim), generator=generator).to(bits_of(cache).dtype)
    slots = by_slot(bits_of(cache), layout, which)
    slots.store(page, slot, payload)
    assert torch.equal(slots.load(page, slot), payload)

    flat = bits_of(cache).as_strided((cache.untyped_storage().nbytes() // element.size,), (1,), 0)
    offsets = address(cache, layout, which, heads, dim).offsets(page, slot)
    assert torch.equal(flat[offsets].view(tokens, heads, dim), payload)
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[offsets] = False
    assert int(untouched.sum()) == len(flat) - payload.numel()  # no two tokens share an element
    assert bool((flat[untouched] == element.poison).all())

    for token, head, d in ((0, 0, 0), (tokens // 2, heads - 1, dim - 1), (tokens - 1, heads // 2, dim // 2)):
        found = element_at(bits_of(cache), layout, which, int(page[token]), int(slot[token]), head, d)
        assert found == payload[token, head, d]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_stay_aligned_and_strides_of_k_and_v_differ(layout: str) -> None:
    strides = []
    for which in ("k", "v"):
        shape = cache_shape(layout, which, 3, 1 if layout == "linear_3d" else 16, 2, 64, 2)
        cache = allocate(layout, which, shape, element_type("fp16"), element_type("fp16").poison, True, "cpu")
        assert all(stride * 2 % 16 == 0 for stride in cache.stride()[:2])  # pages and heads, or slots
        strides.append(cache.stride()[:2])
    assert all(k != v for k, v in zip(*strides, strict=True))


def test_strided_views_of_vectorized_have_gaps_behind_pages_and_heads_only() -> None:
    """Kernels take the strides inside a head from the shape: K x and page * x, V x and d * x."""
    for which in ("k", "v"):
        shape = cache_shape("vectorized", which, 3, 32, 2, 64, 2)
        assert shape == ((3, 2, 8, 32, 8) if which == "k" else (3, 2, 4, 64, 8))
        cache = allocate("vectorized", which, shape, element_type("fp16"), element_type("fp16").poison, True, "cpu")
        assert cache.stride()[2:] == ((32 * 8, 8, 1) if which == "k" else (64 * 8, 8, 1))
        assert cache.stride(1) > 32 * 64
        assert cache.stride(0) > 2 * cache.stride(1)
