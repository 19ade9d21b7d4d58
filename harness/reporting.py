"""The controller's side of a session: the run log and what the terminal shows.

Invariant: registered in the controller only; each record is written the moment it arrives; a case that was selected and
left none is ERROR in the end, unless the run was told to stop early, which it then says. Nothing is computed here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import AttnregError
from harness.items import MatrixItem, is_matrix
from harness.run.outcome import Outcome, Verdict
from harness.session import Session
from harness.store.environment import environment
from harness.store.record import Header, Record
from harness.store.run_log import RunLog, new_run_id, utc_now
from harness.store.tightness import DECISIVE_TIERS, not_tight

if TYPE_CHECKING:
    from harness.matrix import Expansion
    from harness.report.summary import CoverageLine
    from harness.store.branches import Reach

_YAML = (".yaml", ".yml")
COVERAGE = "attnreg_coverage"
_LETTERS = {Outcome.UNSUPPORTED: "u", Outcome.XFAIL: "x", Outcome.ELEVATED: "e"}


class Reporting:
    """A pytest plugin object, registered in the controller."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.records: list[Record] = []
        self.log: RunLog | None = None
        self.nothing_ran = ""  # why, where no case was run
        self.selected: dict[str, None] = {}  # node ids of cases, in their order
        self.reported: set[str] = set()  # those that have a record
        self.unreadable = 0  # matrices
        self.left_out = ""  # how many cases were not run, where the run was told to stop

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A run whose matrices cannot be read is the latest run too: an older, green one must not stand for it."""
        if report.failed and report.nodeid.endswith(_YAML):
            self.unreadable += 1
            self._open_log()

    def pytest_runtest_logstart(self, location: tuple[str, int | None, str]) -> None:
        """From the first case on this is the latest run, even if it ends before that case has a record."""
        if location[0].endswith(_YAML):
            self._open_log()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected |= dict.fromkeys(item.nodeid for item in session.items if isinstance(item, MatrixItem))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.selected |= dict.fromkeys(nodeid for nodeid in ids if _is_case(nodeid))
        if self.unreadable and not self.session.config.getoption("--continue-on-collection-errors"):
            errors = "1 error" if self.unreadable == 1 else f"{self.unreadable} errors"
            raise pytest.Session.Interrupted(f"{errors} during collection")  # as without workers

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line = getattr(report, "attnreg", None)
        if line is not None and report.nodeid not in self.reported:
            self._keep(report.nodeid, Record.from_json(line))
        elif report.failed and _is_case(report.nodeid) and report.nodeid not in self.reported:
            self._lose(report.nodeid, report.longreprtext.strip().splitlines()[-1:])

    def _keep(self, nodeid: str, record: Record) -> None:
        self.reported.add(nodeid)
        self._open_log().write(record)
        self.records.append(record)

    def _lose(self, nodeid: str, why: Sequence[str]) -> None:
        """A case that was selected has no verdict: that is a fault of the harness, and is recorded as one."""
        try:
            found = self.session.find_case(nodeid)
        except AttnregError:
            return  # another plugin's item
        verdict = Verdict(Outcome.ERROR, ": ".join(("lost: it was selected and left no record", *why)))
        self._keep(nodeid, self.session.make_record(found.case, found.line, found.path, verdict))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """No run is green in which nothing ran, whose numerics profiles are too loose, or that missed a path."""
        if self.session.config.getoption("--collect-only"):
            return
        self._account(session)
        decisive = self.session.tier in DECISIVE_TIERS and self.session.plant is None
        self.nothing_ran = self._nothing_ran(int(session.exitstatus))
        if self.nothing_ran:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        elif session.exitstatus == pytest.ExitCode.OK and (
            (decisive and not_tight(self.records)) or any(one.wrong for one in self._reach())
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _account(self, session: pytest.Session) -> None:
        """Every case that was selected has a record, or the run was told to stop before it."""
        lost = [nodeid for nodeid in self.selected if nodeid not in self.reported]
        if not lost:
            return
        if session.shouldfail or session.shouldstop or session.exitstatus == pytest.ExitCode.INTERRUPTED:
            why = session.shouldfail or session.shouldstop or "the run was interrupted"
            self.left_out = f"{len(lost)} of {len(self.selected)} cases were not run: {why}"
            return
        for nodeid in lost:
            self._lose(nodeid, ())
        if session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _nothing_ran(self, status: int) -> str:
        facts = self.session
        if self.records and all(record.outcome is Outcome.UNSUPPORTED for record in self.records):
            return f"nothing was tested: all {len(self.records)} cases are outside the contracts of their kernels"
        if self.records or not facts.coverage or status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return ""
        if facts.num_deselected:
            chosen = [f"{n} '{v}'" for n in ("--where", "--plant") if (v := facts.config.getoption(n))]
            return f"{' and '.join(chosen)} leaves none of {facts.num_deselected} cases of tier {facts.tier}"
        if facts.narrowed:
            return ""  # which pytest reports
        return f"no matrix has a case in tier {facts.tier}: {', '.join(facts.coverage)}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Each outcome is a category of its own, so that failures are explained once, by attnreg."""
        line = getattr(report, "attnreg", None)
        if line is None:
            return None
        outcome = Record.from_json(line).outcome
        if outcome is Outcome.PASS:
            return None
        category = "harness_error" if outcome is Outcome.ERROR else outcome.value.lower()  # "error" is pytest's own
        return category, _LETTERS.get(outcome, "F"), outcome.value

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.log is None:
            if self.nothing_ran:
                terminalreporter.write_line(f"ERROR: {self.nothing_ran}", red=True)
            return
        self.log.close()
        from harness.report.terminal import render_run

        writer = terminalreporter._tw
        text = render_run(
            self.records,
            self.log.header,
            self._coverage(),
            str(self._shown(self.log.latest)),
            width=max(80, min(writer.fullwidth, 120)),
            color=writer.hasmarkup,
            reach=self._reach(),
        )
        terminalreporter.ensure_newline()
        writer.write(text)
        if self.left_out:
            terminalreporter.write_line(self.left_out, red=True)
        if self.nothing_ran:
            terminalreporter.write_line(f"ERROR: {self.nothing_ran}", red=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Workers collect, the controller does not: they send what they know of coverage."""
        known = getattr(node, "workeroutput", {}).get(COVERAGE, ({}, {}, 0, False))
        coverage, explained, num_deselected, narrowed = known
        self.session.coverage.update(coverage)
        self.session.explained.update(explained)
        self.session.num_deselected = max(self.session.num_deselected, num_deselected)
        self.session.narrowed |= narrowed

    def _coverage(self) -> dict[str, CoverageLine]:
        """What the cases that ran cover, by matrix name: the claim of the matrix only where all of its cases ran."""
        from harness.report.summary import CoverageLine

        ran: dict[str, dict[str, str]] = {}
        for record in self.records:
            ran.setdefault(record.matrix, {})[record.id] = record.matrix_path
        lines = {}
        for name, paths in ran.items():
            if name not in self.session.coverage:  # a worker that was stopped sent nothing
                self._expanded(next(iter(paths.values())))
            text, total = self.session.coverage.get(name, ("", len(paths)))
            if len(paths) >= total:
                lines[name] = CoverageLine(text, complete="%" not in text or "100 %" in text)
            elif (expansion := self._expanded(next(iter(paths.values())))) is not None:
                lines[name] = CoverageLine(expansion.describe_part(paths), complete=False, total=total)
        return lines

    def _reach(self) -> list[Reach]:
        """How the cases that ran spread over the dispatches of their kernels."""
        from harness.store.branches import reach

        kernels = self.session.kernels.items()
        branches = {name: one.dispatch.branches for name, one in kernels if one.dispatch is not None}
        explained = chain.from_iterable(self.session.explained.values())
        return reach(self.records, branches, explained, complete=self._everything_ran())

    def _everything_ran(self) -> bool:
        """Whether all cases of all matrices beside those of this run were run, as they are."""
        ran = Counter(record.matrix for record in self.records)
        read = {Path(path) for path in self.session.explained}
        beside = {path for folder in {path.parent for path in read} for path in folder.iterdir() if is_matrix(path)}
        whole = all(ran[name] >= total for name, (_, total) in self.session.coverage.items())
        return whole and beside <= read and self.session.plant is None

    def _expanded(self, path: str) -> Expansion | None:
        """The cases of the matrix at `path`; None where it was changed since it was collected: nothing is claimed."""
        try:
            return self.session.expand(self.session.config.rootpath / path)[1]
        except AttnregError:
            return None

    def _open_log(self) -> RunLog:
        if self.log is None:
            try:
                self.log = RunLog(self.session.reports, self._header())
            except OSError as error:
                pytest.exit(f"--reports: cannot write to {self.session.reports}: {error.strerror}", returncode=4)
        return self.log

    def _shown(self, path: Path) -> Path:
        root = self.session.config.rootpath
        return path.relative_to(root) if path.is_relative_to(root) else path

    def _header(self) -> Header:
        config = self.session.config
        seeds = {"data": config.getoption("--data-seed"), "geometry": config.getoption("--geometry-seed")}
        plant = config.getoption("--plant")
        return Header(
            run=new_run_id(),
            started=utc_now(),
            argv=tuple(sys.argv[1:]),
            environment=environment(),
            seeds={name: seed for name, seed in seeds.items() if seed is not None},
            plants=(plant,) if plant else (),
            options={"tier": self.session.tier, **self.session.reproduce_options},
        )


def _is_case(nodeid: str) -> bool:
    """Whether a node id may be that of a case; one outside the root folder is without its file."""
    path, separator, _ = nodeid.partition("::")
    return bool(separator) and (not path or path.endswith(_YAML))
