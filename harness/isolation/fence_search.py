"""Which fence a case ran into, where no address is told: a GPU says that an access was illegal, not where it went.

Invariant: a buffer is named only if the case crashes alone with nothing but that buffer fenced, and does not without
any fence; whatever else comes of the search is said, too. Behind it is where the touch went if the case does not crash
with the buffer at the other end of its memory.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from harness.isolation.alone import Alone, run_alone
from harness.isolation.autopsy import autopsy, how
from harness.run.outcome import Outcome
from harness.session import Session
from harness.store.record import Record

MAX_SEARCHES = 3  # for one kernel: each is half a dozen processes


class FenceSearch:
    """A pytest plugin object, registered in a controller whose cases run between fences."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.searched: Counter[str] = Counter()  # by kernel

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Whoever sees the report next finds the buffer named in it."""
        line = getattr(report, "attnreg", None)
        if report.when != "call" or line is None or not is_unnamed(record := Record.from_json(line)):
            return
        from harness.report.plain import failure_text
        from harness.triage.explain import with_row  # imports torch, which a run without deaths needs not

        self.searched[record.kernel] += 1
        if self.searched[record.kernel] > MAX_SEARCHES:
            said = f"which fence it was is not known: {MAX_SEARCHES} crashes of this kernel were looked into"
        else:
            node: Any = vars(report).get("node")
            said = self._search(record.reproduce, node.gateway.spec.env if node else {})
        reason = f"{record.reason}; {said}"
        explanation = {**with_row(record.explanation, "fence", said), "summary": reason}
        explanation.setdefault("shape", said)
        record = replace(record, reason=reason, explanation=explanation)
        vars(report)["attnreg"], report.longrepr = record.to_json(), failure_text(record)

    def _search(self, reproduce: str, environment: Mapping[str, str]) -> str:
        def run(names: Sequence[str], *how_placed: str) -> Alone:
            words = [reproduce, shlex.quote(f"--fence-only={','.join(names)}"), *how_placed]
            return run_alone(self.session, " ".join(words), environment=environment)

        bare = run(())
        if not bare.started:
            return f"which fence it was is not known: alone it could not be run (the process {how(bare.death)})"
        if died(bare):
            return "it crashes without any fence as well"
        name = culprit([span.name for span in bare.buffers], lambda names: died(run(names)))
        if name is None:
            return "no single fence makes it crash, and without any it does not"
        side = "before or far behind" if died(run((name,), "--fence-front")) else "behind"
        return f"touched memory {side} {name} (with its fence alone it crashes, without any it does not)"


def is_unnamed(record: Record) -> bool:
    """Whether a record is a crash of which no address is known, and that is the case's own."""
    known = record.explanation or {}
    return record.outcome is Outcome.CRASH and "fault" not in known and "alone" not in known.get("rows", {})


def died(alone: Alone) -> bool:
    """Whether the case ended its process or its device context; one that hung did not."""
    end = alone.record.outcome if alone.record else autopsy(alone.death, 0.0, None).outcome
    return alone.started and end is Outcome.CRASH


def culprit(names: Sequence[str], crashes: Callable[[Sequence[str]], bool]) -> str | None:
    """The one of `names` whose fence alone makes the case crash, by halving; None where none does.

    crashes: whether the case does with fences around some of them.
    """
    left, sure = list(names), False
    while len(left) > 1:
        half = left[: len(left) // 2]
        sure = crashes(half)
        left = half if sure else left[len(half) :]
    return left[0] if left and (sure or crashes(left)) else None
