"""Tallies of a run: per matrix and in total. Invariant: every record is counted once, whatever its outcome."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from harness.run.outcome import Outcome
from harness.store.record import Record


@dataclass(frozen=True)
class MatrixTally:
    matrix: str
    cases: int
    kernels: int
    worst: float | None  # largest error in units of tolerance, out and LSE; None where nothing was compared
    seconds: float
    failures: int


@dataclass(frozen=True)
class Totals:
    outcomes: dict[Outcome, int]  # every outcome, zero included
    unsupported: dict[str, tuple[str, ...]]  # kernel -> clauses, in order of appearance
    failures: int


def tally_matrices(records: Sequence[Record]) -> list[MatrixTally]:
    """One tally per matrix, in the order in which the matrices first appear."""
    by_matrix: dict[str, list[Record]] = {}
    for record in records:
        by_matrix.setdefault(record.matrix, []).append(record)
    return [
        MatrixTally(
            matrix=matrix,
            cases=len(members),
            kernels=len({record.kernel for record in members}),
            worst=_worst(members),
            seconds=math.fsum(second for record in members for second in record.seconds.values()),
            failures=sum(record.outcome.is_failure for record in members),
        )
        for matrix, members in by_matrix.items()
    ]


def tally_totals(records: Sequence[Record]) -> Totals:
    counts = Counter(record.outcome for record in records)
    unsupported: dict[str, dict[str, None]] = {}  # dicts as ordered sets
    for record in records:
        if record.outcome is Outcome.UNSUPPORTED:
            clause = record.reason.partition(" (")[0]  # a clause explains itself in brackets
            unsupported.setdefault(record.kernel, {})[clause] = None
    return Totals(
        outcomes={outcome: counts[outcome] for outcome in Outcome},
        unsupported={kernel: tuple(clauses) for kernel, clauses in unsupported.items()},
        failures=sum(record.outcome.is_failure for record in records),
    )


def _worst(records: Sequence[Record]) -> float | None:
    """Largest error of the records that were compared; NaN counts as infinite."""
    errors = [e for r in records for e in (r.err_over_tol, r.lse_err_over_tol) if e is not None]
    return max((math.inf if math.isnan(e) else e for e in errors), default=None)
