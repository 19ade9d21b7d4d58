"""Grid: which cell (page, slot and head; token and head; ...) and dim of a tensor an address belongs to.

Invariant: the inverse of the tensor's own strides; an address between two elements has no cell. Cells are numbered as
if the tensor were packed, so that a number says which page, slot and head it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from harness.layout import parts

Ints = npt.NDArray[np.int64]
GAP = -1


@dataclass(frozen=True)
class Axis:
    stride: int  # elements
    size: int
    cell: int  # what a step adds to the number of the cell
    dim: int  # what a step adds to the dim


@dataclass(frozen=True)
class Grid:
    start: int  # address
    itemsize: int
    axes: tuple[Axis, ...]  # of size above 1, the longest stride first
    num_cells: int
    num_dims: int

    @classmethod
    def of(cls, tensor: torch.Tensor, cell: Sequence[int], dim: Sequence[int]) -> Grid | None:
        """The grid of `tensor` whose axes step cells by `cell` and dims by `dim`; None where its elements overlap."""
        steps = zip(tensor.stride(), tensor.shape, cell, dim, strict=True)
        axes = sorted((Axis(*step) for step in steps if step[1] > 1), key=lambda axis: -axis.stride)
        extent = 1
        for axis in reversed(axes):
            if axis.stride < extent:
                return None
            extent += (axis.size - 1) * axis.stride
        num_cells = 1 + sum((axis.size - 1) * axis.cell for axis in axes)
        num_dims = 1 + sum((axis.size - 1) * axis.dim for axis in axes)
        return cls(tensor.data_ptr(), tensor.element_size(), tuple(axes), num_cells, num_dims)

    @classmethod
    def linear(cls, tensor: torch.Tensor, room: int) -> Grid:
        """Every element from the first of `tensor` to `room` behind its last is a cell, gaps between rows included."""
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + room
        return cls(tensor.data_ptr(), tensor.element_size(), (Axis(1, extent, 1, 0),), extent, 1)

    def decode(self, addresses: npt.NDArray[np.uint64]) -> tuple[Ints, Ints]:
        """Cell, GAP between elements and outside of the tensor, and dim of each address.  addresses: [n]; both [n]"""
        byte = addresses.astype(np.int64) - self.start
        rest = byte // self.itemsize
        inside = rest * self.itemsize == byte
        cell, dim = np.zeros_like(rest), np.zeros_like(rest)
        for axis in self.axes:
            at = rest // axis.stride
            rest -= at * axis.stride
            inside &= (at >= 0) & (at < axis.size)
            cell += at * axis.cell
            dim += at * axis.dim
        inside &= rest == 0
        return np.where(inside, cell, GAP), np.where(inside, dim, 0)


def cache_grid(tensor: torch.Tensor, layout: str, which: str) -> Grid | None:
    """Cells (page * page_size + slot) * num_kv_heads + head of K (`which` "k") or V; see harness.layout."""
    dims = parts(layout, which, tensor.shape)
    heads = math.prod(part.size for part in dims if part.of == "head")
    slots = math.prod(part.size for part in dims if part.of == "slot")
    cells = {"page": slots * heads, "slot": heads, "head": 1, "dim": 0}
    return Grid.of(
        tensor,
        [part.step * cells[part.of] for part in dims],
        [part.step * (part.of == "dim") for part in dims],
    )
