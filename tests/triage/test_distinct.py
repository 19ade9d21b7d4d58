from __future__ import annotations

from harness.run.outcome import Outcome
from harness.store.record import Record
from harness.triage.distinct import fingerprint, group_failures


def record(name: str, outcome: Outcome = Outcome.FAIL, reason: str = "", shape: str = "", kernel: str = "k") -> Record:
    explanation = {"shape": shape} if shape else None
    return Record(name, "m", "cases/m.yaml", 1, "smoke", kernel, outcome, reason, explanation=explanation)


def test_equal_shapes_form_one_group_whatever_the_numbers() -> None:
    records = [
        record("a", reason="8192 wrong", shape="out: some tokens x heads x dims []"),
        record("ok", Outcome.PASS),
        record("b", reason="64 wrong", shape="out: some tokens x heads x dims []"),
        record("c", reason="8192 wrong", shape="out: tokens x some heads x dims []"),
        record("d", reason="8192 wrong", shape="out: some tokens x heads x dims []", kernel="other"),
        record("no", Outcome.UNSUPPORTED, "sinks"),
    ]
    assert [[r.id for r in group.records] for group in group_failures(records)] == [["a", "b"], ["c"], ["d"]]


def test_without_a_pattern_the_reason_counts_but_not_its_numbers() -> None:
    one = record("a", Outcome.CRASH, "signal 11 after 3.5 s")
    assert fingerprint(one) == fingerprint(record("b", Outcome.CRASH, "signal 6 after 12 s"))
    assert fingerprint(one) != fingerprint(record("c", Outcome.CRASH, "device context is dead"))
    assert fingerprint(one) != fingerprint(record("d", Outcome.TIMEOUT, "signal 11 after 3.5 s"))
