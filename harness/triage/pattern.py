"""How a mismatch factorises in logical axes: which tokens, heads and dims, and whether it is a product of those sets.

Invariant: `tokens`, `heads` and `dims` are the smallest sets whose product holds every wrong element; the pattern is
exact if and only if that product holds nothing else. Nothing here is a guess about the cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.case import Case
from harness.oracle.findings import TensorFindings
from harness.triage.place import RowPart, row_parts
from harness.triage.wording import count, percent

if TYPE_CHECKING:
    import torch

AXES = ("token", "head", "dim")
HEAT_CELLS = 40


@dataclass(frozen=True)
class Strip:
    """A coarse picture of one axis: per cell, the share of wrong elements of its worst index."""

    axis: str
    size: int
    per_cell: int
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class Pattern:
    """The wrong elements of one tensor. Index sets are ascending; `dims` is empty for an LSE."""

    shape: tuple[int, ...]
    wrong: int
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    dims: tuple[int, ...]
    parts: tuple[RowPart, ...]  # the same tokens by sequence
    paired: tuple[int, int] | None  # (axis left out, number of index pairs of the others), where only that factorises
    heat: tuple[Strip, ...]  # axes on which the pattern is not uniform

    @property
    def sets(self) -> tuple[tuple[int, ...], ...]:
        return (self.tokens, self.heads, self.dims)[: len(self.shape)]

    @property
    def bounding(self) -> int:
        """Elements of the product of the sets."""
        return _product([len(s) for s in self.sets])

    @property
    def exact(self) -> bool:
        return self.wrong == self.bounding

    @property
    def fill(self) -> float:
        return self.wrong / self.bounding

    def whole(self, axis: int) -> bool:
        """Whether every index of `axis` holds a wrong element."""
        return axis >= len(self.shape) or len(self.sets[axis]) == self.shape[axis]

    def describe(self) -> str:
        """E.g. `= 1 token x 64 heads x 128 dims`, `= 12 (token, head) pairs x 128 dims`, or the bounding product."""
        product = " x ".join(count(len(s), AXES[axis]) for axis, s in enumerate(self.sets))
        if self.exact:
            return f"= {product}"
        if self.paired is not None:
            left_out, pairs = self.paired
            names = ", ".join(name for axis, name in enumerate(AXES) if axis != left_out)
            return f"= {pairs:,} ({names}) pairs x {count(len(self.sets[left_out]), AXES[left_out])}"
        return f"within {product} ({percent(self.fill)} filled)"


def find_pattern(case: Case, found: TensorFindings) -> Pattern | None:
    """The pattern of `found.mismatched`, or None where nothing is wrong.

    mismatched: bool, out [num_tokens, num_q_heads, head_size_v] or lse [num_tokens, num_q_heads].
    ValueError where its shape is not the one that `case` implies.
    """
    mask = found.mismatched
    expected = (case.rows.num_tokens, case.num_q_heads, case.value_size)[: mask.dim()]
    if mask.dim() not in (2, 3) or tuple(mask.shape) != expected:
        raise ValueError(f"mask of {found.name} has shape {tuple(mask.shape)}, the case implies {expected}")
    if not bool(mask.any()):
        return None
    per_axis = [_wrong_per_index(mask, axis) for axis in range(mask.dim())]
    sets = [tuple(i for i, n in enumerate(wrong) if n) for wrong in per_axis]
    wrong = sum(per_axis[0])
    strips = [_strip(AXES[axis], per_axis[axis], wrong_max) for axis, wrong_max in enumerate(_rest_sizes(mask))]
    return Pattern(
        shape=tuple(mask.shape),
        wrong=wrong,
        tokens=sets[0],
        heads=sets[1],
        dims=sets[2] if mask.dim() == 3 else (),
        parts=tuple(row_parts(case.rows, per_axis[0])),
        paired=_paired(mask, sets, wrong),
        heat=tuple(s for s in strips if len(set(s.fractions)) > 1),
    )


def _wrong_per_index(mask: torch.Tensor, axis: int) -> list[int]:
    others = [other for other in range(mask.dim()) if other != axis]
    counts: list[int] = mask.sum(dim=others).tolist()  # [size of axis] int64
    return counts


def _paired(mask: torch.Tensor, sets: Sequence[tuple[int, ...]], wrong: int) -> tuple[int, int] | None:
    """An axis that factorises out of a mask that is not a full product, with the pairs that remain."""
    if mask.dim() != 3 or _product([len(s) for s in sets]) == wrong:
        return None
    for axis in (2, 0, 1):
        pairs = int(mask.any(dim=axis).sum())
        if len(sets[axis]) > 1 and pairs * len(sets[axis]) == wrong:
            return axis, pairs
    return None


def _rest_sizes(mask: torch.Tensor) -> list[int]:
    """Elements per index of each axis."""
    return [mask.numel() // size for size in mask.shape]


def _strip(axis: str, wrong: Sequence[int], per_index: int) -> Strip:
    per_cell = -(-len(wrong) // HEAT_CELLS)
    cells = [wrong[start : start + per_cell] for start in range(0, len(wrong), per_cell)]
    return Strip(axis, len(wrong), per_cell, tuple(float(f"{max(cell) / per_index:.3g}") for cell in cells))


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
