"""What one pytest session knows: its options, its kernels, its matrices and its run log. Kept in the config's stash.

Invariant: nothing here is global; the controller owns the run log, workers only send records.
"""

from __future__ import annotations

import datetime
import functools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.case import Case
from harness.dispatch.stated import check_statements
from harness.errors import UsageError
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels, writers_of
from harness.matrix.axes import case_id
from harness.matrix.expand import Expansion
from harness.matrix.loading import load
from harness.matrix.matrix import TIERS, Matrix
from harness.matrix.source import Mistake, Span
from harness.matrix.where import Where

if TYPE_CHECKING:
    from harness.run.outcome import Verdict
    from harness.run.plant import Plant
    from harness.run.run_case import Options
    from harness.store.record import Record

PLUGIN = "harness.plugin"
PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Found:
    """A case, and where it is written."""

    case: Case
    line: int
    path: Path
    matrix: Matrix


@dataclass
class Session:
    config: pytest.Config
    kernels: Mapping[str, Contract]
    where: Where | None
    coverage: dict[str, tuple[str, int]] = field(default_factory=dict)  # by matrix name: in words, and number of cases
    explained: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)  # by path: kernel, branch, because
    num_deselected: int = 0  # by --where or --plant
    narrowed: bool = False  # by pytest's own selection
    expanded: dict[Path, tuple[Matrix, Expansion]] = field(default_factory=dict)
    _found: dict[Path, dict[str, Found]] = field(default_factory=dict)  # cases by path and id, once asked for

    @classmethod
    def from_config(cls, config: pytest.Config) -> Session:
        """Raises KernelNotFound or WhereError for options that cannot be used."""
        where = config.getoption("--where")
        return cls(
            config,
            find_kernels(Path(folder) for folder in config.getoption("--kernels")),
            Where.parse(where) if where else None,
        )

    @property
    def tier(self) -> str:
        return str(self.config.getoption("--tier"))

    @property
    def is_worker(self) -> bool:
        return hasattr(self.config, "workerinput")

    @property
    def reports(self) -> Path:
        chosen = self.config.getoption("--reports")
        return Path(chosen) if chosen else self.config.rootpath / "reports"

    @property
    def case_timeout(self) -> float:
        """Seconds that a case may take, 0 for no limit. Raises UsageError."""
        given = self.config.getoption("--case-timeout")
        text = str(self.config.getini("case_timeout") if given is None else given)
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise UsageError(f"--case-timeout: expected seconds (0: no limit), got '{text}'")
        return seconds

    @property
    def worker(self) -> str:
        """Name of this worker process; empty in the controller."""
        return str(getattr(self.config, "workerinput", {}).get("workerid", ""))

    def expand(self, path: Path) -> tuple[Matrix, Expansion]:
        """The matrix at `path` and its cases of this session's tier. Raises MatrixError."""
        if path not in self.expanded:
            matrix = load(path, kernel_names=self.kernels, writer_names=writers_of(self.kernels))
            expansion = matrix.expand(self.tier, supported=self.unsupported)
            self._check_conditions(matrix, expansion)
            self.coverage[matrix.name] = expansion.describe(), len(expansion.cases)
            self.explained[str(path)] = [
                (one.kernel, one.branch, one.because) for one in matrix.unreached if self.tier in one.tiers
            ]
            self.expanded[path] = matrix, expansion
        return self.expanded[path]

    def _check_conditions(self, matrix: Matrix, expansion: Expansion) -> None:
        """MatrixError for an expectation that hides nothing any more: of no case in any tier, or expired unnoticed.

        And for statements about dispatch that no case meets or that contracts refute.
        """

        @functools.cache
        def everywhere() -> list[Case]:
            return [c for t in TIERS for c in matrix.expand(t, supported=self.unsupported).cases]

        check_statements(matrix, self.kernels, expansion.cases, everywhere)
        for expectation in matrix.expectations:
            if any(expectation.where.evaluate(case) for case in expansion.cases):
                continue  # the cases it meets say so themselves if it has expired
            what = None
            if expectation.expired(datetime.date.today()):
                what = f"this expectation expired on {expectation.until.isoformat()}: look at {expectation.issue} again"
            elif not any(expectation.where.evaluate(case) for case in everywhere()):
                what = f"this expectation meets no case of any tier: '{expectation.where.text}'"
            if what is not None:
                matrix.source.add(Mistake(Span(expectation.line, 1), what))
        matrix.source.finish()

    def find_case(self, nodeid: str) -> Found:
        """The case that pytest calls `nodeid`. Raises MatrixError, or UsageError where there is none."""
        shown, _, wanted = nodeid.partition("::")
        for path in self._places(shown):
            if path not in self._found:
                matrix, expansion = self.expand(path)
                cases = zip(expansion.cases, expansion.lines, strict=True)
                self._found[path] = {case_id(case): Found(case, line, path, matrix) for case, line in cases}
            if wanted in self._found[path]:
                return self._found[path][wanted]
        raise UsageError(f"{nodeid}: no such case in tier {self.tier}")

    def _places(self, shown: str) -> Iterator[Path]:
        """The files that a node id may begin with: relative to the root, or else to what pytest was asked to run."""
        given = (self.config.invocation_params.dir / arg.partition("::")[0] for arg in self.config.args)
        asked = (path / shown if path.is_dir() else path for path in given)
        yield from (path for path in (self.config.rootpath / shown, *asked) if path.is_file())

    def make_record(self, case: Case, line: int, path: Path, verdict: Verdict, worker: str = "") -> Record:
        """The record of one case, with the command that runs it again. worker: who ran it, if not this process."""
        from harness.store.record import Record
        from harness.triage.reproduce import reproduce_line

        name, shown = case_id(case), os.path.relpath(path, self.config.rootpath)
        own_seeds = {"geometry": case.geometry_seed, "data": case.data_seed}
        given = {seed: self.config.getoption(f"--{seed}-seed") for seed in own_seeds}
        seeds = verdict.seeds or {seed: own if given[seed] is None else given[seed] for seed, own in own_seeds.items()}
        command = reproduce_line(
            shown, name, self.tier, seeds, self.reproduce_options, default_seeds=own_seeds, plugin=self.named_plugin
        )
        return Record.of(
            case,
            replace(verdict, seeds=seeds),
            id=name,
            matrix_path=shown,
            line=line,
            tier=self.tier,
            worker=worker or self.worker,
            reproduce=command,
        )

    def unsupported(self, case: Case) -> str | None:
        return self.kernels[case.kernel].unsupported(case)

    def selects(self, case: Case) -> bool:
        """Whether --where and --plant leave anything to run in `case`."""
        if self.where is not None and not self.where.evaluate(case):
            return False
        return self.plant is None or self.plant.applies(case, self.kernels[case.kernel].content)

    @functools.cached_property
    def plant(self) -> Plant | None:
        name = self.config.getoption("--plant")
        if not name:
            return None
        from harness.run.plant import find_plant

        return find_plant(name)

    @functools.cached_property
    def options(self) -> Options:
        from harness.kernel.fences import Fences
        from harness.run.plant import NO_PLANT
        from harness.run.run_case import Options

        return Options(
            device=self.config.getoption("--device"),
            contract_checks=not self.config.getoption("--no-contract-checks"),
            access_trace=not self.config.getoption("--no-access-trace"),
            plant=self.plant or NO_PLANT,
            data_seed=self.config.getoption("--data-seed"),
            geometry_seed=self.config.getoption("--geometry-seed"),
            twice=self.config.getoption("--twice"),
            fences=Fences(
                self.config.getoption("--fences"),
                None if (only := self.config.getoption("--fence-only")) is None else frozenset(only.split(",")),
                self.config.getoption("--fence-front"),
            ),
            buffer_map=Path(chosen) if (chosen := self.config.getoption("--buffer-map")) else None,
        )

    def options_for(self, matrix: Matrix) -> Options:
        """The options of this session, with what `matrix` demands."""
        from harness.run.observe import Demand

        return replace(
            self.options,
            demand=Demand(matrix.must_see, matrix.margin),
            twins=matrix.twins,
            noise_floor=matrix.noise_floor,
            must_run=matrix.must_run,
        )

    @property
    def named_plugin(self) -> str:
        """What -p has to name in every command, as it did in this one; nothing where attnreg is installed."""
        named = PLUGIN in (self.config.getoption("plugins") or ())
        return PLUGIN if named and not entry_points(group="pytest11", name=PLUGIN) else ""

    @property
    def reproduce_options(self) -> dict[str, object]:
        """The options that a reproduction needs besides id, tier and seeds, as given."""
        device = self.config.getoption("--device")
        return {
            "device": None if device == "auto" else device,
            "plant": self.config.getoption("--plant"),
            "kernels": [self._from_root(folder) for folder in self.config.getoption("--kernels")],
            "no_contract_checks": self.config.getoption("--no-contract-checks"),
            "no_access_trace": self.config.getoption("--no-access-trace"),
            "twice": self.config.getoption("--twice"),
            "fences": self.config.getoption("--fences"),
            "case_timeout": self.config.getoption("--case-timeout"),
        }

    def _from_root(self, folder: str) -> str:
        """A folder as it was given, for a command that is run from the root folder."""
        if Path(folder).is_absolute():
            return folder
        return os.path.relpath(self.config.invocation_params.dir / folder, self.config.rootpath)


SESSION = pytest.StashKey[Session]()
