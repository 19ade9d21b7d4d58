"""Expectations: known failures, each with a reason, a link and a date on which it has to be looked at again.

Invariant: an expectation never hides anything: the case still runs, another outcome than the expected one fails, and
so does one whose date has passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

from harness.case import Case
from harness.matrix.where import Where

# What a case may be expected to end in. TEST_BUG and ERROR are ours to mend, so nobody may expect them.
EXPECTABLE = ("FAIL", "BLIND", "NONDETERMINISTIC", "CRASH", "TIMEOUT", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Expectation:
    """Cases that meet `where` end in `outcome`, `because` of what `issue` (a URL) tracks, `until` a date at most."""

    where: Where
    outcome: str
    because: str
    issue: str
    until: date
    line: int

    def expired(self, today: date) -> bool:
        """Whether its last day has passed."""
        return today > self.until


def match(expectations: Iterable[Expectation], case: Case) -> Expectation | None:
    """The first expectation that `case` meets."""
    return next((e for e in expectations if e.where.evaluate(case)), None)
