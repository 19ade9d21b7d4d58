"""Outcomes of a case. Besides PASS only ELEVATED, UNSUPPORTED and XFAIL are no failures; nothing becomes a skip."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Outcome(str, Enum):
    PASS = "PASS"
    FAIL = "FAIL"  # the kernel is wrong
    TEST_BUG = "TEST_BUG"  # what was handed over violates the contract
    BLIND = "BLIND"  # the case could not have seen faults
    ELEVATED = "ELEVATED"  # right, but far less accurate than the same problem on one page per sequence
    UNSUPPORTED = "UNSUPPORTED"  # declared by the contract
    XFAIL = "XFAIL"  # fails as an expectation with reason, link and expiry says
    XPASS = "XPASS"  # passes although a failure is expected
    NONDETERMINISTIC = "NONDETERMINISTIC"
    CRASH = "CRASH"  # a signal or a dead device context
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    ERROR = "ERROR"  # the harness itself

    @property
    def is_failure(self) -> bool:
        return self not in (Outcome.PASS, Outcome.ELEVATED, Outcome.UNSUPPORTED, Outcome.XFAIL)


@dataclass(frozen=True)
class Verdict:
    """What became of one case. `explanation` is plain JSON data for renderers; harness.triage builds it."""

    outcome: Outcome
    reason: str  # one line, enough to act on
    ran: tuple[str, ...] = ()
    err_over_tol: float | None = None
    lse_err_over_tol: float | None = None
    z: float | None = None  # largest |z| of tier 2, fails above 7; None where it does not apply
    seconds: dict[str, float] | None = None  # by phase: problem, cache, reference, launch, judge
    seeds: dict[str, int] | None = None
    explanation: dict[str, Any] | None = None
    access: str = ""  # "traced", or what of the access oracle does not apply, and why; "" where nothing was launched
    law: str = ""  # the data law that was taken, where the case left the choice open
    memory: dict[str, Any] | None = None  # of the KV cache: pool (dense, aliased), bytes of addresses and of memory
    tighter_err_over_tol: float | None = None  # of out, were P rounded one step more finely; ordinary data only
    branch: str = ""  # of the kernel's dispatch that the case took; "" where it has none, or nothing was launched
