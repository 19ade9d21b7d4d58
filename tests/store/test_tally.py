from __future__ import annotations

import math

from harness.run.outcome import Outcome
from harness.store.record import Record
from harness.store.tally import tally_matrices, tally_totals


def record(matrix: str, kernel: str, outcome: Outcome = Outcome.PASS, reason: str = "", **more: object) -> Record:
    return Record("id", matrix, f"cases/{matrix}.yaml", 1, "smoke", kernel, outcome, reason, **more)


def test_every_record_counts_once() -> None:
    records = [
        record("a", "k1", err_over_tol=0.25, seconds={"cache": 1.0, "launch": 0.5}),
        record("b", "k1", Outcome.BLIND),
        record("a", "k2", Outcome.FAIL, err_over_tol=0.5, lse_err_over_tol=math.nan, seconds={"launch": 0.25}),
        record("b", "k3", Outcome.UNSUPPORTED, "sinks (attention sinks)"),
        record("b", "k3", Outcome.UNSUPPORTED, "sinks (attention sinks)"),
        record("b", "k3", Outcome.UNSUPPORTED, "page_size 24 (admitted: 16)"),
        record("b", "k3", Outcome.XFAIL, "known"),
    ]
    a, b = tally_matrices(records)
    assert (a.matrix, a.cases, a.kernels, a.worst, a.seconds, a.failures) == ("a", 2, 2, math.inf, 1.75, 1)
    assert (b.matrix, b.cases, b.kernels, b.worst, b.seconds, b.failures) == ("b", 5, 2, None, 0.0, 1)
    totals = tally_totals(records)
    assert sum(totals.outcomes.values()) == len(records)
    assert totals.failures == 2
    assert totals.unsupported == {"k3": ("sinks", "page_size 24")}
    assert set(totals.outcomes) == set(Outcome)
