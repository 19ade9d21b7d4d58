"""Matrices as pytest files and cases as pytest items, so that ids, -k, --lf, -n, JUnit and --collect-only all work.

Invariant: collecting imports neither torch nor a kernel; an item holds a frozen case and nothing else.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.errors import AttnregError, UsageError
from harness.matrix import SHARED_ROWS
from harness.matrix.axes import case_id
from harness.session import SESSION, Session

if TYPE_CHECKING:
    from harness.case import Case
    from harness.matrix.expect import Expectation
    from harness.matrix.matrix import Matrix
    from harness.run.outcome import Verdict
    from harness.store.record import Record


_MATRIX_KEY = re.compile(r"""^["']?matrix["']?\s*:""", re.MULTILINE)
_YAML = (".yaml", ".yml")


def is_matrix(path: Path) -> bool:
    """Whether a file is taken for a matrix: all YAML beside a matrix is, shared rows apart.

    A file whose key `matrix` is misspelt is then an error, not a sweep that vanished.
    """
    if path.suffix not in _YAML or path.name == SHARED_ROWS:
        return False
    return any(has_matrix(other) for other in path.parent.iterdir())


def has_matrix(path: Path) -> bool:
    """Whether a file is YAML with the key of a matrix."""
    if path.suffix not in _YAML or not path.is_file():
        return False
    return _MATRIX_KEY.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def matrix_files(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths`, and the matrices in the folders among them, sorted.

    Raises UsageError for a path that is not there, a file that is no matrix and a folder without one.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        if path.is_file() and (path.name == SHARED_ROWS or path.suffix not in _YAML):
            raise UsageError(f"{path}: not a matrix")
        inside = sorted(filter(is_matrix, path.rglob("*.y*ml"))) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"{path}: no matrix in this folder")
        found += inside
    return found


class CaseFailed(Exception):
    """A case whose outcome is a failure; the item's record says all about it."""


class MatrixFile(pytest.File):
    """One matrix; collects the cases of the session's tier."""

    def collect(self) -> Iterable[MatrixItem]:
        session = self.config.stash[SESSION]
        try:
            matrix, expansion = session.expand(self.path)
            found = [(c, matrix.expectation(c)) if session.selects(c) else None for c in expansion.cases]
        except AttnregError as error:
            raise self.CollectError(str(error)) from None
        for one, line in zip(found, expansion.lines, strict=True):
            if one is not None:
                case, expectation = one
                yield MatrixItem.from_parent(
                    self, name=case_id(case), case=case, line=line, expectation=expectation, matrix=matrix
                )
            else:
                session.num_deselected += 1


class MatrixItem(pytest.Item):
    """One case on one kernel."""

    def __init__(
        self, *, case: Case, line: int, expectation: Expectation | None, matrix: Matrix, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.case, self.line, self.expectation, self.matrix = case, line, expectation, matrix
        self.record: Record | None = None

    @property
    def facts(self) -> Session:
        return self.config.stash[SESSION]

    def runtest(self) -> None:
        verdict = self._verdict()
        self.record = self.facts.make_record(self.case, self.line, self.path, verdict)
        self.user_properties.append(("outcome", verdict.outcome.value))
        if verdict.err_over_tol is not None:
            self.user_properties.append(("err_over_tol", verdict.err_over_tol))
        if verdict.outcome.is_failure:
            raise CaseFailed(verdict.reason)

    def _verdict(self) -> Verdict:
        from harness.run.expectation import apply_expectation
        from harness.run.outcome import Outcome, Verdict
        from harness.run.run_case import run_case
        from harness.triage.explain import explain_error

        facts = self.facts
        contract = facts.kernels[self.case.kernel]
        tool = self.config.getoption("--sanitize")
        try:
            if tool:
                from harness.isolation.sanitizer import sanitized

                plain = facts.make_record(self.case, self.line, self.path, Verdict(Outcome.PASS, "")).reproduce
                verdict = sanitized(facts, plain, contract.launches_of(self.case), tool)
            else:
                verdict = run_case(self.case, contract, facts.options_for(self.matrix))
        except Exception as error:  # noqa: BLE001  the harness is at fault: recorded as ERROR, with its trace
            return Verdict(Outcome.ERROR, f"{type(error).__name__}: {error}", explanation=explain_error(error))
        if self.expectation is None:
            return verdict
        return apply_expectation(verdict, self.expectation, datetime.date.today())

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        if self.record is None or not isinstance(excinfo.value, CaseFailed):
            return str(super().repr_failure(excinfo))
        from harness.report.plain import failure_text

        return failure_text(self.record)

    def reportinfo(self) -> tuple[Any, int, str]:
        return self.path, self.line - 1, self.name
