"""Grids and reads against brute force: an address is decoded to what it addresses, whatever the strides and tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.access.grid import GAP, Grid, cache_grid
from harness.access.reads import resolve
from harness.cache.layouts import allocate, by_slot
from harness.dtypes import element_type
from harness.interpreter.trace import Load, lanes
from harness.layout import LAYOUTS, cache_shape

PAGES, HEADS, DIMS = 3, 2, 16


def pointers(tensor: torch.Tensor) -> np.ndarray:
    """Address of every element: [*shape]"""
    steps = [np.arange(n) * s * tensor.element_size() for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return (tensor.data_ptr() + sum(np.ix_(*steps))).astype(np.uint64)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_of_a_cache_has_its_cell_and_dim(layout: str, which: str, strided: bool) -> None:
    stored, num_slots = element_type("fp16"), 1 if layout == "linear_3d" else 16
    shape = cache_shape(layout, which, PAGES, num_slots, HEADS, DIMS, stored.size)
    cache = allocate(layout, which, shape, stored, 0, strided, "cpu")
    grid = cache_grid(cache, layout, which)
    assert grid is not None
    assert (grid.num_cells, grid.num_dims) == (PAGES * num_slots * HEADS, DIMS)
    in_order = by_slot(cache, layout, which).view  # [page, slot, head, dim] but for the splits
    cell, dim = grid.decode(pointers(in_order).reshape(-1))
    assert cell.tolist() == np.repeat(np.arange(PAGES * num_slots * HEADS), DIMS).tolist()
    assert dim.tolist() == np.tile(np.arange(DIMS), PAGES * num_slots * HEADS).tolist()
    whole = np.arange(cache.untyped_storage().nbytes() // 2, dtype=np.uint64) * 2 + cache.untyped_storage().data_ptr()
    found, _ = grid.decode(whole.astype(np.uint64))
    assert (found != GAP).sum() == cache.numel()
    assert grid.decode(whole[:1] + np.uint64(1))[0].tolist() == [GAP]
    outside = np.array([cache.data_ptr() - 2, cache.data_ptr() - 2**20, whole[-1] + 2], dtype=np.uint64)
    assert grid.decode(outside)[0].tolist() == [GAP] * 3


def test_elements_that_overlap_have_no_grid() -> None:
    assert Grid.of(torch.zeros(4).expand(3, 4), (4, 1), (0, 0)) is None
    assert Grid.of(torch.zeros(8).as_strided((3, 4), (2, 1)), (4, 1), (0, 0)) is None


TILES = {  # addresses of [keys, dims] of a cache [keys, heads, dims], as kernels make them
    "keys by dims": lambda at: at[:, 1, :],
    "dims by keys": lambda at: at[:, 1, :].T,
    "one key": lambda at: at[2, 0, :],
    "one dim": lambda at: at[:, 0, 3],
    "three axes": lambda at: at[:5].transpose(2, 0, 1),
    "diagonal": lambda at: at[np.arange(6)[:, None], 0, (np.arange(6)[:, None] + np.arange(3)) % 8],
}


@pytest.mark.parametrize("tile", TILES)
@settings(max_examples=30)
@given(data=st.data())
def test_a_load_is_resolved_to_the_very_elements_it_had(tile: str, data: st.DataObject) -> None:
    cache = torch.zeros(6, 2, 8)
    at = TILES[tile](pointers(cache))
    kinds = ["none", "any", "product"] if at.ndim == 2 else ["none", "any"]
    kind = data.draw(st.sampled_from(kinds))
    flags = [np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool) for n in at.shape]
    mask = None
    if kind == "any":
        drawn = data.draw(st.lists(st.booleans(), min_size=at.size, max_size=at.size))
        mask = np.array(drawn, dtype=bool).reshape(at.shape)
    elif kind == "product":
        mask = flags[0][:, None] & flags[1]
    wanted = at.reshape(-1) if mask is None else at[mask]
    if not wanted.size:
        return
    rows, cols = lanes(at, mask)
    assert sorted((rows[:, None] + cols).reshape(-1).tolist()) == sorted(wanted.tolist())
    assert cols[0] == 0
    if tile != "diagonal" and at.ndim == 2 and kind != "any":
        assert len(cols) == (at.shape[1] if mask is None else flags[1].sum()) or min(at.shape) == 1

    grid = Grid.of(cache, (2, 1, 0), (0, 0, 1))
    assert grid is not None
    reads = resolve([Load(7, 0, rows, cols), Load(9, 0, rows[:1], cols[:1])], grid)
    found = {
        (int(cell), int(dim))
        for cell, kind in zip(reads.cell[reads.of(7)], reads.dims[reads.of(7)], strict=True)
        for dim in np.flatnonzero(reads.sets[kind])
    }
    element = (wanted.astype(np.int64) - cache.data_ptr()) // 4
    assert found == {divmod(int(e), 8) for e in element}
    every = np.ones(8, dtype=bool)
    covered = set(reads.covered([7], every).tolist())
    assert covered == {cell for cell in range(12) if all((cell, dim) in found for dim in range(8))}
    assert set(reads.covered([7], ~every).tolist()) == {cell for cell, _ in found}
    cell = next(iter(found))[0]
    assert reads.unread([7], cell, every).tolist() == [(cell, dim) not in found for dim in range(8)]
    assert len(reads.cell[reads.of(9)]) == 1
    assert len(reads.cell[reads.of(8)]) == 0
