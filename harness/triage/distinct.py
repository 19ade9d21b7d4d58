"""Distinct failures: failures that look the same form one group. Invariant: each is in exactly one group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from harness.store.record import Record
from harness.triage.wording import without_numbers


@dataclass(frozen=True)
class Group:
    """Failures of one kind.."""

    fingerprint: str
    records: tuple[Record, ...]

    @property
    def example(self) -> Record:
        return self.records[0]


def fingerprint(record: Record) -> str:
    """Eight hex digits that are equal for equal outcome, kernel and shape of pattern.

    Where there is no pattern the reason stands in for it, its numbers left out (they differ from case to case).
    """
    shape = (record.explanation or {}).get("shape") or without_numbers(record.reason)
    key = "\n".join((record.outcome.value, record.kernel, str(shape)))
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def group_failures(records: Iterable[Record]) -> list[Group]:
    """The failures among `records`, grouped; groups and their members keep the order of first appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.outcome.is_failure:
            groups.setdefault(fingerprint(record), []).append(record)
    return [Group(key, tuple(members)) for key, members in groups.items()]
