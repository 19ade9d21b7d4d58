"""Known failures: an expectation turns exactly the outcome it names into XFAIL, and nothing else.

Invariant: an expectation that has expired, or whose case passes, is itself a failure; it can hide no other outcome.
"""

from __future__ import annotations

import datetime
from dataclasses import replace

from harness.matrix.expect import Expectation
from harness.run.outcome import Outcome, Verdict


def apply_expectation(verdict: Verdict, expectation: Expectation, today: datetime.date) -> Verdict:
    """The verdict as `expectation` (reason, link, expiry) sees it on `today`."""
    known = f"{expectation.because} ({expectation.issue})"
    if verdict.outcome is Outcome.PASS:
        return replace(verdict, outcome=Outcome.XPASS, reason=f"passes, but {expectation.outcome} is expected: {known}")
    if verdict.outcome.value != expectation.outcome:
        return verdict
    if expectation.expired(today):
        expired = f"the expectation expired on {expectation.until.isoformat()}: {known}"
        return replace(verdict, reason=f"{verdict.reason}; {expired}")
    return replace(verdict, outcome=Outcome.XFAIL, reason=f"{known}, until {expectation.until.isoformat()}")
