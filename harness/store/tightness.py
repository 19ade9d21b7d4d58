"""Tightness: whether the numerics profiles of a run are tight enough to test anything.

Invariant: judged on ordinary data alone (law `normal`, cases that pass). A profile is too loose if the worst error of
the whole sweep is a small part of its tolerance, and unproven if the next finer P dtype would have done as well: too
loose a declaration is the one mistake that no single case can show. Free of torch: it works on records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.run.outcome import Outcome

if TYPE_CHECKING:
    from harness.store.record import Record

LOOSE_BELOW = 0.1  # errors that stay under a tenth of their tolerance leave room for faults nine times as large
# With P in float32 the sums decide: their bound covers a random walk times its rounding errors at odds of 1e-15, while
# the worst of thousands of honest elements is 0.15 of it summed key by key, and a third of that summed in tiles.
LOOSE_BELOW_FLOAT32 = 0.05
MIN_CASES = 8  # fewer may not hold the rows that come near a bound
DECISIVE_TIERS = ("ci", "nightly")  # a run of these fails where a profile is not tight; smoke is a sample
OK, TOO_LOOSE, UNPROVEN = "ok", "too loose", "unproven"


@dataclass(frozen=True)
class ProfileTightness:
    """One kernel with one query dtype, which together determine its P dtype."""

    kernel: str
    dtype: str
    cases: int  # with data `normal` that pass
    worst: float  # largest error of out over its tolerance
    finer_worst: float | None  # the same over the tolerance of the next finer P dtype; None where P is float32
    verdict: str  # ok | too loose | unproven

    @property
    def decided(self) -> bool:
        """Whether there were enough cases to hold the verdict against the profile."""
        return self.cases >= MIN_CASES

    @property
    def text(self) -> str:
        """One sentence on the verdict."""
        over = f"over {self.cases} cases of N(0, 1)"
        if self.verdict == TOO_LOOSE:
            return f"too loose: no error above {self.worst:.2f} of its tolerance {over}"
        if self.verdict == UNPROVEN:
            return f"unproven: within the tolerance of the next finer P dtype ({self.finer_worst:.2f}) {over}"
        return f"ok: worst error {self.worst:.2f} of its tolerance {over}"


def tightness(records: Sequence[Record]) -> list[ProfileTightness]:
    """One entry per kernel and dtype that has cases to judge, sorted by kernel and dtype."""
    by_profile: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        law = record.law or record.case.get("data")
        if record.outcome is Outcome.PASS and law == "normal" and record.err_over_tol is not None:
            by_profile.setdefault((record.kernel, str(record.case.get("dtype"))), []).append(record)
    return [_judged(kernel, dtype, members) for (kernel, dtype), members in sorted(by_profile.items())]


def not_tight(records: Sequence[Record]) -> list[ProfileTightness]:
    """The profiles that a run of enough cases found too loose or unproven."""
    return [profile for profile in tightness(records) if profile.decided and profile.verdict != OK]


def _judged(kernel: str, dtype: str, records: Sequence[Record]) -> ProfileTightness:
    worst = max(r.err_over_tol or 0.0 for r in records)
    finer = max((r.tighter_err_over_tol for r in records if r.tighter_err_over_tol is not None), default=None)
    verdict = OK
    if worst < (LOOSE_BELOW_FLOAT32 if finer is None else LOOSE_BELOW):
        verdict = TOO_LOOSE
    elif finer is not None and finer <= 1:
        verdict = UNPROVEN
    return ProfileTightness(kernel, dtype, len(records), worst, finer, verdict)
