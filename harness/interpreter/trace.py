"""The trace of a session: what every program loaded of the watched buffers, and whose stores it loaded.

Invariant: a load is kept as the lanes it had unmasked and nothing is interpreted here, so that recording costs little;
programs are numbered from 1 in the order they ran, across launches.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import numpy.typing as npt

from harness.interpreter.memory import Addresses

Program = tuple[int, int, int]
Pointers = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Load:
    """The unmasked lanes of one load: all rows[i] + cols[j]; cols[0] is 0."""

    program: int  # number of the program
    line: int  # index into Trace.lines
    rows: Addresses  # [m]
    cols: Addresses  # [n] byte offsets


@dataclass(frozen=True)
class Origin:
    """Where a program belongs."""

    kernel: str
    launch: int  # index into Session.launches
    program: Program


@dataclass
class Trace:
    """Filled by a session; `watched` names the buffers whose loads are kept."""

    watched: Collection[str]
    loads: dict[str, list[Load]] = field(default_factory=dict)  # by buffer, in the order they happened
    programs: list[Origin] = field(default_factory=list)  # that of program n at n - 1
    lines: list[str] = field(
        default_factory=list
    )  # file:line, and " from file:line" of the kernel where a device function loads
    sources: dict[int, set[int]] = field(default_factory=dict)  # program -> other programs whose stores it loaded
    unstored: set[int] = field(default_factory=set)  # programs that loaded writable memory which no program had stored
    atomics: bool = False  # whether anything was exchanged through atomics, which are not followed
    cut: bool = False  # whether the kernel ended at a fault, before all its programs had run
    stores: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)  # output -> program that stored each last
    _line_ids: dict[tuple[CodeType, int, CodeType, int], int] = field(default_factory=dict)

    def load(
        self,
        names: Collection[str],
        program: int,
        pointers: Pointers,
        mask: Mask | None,
        frames: tuple[FrameType, FrameType],
    ) -> None:
        """Keep one load from the buffers `names`, which overlap where there are several.

        pointers, mask: one shape. frames: of the load and of the kernel.
        """
        rows, cols = lanes(pointers, mask)
        kept = Load(program, self._line(*frames), rows, cols)
        for name in names:
            self.loads.setdefault(name, []).append(kept)

    def feed(self, program: int, writers: npt.NDArray[np.int32]) -> None:
        """`program` loaded elements that the programs `writers` (0: none) had stored.  writers: any shape"""
        first, last = int(writers.min()), int(writers.max())
        numbers = {first} if first == last else set(np.unique(writers).tolist())
        if 0 in numbers:
            self.unstored.add(program)
        self.sources.setdefault(program, set()).update(numbers - {0, program})

    def _line(self, inner: FrameType, outer: FrameType) -> int:
        key = (inner.f_code, inner.f_lineno, outer.f_code, outer.f_lineno)
        known = self._line_ids.get(key)
        if known is None:
            known = self._line_ids[key] = len(self.lines)
            lines = [f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" for frame in (inner, outer)]
            self.lines.append(lines[0] if inner is outer else " from ".join(lines))
        return known


def lanes(pointers: Pointers, mask: Mask | None) -> tuple[Addresses, Addresses]:
    """(rows [m], cols [n]) such that the unmasked lanes of `pointers` are all rows[i] + cols[j].

    A tile whose addresses and mask are each made of a row part and a column part stays that small; any other becomes
    one column of all its lanes. At least one lane is unmasked.
    """
    if pointers.ndim == 2 and min(pointers.shape) > 1:
        row = 0 if mask is None else int(mask.any(axis=1).argmax())
        col = 0 if mask is None else int(mask[row].argmax())
        rows, cols = pointers[:, col], pointers[row] - pointers[row, col]
        if np.array_equal(rows[:, None] + cols, pointers):
            if mask is None:
                return rows.copy(), cols  # a view would keep the whole tile alive
            in_rows, in_cols = mask[:, col], mask[row]
            if np.array_equal(in_rows[:, None] & in_cols, mask):
                return rows[in_rows], cols[in_cols]
    flat = pointers.reshape(-1).copy() if mask is None else pointers[mask]
    return flat, np.zeros(1, dtype=np.uint64)
