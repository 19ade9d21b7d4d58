"""The plan of a pool on a GPU, against a driver that only keeps books: every address is mapped once, by a whole
allocation, and everything is undone in the reverse order.
"""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch

from harness.cache import pool_gpu
from harness.cache.pool import Extent, Pool

START, GRANULE = 0x7F00_0000_0000, 4096
DEVICE = torch.device("cuda", 0)
OWN = [(0, 10), (70_000, 80_000), (-50_000, -49_000), (900_000, 900_001)]


class Books:
    """A driver without a device. `refuse`: (call, number of successes before it fails)."""

    def __init__(self, refuse: tuple[str, int] | None = None) -> None:
        self.log: list[tuple[str, tuple[int, ...]]] = []
        self.sizes: dict[int, int] = {}  # of allocations, by handle
        self.refuse = refuse

    def status(self, name: str, *args: Any) -> int:
        if self.refuse and name == self.refuse[0] and sum(n == name for n, _ in self.log) >= self.refuse[1]:
            return 2
        if name == "AddressReserve":
            args[0]._obj.value = START
        if name == "Create":
            args[0]._obj.value = len(self.sizes) + 1
            self.sizes[len(self.sizes) + 1] = args[1].value
        self.log.append((name, tuple(getattr(arg, "value", 0) for arg in args)))
        return 0

    def call(self, name: str, *args: Any) -> None:
        if self.status(name, *args):
            raise MemoryError(f"an aliased pool cannot be had: {name}: out of memory")

    def of(self, name: str) -> list[tuple[int, ...]]:
        return [args for logged, args in self.log if logged == name]


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> Books:
    driver = Books()

    def show(memory: Any, first: int, span: int) -> torch.Tensor:
        memory.first, memory.span = first, span
        data = torch.zeros(span, dtype=torch.uint8)
        data.memory = memory  # type: ignore[attr-defined]  # a tensor over it would keep it
        return data

    monkeypatch.setattr(pool_gpu, "_driver", lambda: driver)
    monkeypatch.setattr(pool_gpu._Range, "show", show)
    monkeypatch.setattr("torch.cuda.synchronize", lambda index: driver.log.append(("synchronize", (index,))))
    return driver


def make(low_bits: int) -> Pool:
    return pool_gpu.aliased_pool_gpu(Extent(100_000, 1_000_000, low_bits), OWN, 0xFF, DEVICE, GRANULE)


@pytest.mark.parametrize("low_bits", [0, 0x1230, 0xFFFF_F000])
def test_every_address_is_mapped_once_by_a_whole_allocation(books: Books, low_bits: int) -> None:
    pool = make(low_bits)
    maps = sorted(books.of("Map"))  # address, size, offset, handle, flags
    assert all(size == books.sizes[handle] and offset == 0 for _, size, offset, handle, _ in maps)
    assert all(address % GRANULE == 0 for address, *_ in maps)
    assert all(a + size == b for (a, size, *_), (b, *_) in itertools.pairwise(maps))
    first, end = maps[0][0], maps[-1][0] + maps[-1][1]
    (_, reserved, *_), *_ = books.of("AddressReserve")
    assert START <= first < end <= START + reserved
    assert len(pool.bytes) == end - first
    base = first + pool.base
    assert base % (1 << 32) == low_bits
    assert first <= base - 100_000
    assert base + 1_000_000 <= end
    users: dict[int, list[int]] = {}
    for address, _, _, handle, _ in maps:
        users.setdefault(handle, []).append(address - base)
    for low, high in OWN:
        owners = [(h, at) for h, at in users.items() for a in at if a < high and a + books.sizes[h] > low]
        assert owners
        assert all(len(at) == 1 for _, at in owners)  # no alias of it
    assert pool.physical_bytes == sum(books.sizes.values())
    assert all(int(part.min()) == 0xFF for part in pool.parts())
    shared = pool.shared[0]
    assert shared.data_ptr() + len(shared) == pool.bytes.data_ptr() + len(pool.bytes)
    assert users[maps[-1][3]] != [maps[-1][0] - base]  # the last block is one alias of many


def test_all_is_undone_in_reverse_order_after_the_device_has_come_to_rest(books: Books) -> None:
    pool = make(0)
    done = [(name, args) for name, args in books.log if name in ("AddressReserve", "Create", "Map")]
    before = len(books.log)
    del pool
    gc.collect()
    undone = books.log[before:]
    assert undone[0][0] == "synchronize"
    inverse = {"AddressReserve": "AddressFree", "Create": "Release", "Map": "Unmap"}
    assert [name for name, _ in undone[1:]] == [inverse[name] for name, _ in reversed(done)]
    mapped = [args[:2] for name, args in done if name == "Map"]
    assert [args for name, args in undone if name == "Unmap"] == mapped[::-1]


@pytest.mark.parametrize("size", [0, 1, GRANULE, GRANULE + 1])
def test_fenced_memory_has_reserved_addresses_around_it_that_nothing_is_mapped_to(books: Books, size: int) -> None:
    data = pool_gpu.fenced_gpu(size, 3 * GRANULE - 1, DEVICE, GRANULE)
    ((first, span, _, handle, _),) = books.of("Map")
    (_, reserved, *_), *_ = books.of("AddressReserve")
    assert (first, len(data), books.sizes[handle]) == (START + 3 * GRANULE, span, span)
    assert size <= span < size + GRANULE + (not size)
    assert START + reserved == first + span + 3 * GRANULE
    before = len(books.log)
    del data
    gc.collect()
    assert [name for name, _ in books.log[before:]] == ["synchronize", "Unmap", "Release", "AddressFree"]


@pytest.mark.parametrize("refuse", [("Create", 3), ("Map", 5), ("AddressReserve", 0)])
def test_a_refusal_is_a_memory_error_and_leaves_nothing_behind(books: Books, refuse: tuple[str, int]) -> None:
    books.refuse = refuse
    with pytest.raises(MemoryError, match="out of memory"):
        make(0)
    gc.collect()
    assert len(books.of("Unmap")) == len(books.of("Map"))
    assert len(books.of("Release")) == len(books.of("Create"))
    assert len(books.of("AddressFree")) == len(books.of("AddressReserve"))
