"""Whether `tl.multiple_of`, `tl.max_contiguous` and `tl.max_constancy` tell the truth about the values they annotate.

Invariant: a hint is about groups of neighbours along each dimension, as the compiler's axis analysis reads it; a true
hint is silent. The compiler vectorises and widens accesses on its word, so a wrong one reads and writes elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


def broken_hint(name: str, data: Values, values: Sequence[int]) -> str | None:
    """What is wrong with the hint `name` of one value per dimension of `data`, or None where it holds."""
    check = _CHECKS[name]
    for axis, value in enumerate(values):
        if value > 1 and data.size and not check(np.moveaxis(data, axis, -1), value):
            return f"tl.{name}({list(values)}) does not hold along dimension {axis} for {_sample(data)}"
    return None


def _divisible(data: Values, value: int) -> bool:
    """The first value of every run of contiguous values is a multiple: what "all are multiples" means for blocks."""
    wrong = data % value != 0
    if not wrong.any():
        return True
    starts = np.ones(data.shape, dtype=bool)
    starts[..., 1:] = np.diff(data, axis=-1) != 1
    return not bool((wrong & starts).any())


def _contiguous(data: Values, value: int) -> bool:
    return _steps_within_groups(data, value, 1)


def _constant(data: Values, value: int) -> bool:
    return _steps_within_groups(data, value, 0)


def _steps_within_groups(data: Values, value: int, step: int) -> bool:
    inside = np.arange(1, data.shape[-1]) % value != 0  # step from the left neighbour stays in the group
    return bool((np.diff(data, axis=-1)[..., inside] == step).all())


def _sample(data: Values) -> str:
    shown = ", ".join(str(v) for v in data.reshape(-1)[:6])
    return f"[{shown}{', ...' if data.size > 6 else ''}]"


_CHECKS = {"multiple_of": _divisible, "max_contiguous": _contiguous, "max_constancy": _constant}
