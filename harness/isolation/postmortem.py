"""The controller's side of workers that die: each death becomes the record of the one case it is due to.

Invariant: a case that was running when its worker died has exactly one record, whose outcome says how it ended; a
crash is called the case's own only if the case crashes alone as well.
"""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import AttnregError
from harness.isolation.alone import Alone, run_alone
from harness.isolation.autopsy import Death, autopsy, how
from harness.isolation.turns import turn
from harness.kernel.buffer_map import describe_address, in_fence
from harness.run.outcome import Outcome, Verdict
from harness.session import Found, Session

JOURNAL = "attnreg_journal"  # in the input of a worker: the file for its last words
PATIENCE = 60.0  # seconds for a worker to end that has closed its pipe
MAX_BARREN = 3  # workers in a row that died before they had collected


class Postmortem:
    """A pytest plugin object, registered in a controller whose workers are replaced."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.folder = Path(tempfile.mkdtemp(prefix="attnreg-"))
        self.reported: set[str] = set()
        self.last: dict[str, str] = {}  # the case each worker reported last
        self.collected: set[str] = set()  # workers that got so far
        self.barren = 0
        self.pytest_session: pytest.Session | None = None
        self.memory_kills = memory_kills()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[JOURNAL] = str(self._journal(node))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        self.collected.add(node.gateway.id)
        self.barren = 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """Replacing workers that cannot even collect would never end."""
        if error is None or node.gateway.id in self.collected:
            return
        self.barren += 1
        if self.barren == MAX_BARREN:
            end = how(self._death(node))
            pytest.exit(f"{MAX_BARREN} workers in a row died before they had collected the cases; the last {end}", 3)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and hasattr(report, "attnreg"):
            self.reported.add(report.nodeid)
            self.last[vars(report)["node"].gateway.id] = report.nodeid
        stop = self.pytest_session and (self.pytest_session.shouldfail or self.pytest_session.shouldstop)
        if stop:  # -x, --maxfail, --stepwise
            distributed: Any = self.session.config.pluginmanager.getplugin("dsession")
            distributed.shouldstop = stop  # which by itself does not count deaths

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.pytest_session = session

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Turn pytest-xdist's report of a dead worker into that of the case."""
        if crashitem in self.reported:  # the worker ended itself behind that case, as nothing else could run in it
            report.when, report.outcome, report.longrepr = "teardown", "passed", None
            return
        try:
            found = self.session.find_case(crashitem)
        except AttnregError:
            return  # not a case of ours
        worker: Any = vars(report)["node"]
        verdict = self._verdict(found, worker)
        record = self.session.make_record(found.case, found.line, found.path, verdict, worker.gateway.id)
        report.when, report.location = "call", (crashitem.partition("::")[0], found.line - 1, record.id)
        report.outcome, report.longrepr = "passed", None
        report.user_properties.append(("outcome", verdict.outcome.value))
        if verdict.outcome.is_failure:
            from harness.report.plain import failure_text

            report.outcome, report.longrepr = "failed", failure_text(record)
        vars(report)["attnreg"] = record.to_json()

    def pytest_unconfigure(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _verdict(self, found: Found, worker: Any) -> Verdict:
        from harness.run.expectation import apply_expectation  # imports torch, which a run without deaths needs not

        folder = self.session.kernels[found.case.kernel].folder
        verdict = autopsy(self._death(worker), self.session.case_timeout, folder)
        if verdict.outcome is Outcome.CRASH:  # else told by the stack, or by the system: it would only happen again
            reproduce = self.session.make_record(found.case, found.line, found.path, verdict).reproduce
            environment = worker.gateway.spec.env
            with turn(found.case, self.folder, {**os.environ, **environment}):
                alone = run_alone(self.session, reproduce, environment=environment)
            verdict = second_opinion(verdict, alone, self.last.get(worker.gateway.id), self.session.case_timeout)
        expectation = found.matrix.expectation(found.case)
        return apply_expectation(verdict, expectation, datetime.date.today()) if expectation else verdict

    def _death(self, node: Any) -> Death:
        journal = self._journal(node)
        kills, self.memory_kills = self.memory_kills, memory_kills()
        return Death(
            status=_exit_status(node.gateway),
            dump=journal.read_text(encoding="utf-8", errors="replace") if journal.exists() else "",
            memory_kills=self.memory_kills - kills,
        )

    def _journal(self, node: Any) -> Path:
        return self.folder / f"{node.gateway.id}.txt"


def memory_kills(counters: Path = Path("/proc/vmstat")) -> int:
    """How many processes this system has killed for want of memory; 0 where that is not to be had."""
    if not counters.exists():
        return 0
    facts = dict(line.split(maxsplit=1) for line in counters.read_text(encoding="ascii").splitlines() if " " in line)
    return int(facts.get("oom_kill", "0"))


def _exit_status(gateway: Any) -> int | None:
    """Of the worker behind a gateway that is closed; None where it is no child of this process."""
    popen = getattr(getattr(gateway, "_io", None), "popen", None)  # execnet has no public way to it
    if popen is None:
        return None
    try:
        return int(popen.wait(timeout=PATIENCE))
    except subprocess.TimeoutExpired:  # it closed its pipe and lives on
        popen.kill()
        return None


def second_opinion(crash: Verdict, alone: Alone, before: str | None, limit: float) -> Verdict:
    """A crash in the light of a second run of the case in a process of its own.

    before: what ran before it in the worker that died. limit: seconds that the case may take.
    """
    from harness.triage.explain import with_row

    if not alone.started:
        last = alone.output.strip().splitlines()[-1:] or [f"the process {how(alone.death)}"]
        return replace(crash, explanation=with_row(crash.explanation, "again", "alone it could not be run:", *last))
    if alone.record is not None and alone.record.outcome is Outcome.OUT_OF_MEMORY:
        untold = f"alone in a fresh process nothing came of it: {alone.record.reason}"
        return replace(crash, explanation=with_row(crash.explanation, "again", untold))
    if alone.record is None or alone.record.outcome in (Outcome.CRASH, Outcome.TIMEOUT):
        end = autopsy(alone.death, limit, None) if alone.record is None else alone.record
        said = [f"alone in a fresh process it fails too: {end.reason}"]
        if alone.fault is None:
            return replace(crash, explanation=with_row(crash.explanation, "again", *said))
        lies = describe_address(alone.fault.address, alone.buffers) or "near no buffer"
        fenced = in_fence(alone.fault.address, alone.buffers)
        said.append(f"{alone.fault.access} {lies}" if fenced else f"address {alone.fault.address:#x}: {lies}")
        reason = f"{crash.reason}, {said[-1]}"
        seen = with_row(crash.explanation, "again", *said)
        return replace(crash, reason=reason, explanation={**seen, "summary": reason, "fault": vars(alone.fault)})
    ended = alone.record.outcome.value + (f" ({alone.record.reason})" if alone.record.reason else "")
    what, shape = f"{crash.reason}, but alone in a fresh process it ends in {ended}", "once"
    reason = f"once only: {what}, and no case ran before it"
    if before:
        reason, shape = f"collateral damage: {what}; the case before it was {before}", "collateral"
    seen = with_row(crash.explanation, "alone", f"in a fresh process this case ends in {ended}")
    seen = with_row(seen, "before it", before or "no case ran in that worker before")
    return replace(crash, reason=reason, explanation={**seen, "summary": reason, "shape": shape})
