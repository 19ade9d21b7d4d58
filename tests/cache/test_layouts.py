"""Payload -> layout -> readback by plain index arithmetic, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cache.address import address
from harness.cache.layouts import LAYOUTS, allocate, as_stored, by_slot, cache_shape, vector_size
from harness.cache.quantise import bits_of
from harness.dtypes import ELEMENT_TYPES, element_type


@pytest.mark.parametrize(
    ("head_size", "element_size", "x"),
    [(128, 2, 8), (128, 1, 16), (128, 4, 4), (24, 2, 8), (24, 1, 8), (80, 1, 16), (96, 1, 16), (6, 2, 2), (7, 2, 1)],
)
def test_vector_size(head_size: int, element_size: int, x: int) -> None:
    assert vector_size(head_size, element_size) == x


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(
    layout=st.sampled_from(LAYOUTS),
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
    shape = cache_shape(layout, which, pages, page_size, heads, dim, element.size)
    cache = allocate(layout, which, shape, element, element.poison, strided, "cpu")
    assert tuple(cache.shape) == shape
    assert cache.stride(-1) == 1
    assert cache.is_contiguous() == (not strided)
    tokens = min(pages * page_size - 1, 40)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randperm(pages * page_size, generator=generator)[:tokens]
    low, high = -(1 << (8 * element.size - 1)), (1 << (8 * element.size - 1)) - 1
    payload = torch.randint(low, high, (tokens, heads, dim), generator=generator).to(bits_of(cache).dtype)
    slots = bits_of(by_slot(cache, layout))
    slots[place // page_size, place % page_size] = as_stored(payload, slots)

    flat = bits_of(cache).as_strided((cache.untyped_storage().nbytes() // element.size,), (1,), 0)
    offsets = address(cache, layout, which, heads, dim).offsets(place // page_size, place % page_size)
    assert torch.equal(flat[offsets].view(tokens, heads, dim), payload)
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[offsets] = False
    assert int(untouched.sum()) == len(flat) - payload.numel()  # no two tokens share an element
    assert bool((flat[untouched] == element.poison).all())

    page, slot = int(place[0]) // page_size, int(place[0]) % page_size
    for head, d in ((0, 0), (heads - 1, dim - 1), (heads // 2, dim // 2)):
        if layout == "linear_nhd":
            element_at = bits_of(cache)[page, slot, head, d]
        elif which == "k":
            x = shape[4]
            element_at = bits_of(cache)[page, head, d // x, slot, d % x]
        else:
            element_at = bits_of(cache)[page, head, d, slot]
        assert element_at == payload[0, head, d]


def test_rows_stay_aligned_and_strides_of_k_and_v_differ() -> None:
    strides = []
    for which in ("k", "v"):
        shape = cache_shape("linear_nhd", which, 3, 16, 2, 64, 2)
        cache = allocate("linear_nhd", which, shape, element_type("fp16"), element_type("fp16").poison, True, "cpu")
        assert all(stride * 2 % 16 == 0 for stride in cache.stride()[:-1])
        strides.append(cache.stride()[:-1])
    assert all(k != v for k, v in zip(*strides, strict=True))
