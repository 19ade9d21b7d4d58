"""How triage says numbers and index sets: short, exact where it can be, the same everywhere.

Invariant: a compact index set names no index that is not in the set, and says so where it stops before the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_RUNS = 4  # runs named one by one before "and n more"


def number(value: float) -> str:
    return f"{value:.4g}"


def count(amount: int, singular: str) -> str:
    """count(2, "token") == "2 tokens"."""
    return f"{amount:,} {singular}" + ("" if amount == 1 else "s")


def percent(fraction: float) -> str:
    """Whole percents, never rounded to 0 or 100 unless exact."""
    if 0 < fraction < 0.01:
        return "< 1 %"
    if 0.99 < fraction < 1:
        return "> 99 %"
    return f"{fraction * 100:.0f} %"


def without_numbers(text: str) -> str:
    """`text` with every number as #: equal for what differs in numbers only."""
    return re.sub(r"\d[\d.,e+-]*", "#", text)


def compact(indices: Sequence[int], total: int | None = None) -> str:
    """Ascending, distinct `indices` as text: "all 64", "0-63", "every 2nd, 1-127", "16 of every 32, 0-79", "3, 7-9"."""
    if not indices:
        return "none"
    if total is not None and len(indices) == total > 1:
        return f"all {total}"
    runs = _runs(indices)
    if period := _period(runs, total):
        length, step = period
        head = f"every {_ordinal(step)}" if length == 1 else f"{length} of every {step}"
        return f"{head}, {indices[0]}-{indices[-1]}"
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs[:MAX_RUNS])
    left = runs[MAX_RUNS:]
    return text + (f" and {sum(last - first + 1 for first, last in left)} more" if left else "")


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive indices, as (first, last)."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _period(runs: Sequence[tuple[int, int]], total: int | None) -> tuple[int, int] | None:
    """(length, step) of at least three equally long, equally spaced runs; the last may be cut off by the end."""
    if len(runs) < 3:
        return None
    length, step = runs[0][1] - runs[0][0] + 1, runs[1][0] - runs[0][0]
    for i, (first, last) in enumerate(runs):
        cut_off = i == len(runs) - 1 and total is not None and last == total - 1 and last - first + 1 < length
        if first != runs[0][0] + i * step or (last - first + 1 != length and not cut_off):
            return None
    return length, step


def _ordinal(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
