"""Reads: the loads of one buffer as cells and dims, program by program.

Invariant: entries are in the order of the programs that read them; an entry stands for one cell and a set of its dims,
and a cell may occur in several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.access.grid import GAP, Grid, Ints
from harness.interpreter.trace import Load

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Reads:
    program: Ints  # [n], ascending
    cell: Ints  # [n], GAP where an address lies between elements
    dims: Ints  # [n] index into `sets`
    line: Ints  # [n] index into the lines of the trace
    sets: Flags  # [num_sets, num_dims]

    def of(self, program: int) -> slice:
        """The entries of `program`."""
        first, end = np.searchsorted(self.program, (program, program + 1)).tolist()
        return slice(first, end)

    def covered(self, programs: Iterable[int], dims: Flags) -> Ints:
        """Cells of which `programs` together read all `dims` [num_dims]: [k], some of them twice; no GAP."""
        parts = [self.of(program) for program in programs]
        cell = np.concatenate([self.cell[part] for part in parts])  # [k]
        kind = np.concatenate([self.dims[part] for part in parts])  # [k]
        if (cell == GAP).any():
            cell, kind = cell[cell != GAP], kind[cell != GAP]
        whole = (self.sets | ~dims).all(axis=1)  # [num_sets]
        if whole.all():
            return cell
        cells, where = np.unique(cell, return_inverse=True)
        seen = np.zeros((len(cells), len(dims)), dtype=bool)
        for one in np.unique(kind).tolist():
            seen[where[kind == one]] |= self.sets[one]
        return cells[(seen | ~dims).all(axis=1)]

    def unread(self, programs: Iterable[int], cell: int, dims: Flags) -> Flags:
        """The `dims` [num_dims] of one cell that none of `programs` read: [num_dims]"""
        left = dims.copy()
        for part in map(self.of, programs):
            for kind in np.unique(self.dims[part][self.cell[part] == cell]).tolist():
                left &= ~self.sets[kind]
        return left


def resolve(loads: Sequence[Load], grid: Grid) -> Reads:
    """`loads`, in order, as cells and dims of `grid`."""
    if not loads:
        nothing = np.zeros(0, dtype=np.int64)
        return Reads(nothing, nothing, nothing, nothing, np.zeros((0, grid.num_dims), dtype=bool))
    num_rows = np.array([len(load.rows) for load in loads])  # [k]
    num_cols = np.array([len(load.cols) for load in loads])
    row = grid.decode(np.concatenate([load.rows for load in loads]))  # of the first column: [sum of num_rows] each
    col = grid.decode(np.concatenate([load.rows[0] + load.cols for load in loads]))  # of the first row
    same = {
        (side, i): _constant(values[i], counts)
        for side, values, counts in (("row", row, num_rows), ("col", col, num_cols))
        for i in (0, 1)
    }
    gap = _any(row[0] == GAP, num_rows) | _any(col[0] == GAP, num_cols)  # [k]
    # Strides are linear: where rows differ in cell only and columns in dim only, the tile is their product.
    by_row = same["row", 1] & same["col", 0] & ~gap
    by_col = same["row", 0] & same["col", 1] & ~gap & ~by_row
    sets = _Sets(grid.num_dims)
    parts: list[tuple[Ints, Ints, Ints]] = []  # index of the load, cell, set of dims
    for chosen, (cells, _), (_, dims), cell_counts, dim_counts in (
        (by_row, row, col, num_rows, num_cols),
        (by_col, col, row, num_cols, num_rows),
    ):
        if chosen.any():
            ids = sets.numbers(dims, dim_counts, chosen)  # [k]
            index = np.repeat(np.arange(len(loads)), cell_counts)
            kept = chosen[index]
            parts.append((index[kept], cells[kept], ids[index[kept]]))
    for i in np.flatnonzero(~(by_row | by_col)).tolist():
        cell, dim = grid.decode((loads[i].rows[:, None] + loads[i].cols).reshape(-1))
        parts.append((np.full(len(cell), i), cell, sets.single(dim)))
    index, cell, kind = (np.concatenate([part[i] for part in parts]) for i in range(3))
    if len(parts) > 1:
        order = np.argsort(index, kind="stable")
        index, cell, kind = index[order], cell[order], kind[order]
    program = np.array([load.program for load in loads])[index]
    return Reads(program, cell, kind, np.array([load.line for load in loads])[index], sets.table())


class _Sets:
    """Numbers distinct sets of dims."""

    def __init__(self, num_dims: int) -> None:
        self._num_dims = num_dims
        self._known: dict[bytes, int] = {}

    def numbers(self, dims: Ints, counts: Ints, chosen: Flags) -> Ints:
        """Number of the set of each `chosen` group of `dims`, which are `counts` [k] long; 0 for the others: [k]"""
        ends = np.cumsum(counts)
        found = np.zeros(len(counts), dtype=np.int64)
        by_dims: dict[bytes, int] = {}  # many loads have the very same dims
        for i in np.flatnonzero(chosen).tolist():
            group = dims[ends[i] - counts[i] : ends[i]]
            key = group.tobytes()
            if key not in by_dims:
                by_dims[key] = self._number(group)
            found[i] = by_dims[key]
        return found

    def single(self, dims: Ints) -> Ints:
        """Number of the set that holds just dims[i]: [n]"""
        values, where = np.unique(dims, return_inverse=True)
        return np.array([self._number(value) for value in values])[where]

    def table(self) -> Flags:
        rows = [np.frombuffer(key, dtype=bool) for key in self._known]
        return np.stack(rows) if rows else np.zeros((0, self._num_dims), dtype=bool)

    def _number(self, dims: Ints) -> int:
        flags = np.zeros(self._num_dims, dtype=bool)
        flags[dims] = True
        return self._known.setdefault(flags.tobytes(), len(self._known))


def _constant(values: Ints, counts: Ints) -> Flags:
    """Whether each group of `values`, `counts` [k] long, holds one value: [k]"""
    starts = np.cumsum(counts) - counts
    return ~_any(values != np.repeat(values[starts], counts), counts)


def _any(flags: Flags, counts: Ints) -> Flags:
    """Whether any of each group of `flags` is set: [k]"""
    return np.logical_or.reduceat(flags, np.cumsum(counts) - counts)
