"""The pytest plugin: options, collection, one record per case, the summary. Thin: the work is done elsewhere.

Invariant: every case that is run leaves exactly one record in the run log, also when its worker dies; an outcome of
attnreg is never turned into a skip.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator, MutableMapping, Sequence
from pathlib import Path

import pytest

from harness.errors import AttnregError, UsageError
from harness.isolation.isolate import isolate
from harness.isolation.sanitizer import TOOLS
from harness.items import MatrixFile, MatrixItem, is_matrix
from harness.matrix import TIERS
from harness.reporting import COVERAGE, Reporting
from harness.session import SESSION, Session

WHERE = pytest.StashKey[str]()  # where cases run, in words for the header


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnreg", "attention kernels against a float64 reference")
    group.addoption("--tier", choices=TIERS, default="smoke", help="tier of the matrices to run (default: smoke)")
    group.addoption("--where", metavar="EXPR", help="run only the cases for which EXPR holds, e.g. 'gqa_ratio == 8'")
    group.addoption(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where kernels run; cpu interprets"
    )
    group.addoption("--kernels", metavar="DIR", action="append", default=[], help="a further folder of kernels")
    group.addoption("--data-seed", type=int, metavar="N", help="override the data seed of every case")
    group.addoption("--geometry-seed", type=int, metavar="N", help="override the geometry seed of every case")
    group.addoption("--plant", metavar="NAME", help="inject a fault into the set-up; 'list' lists them")
    group.addoption("--no-contract-checks", action="store_true", help="launch even what violates the contract")
    group.addoption("--no-access-trace", action="store_true", help="do not trace what interpreted kernels read")
    group.addoption(
        "--case-timeout", metavar="SECONDS", help="end a case that takes longer: TIMEOUT (default: 300; 0: no limit)"
    )
    group.addoption("--twice", action="store_true", help="launch each case once more, in another order: equal bits")
    group.addoption(
        "--fences", action="store_true", help="nothing mapped around any buffer: a touch ends the case as CRASH"
    )
    group.addoption("--isolate", action="store_true", help="a fresh process for each case; needs workers (not -n 0)")
    group.addoption(
        "--sanitize",
        choices=TOOLS,
        help="run one case under that tool of compute-sanitizer",
    )
    for name in ("--buffer-map", "--fault"):  # of processes that attnreg starts: where they leave addresses
        group.addoption(name, metavar="FILE", help=argparse.SUPPRESS)
    group.addoption("--fence-only", metavar="NAMES", help=argparse.SUPPRESS)  # of such, too: the buffers to fence
    group.addoption("--fence-front", action="store_true", help=argparse.SUPPRESS)  # and at which end
    group.addoption("--reports", metavar="DIR", help="where run logs go (default: reports/ of pytest's root folder)")
    parser.addini("case_timeout", "seconds a case may take, 0 for no limit", default="300")


def share_cores(environ: MutableMapping[str, str], cores: int) -> None:
    """Give a worker its share of the cores, before it imports torch, which would take all of them in every worker."""
    if workers := int(environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        environ.setdefault("OMP_NUM_THREADS", str(max(cores // workers, 1)))


def pytest_configure(config: pytest.Config) -> None:
    share_cores(os.environ, os.cpu_count() or 1)
    try:
        session = Session.from_config(config)
        if config.getoption("--plant") not in (None, "list"):
            from harness.run.plant import find_plant  # imports torch, which collecting does without

            find_plant(config.getoption("--plant"))
        if config.getoption("--device") == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise UsageError("--device cuda: torch finds no CUDA or ROCm device here")
        where = isolate(session)
    except AttnregError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[SESSION], config.stash[WHERE] = session, where
    if not session.is_worker:
        config.pluginmanager.register(Reporting(session), "attnreg-reporting")


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"attnreg: {where}" if (where := config.stash[WHERE]) else None


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if config.getoption("--plant") != "list":
        return None
    from harness.run.plant import PLANTS

    for plant in PLANTS.values():
        sys.stdout.write(f"{plant.name:<22} {plant.expected:<9} {plant.about}\n")
    return 0


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> MatrixFile | None:
    named = file_path.suffix in (".yaml", ".yml") and parent.session.isinitpath(file_path)
    return MatrixFile.from_parent(parent, path=file_path) if named or is_matrix(file_path) else None


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, MatrixItem):
            item.facts.narrowed = True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    if config.getoption("--sanitize") and len(items) > 1:
        raise pytest.UsageError(f"--sanitize takes one case, and {len(items)} are selected: name one id")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and isinstance(item, MatrixItem) and item.record is not None:
        vars(report)["attnreg"] = item.record.to_json()  # travels from worker to controller with the report
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    facts = session.config.stash[SESSION]
    if facts.is_worker:
        vars(session.config)["workeroutput"][COVERAGE] = (
            facts.coverage,
            facts.explained,
            facts.num_deselected,
            facts.narrowed,
        )
