"""Flight recorder: in the process that runs cases, what it wants known should it die, and the limit on a case's time.

Invariant: while a case runs, a fatal signal or the end of its time leaves the stack in `file`; a process whose device
context or memory is spoilt runs no other case: a worker ends itself once the report of that case is sent.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
from collections.abc import Generator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO

import pytest

from harness.isolation.fault_address import note_fault_address
from harness.isolation.turns import turn
from harness.items import MatrixItem
from harness.run.outcome import Outcome
from harness.store.record import Record

SPOILT = (Outcome.CRASH, Outcome.OUT_OF_MEMORY)  # outcomes after which a process runs nothing else


class Recorder:
    """A pytest plugin object, registered where cases run.

    file: real file that the last words go to. limit: seconds per case, 0 for none. disposable: whether this process is
    a worker that is replaced when it ends. fresh: whether each case is to have a process of its own. fault: where the
    address of a fatal access is noted. turns: folder in which the workers of a session take turns at large cases.
    """

    def __init__(
        self,
        file: IO[str],
        limit: float,
        *,
        disposable: bool,
        fresh: bool = False,
        fault: Path | None = None,
        turns: Path | None = None,
    ) -> None:
        self.file, self.limit, self.disposable, self.fresh, self.fault = file, limit, disposable, fresh, fault
        self.turns = turns
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if not isinstance(item, MatrixItem):
            return (yield)
        with suppress(ImportError):  # of which the case itself has to tell
            importlib.import_module("harness.run.run_case")  # torch: importing it is not the case's time
        with turn(item.case, self.turns) if self.turns else nullcontext():
            return (yield from self._watched())

    def _watched(self) -> Generator[None, object, object]:
        faulthandler.enable(self.file)  # pytest's own goes to stderr, which nobody can tell by case
        undo = note_fault_address(self.fault) if self.fault else None
        if self.limit:
            faulthandler.dump_traceback_later(self.limit, file=self.file, exit=True)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            if undo:
                undo()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None, None, None]:
        yield  # in which pytest-xdist sends it: when this returns it is in the pipe
        line = getattr(report, "attnreg", None)
        if report.when != "call" or line is None:
            return
        outcome = Record.from_json(line).outcome
        if self.disposable and (self.fresh or outcome in SPOILT):
            os._exit(0)
        if outcome is not Outcome.CRASH or self.session is None:
            return
        if not self.session.config.getoption("--sanitize"):  # there it died in a process of its own
            self.session.shouldstop = "the device context died, and with -n 0 nothing replaces it"

    def pytest_unconfigure(self) -> None:
        faulthandler.disable()
        self.file.close()
