"""Known failures: an expectation turns exactly the outcome it names into XFAIL, and nothing else.

Invariant: an expectation that has expired, or whose case passes, is itself a failure; it can hide no other outcome.
"""

from __future__ import annotations

import datetime
from dataclasses import replace

from harness.matrix.expect import Expectation
from harness.run.outcome import Outcome, Verdict
from harness.triage.explain import with_row


def apply_expectation(verdict: Verdict, expectation: Expectation, today: datetime.date) -> Verdict:
    """The verdict as `expectation` (reason, link, expiry) sees it on `today`."""
    known = f"{expectation.because} ({expectation.issue})"
    if verdict.outcome is Outcome.PASS:
        return replace(verdict, outcome=Outcome.XPASS, reason=f"passes, but {expectation.outcome} is expected: {known}")
    if verdict.outcome.value != expectation.outcome:
        return verdict
    if expectation.expired(today):
        expired = f"the expectation expired on {expectation.until.isoformat()}: {known}"
        explanation = with_row(verdict.explanation, "expired", expired)
        return replace(verdict, reason=f"{verdict.reason}; {expired}", explanation=explanation)
    return replace(verdict, outcome=Outcome.XFAIL, reason=f"{known}, until {expectation.until.isoformat()}")
