"""Whole sessions whose cases end their process: each is told as what it is and costs no other case."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch

from harness.run.outcome import Outcome
from tests.plugin.test_session import EXPECT, FEW, KERNELS, MATRIX, Toys

DEADLY = {  # kernel: outcome, and what the reason has to say
    "toy_fenced": (Outcome.CRASH, " of v_cache ("),
    "toy_gorging": (Outcome.OUT_OF_MEMORY, "could not be allocated"),
    "toy_quitting": (Outcome.FAIL, "SystemExit"),
    "toy_stumbling": (Outcome.CRASH, "collateral damage: the process died of SIGSEGV"),
}
KERNELS_IN_ORDER = "toy_littering, toy_stumbling, toy_fenced, toy_spinning, toy_gorging, toy_quitting, toy_honest"
AXES = "page_size: [256]"  # so that a page of memory lies within the cache
KNOWN = EXPECT.format(kernel="toy_spinning", until="2999-01-01").replace("outcome: FAIL", "outcome: TIMEOUT")


def test_every_way_to_die_is_told_and_costs_no_other_case(toys: Toys) -> None:
    result = toys.run(
        KERNELS_IN_ORDER,
        "--case-timeout=3",
        "--junitxml=junit.xml",
        axes=AXES,
        expect=KNOWN + FEW,
        isolated=True,
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["attnreg: cases run in 1 worker process, *"])
    records = {record.id: record for record in toys.records}
    assert len(records) == len(toys.records) == 8
    for record in records.values():
        assert f"toys.yaml::{record.id}'" in record.reproduce
        assert record.worker.startswith("gw")
    assert toys.outcomes["toy_honest"] == toys.outcomes["toy_littering"] == {Outcome.PASS}
    assert toys.outcomes["toy_spinning"] == {Outcome.XFAIL}
    by_kernel = {record.kernel: record for record in records.values()}
    for kernel, (outcome, words) in DEADLY.items():
        assert (by_kernel[kernel].outcome, words in by_kernel[kernel].reason) == (outcome, True), by_kernel[kernel]
    segfault, timeout = by_kernel["toy_fenced"].explanation, by_kernel["toy_spinning"].explanation
    assert segfault is not None
    assert segfault["rows"]["again"][0] == "alone in a fresh process it fails too: the process died of SIGSEGV"
    assert segfault["rows"]["again"][1].startswith("address 0x")
    assert timeout is not None
    assert " in spinning" in timeout["rows"]["hung"][0]
    before = f"it ends in PASS; the case before it was toys.yaml::{by_kernel['toy_littering'].id}"
    assert before in by_kernel["toy_stumbling"].reason

    cases = list(ElementTree.parse(toys.pytester.path / "junit.xml").iter("testcase"))
    assert len(cases) == 8
    assert sum(case.find("failure") is not None for case in cases) == len(DEADLY)
    assert not [case for case in cases if case.find("error") is not None]
    again = toys.run(KERNELS_IN_ORDER, "--lf", "--collect-only", "-q", axes=AXES, expect=KNOWN + FEW)
    assert sorted(line.split("-")[1] for line in again.outlines if "::" in line) == sorted(DEADLY)


def test_with_isolate_nothing_is_left_behind(toys: Toys) -> None:
    result = toys.run("toy_littering, toy_stumbling", "--isolate", isolated=True)
    assert result.ret == 0
    assert toys.outcomes == {"toy_littering": {Outcome.PASS}, "toy_stumbling": {Outcome.PASS}}


FIRST = [("cpu", "toy_exiting", Outcome.CRASH, "ended itself with status 3")]
ON_DEVICE = [
    ("cuda", "toy_illegal", Outcome.CRASH, "illegal memory access"),
    ("cuda", "toy_asserting", Outcome.CRASH, "device-side assert"),
    ("cuda", "toy_endless", Outcome.TIMEOUT, "waiting for the device"),
]


@pytest.mark.parametrize(
    ("device", "kernel", "outcome", "words"), FIRST + (ON_DEVICE if torch.cuda.is_available() else [])
)
def test_a_crash_counts_for_maxfail(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, device: str, kernel: str, outcome: Outcome, words: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # this process interprets, the session is to compile
    result = toys.run(f"{kernel}, toy_honest", "-x", f"--device={device}", "--case-timeout=40", isolated=True)
    assert toys.outcomes == {kernel: {outcome}}
    assert words in toys.records[0].reason
    result.stdout.fnmatch_lines(["3 of 4 cases were not run: stopping after 1 failures"])


def test_isolate_without_workers_is_refused(toys: Toys) -> None:
    result = toys.run("toy_honest", "--isolate")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--isolate needs worker processes: cases run in this process (-n 0)*"])


@pytest.mark.parametrize("mode", ["loadgroup", "loadscope", "loadfile", "each"])
def test_modes_that_lose_cases_are_refused(toys: Toys, mode: str) -> None:
    toys.pytester.makefile(".yaml", toys=MATRIX.format(kernels="toy_honest", axes="", expect="", tier="full"))
    arguments = ["-p", "harness.plugin", "toys.yaml", f"--kernels={KERNELS}", "-n2", f"--dist={mode}"]
    result = toys.pytester.runpytest_inprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--dist {mode}: pytest-xdist loses cases or hangs*use load or worksteal"])


def test_sessions_without_matrices_are_left_as_they_are(toys: Toys) -> None:
    toys.pytester.makepyfile("def test_one():\n    pass\n")
    result = toys.pytester.runpytest_inprocess("-p", "harness.plugin", "-n0", "--dist=loadfile")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*attnreg: cases run*")


def test_a_run_in_process_says_so(toys: Toys) -> None:
    result = toys.run("toy_honest")
    result.stdout.fnmatch_lines(["attnreg: cases run in this process (-n 0): one that ends it ends the session"])


@pytest.mark.parametrize("given", ["-1", "soon", "nan", "inf"])
def test_a_time_limit_that_is_none_is_refused(toys: Toys, given: str) -> None:
    result = toys.run("toy_honest", f"--case-timeout={given}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--case-timeout: expected seconds (0: no limit), got '{given}'*"])


PLANTED = {
    "vanish": ("pytest_runtest_protocol", "return True if 's1' in item.name else None"),  # no report is ever made
    "break": ("pytest_runtest_setup", "raise KeyError('the fixture')"),  # never run
}


@pytest.mark.parametrize(("plant", "amount"), [("vanish", 1), ("break", 2)])
def test_a_case_without_a_record_is_an_error(toys: Toys, plant: str, amount: int) -> None:
    hook, body = PLANTED[plant]
    toys.pytester.makeconftest(f"import pytest\n\n@pytest.hookimpl(tryfirst=True)\ndef {hook}(item):\n    {body}\n")
    result = toys.run("toy_honest")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert len(toys.records) == 2
    lost = [record for record in toys.records if record.outcome is Outcome.ERROR]
    assert len(lost) == amount
    assert all(record.reason.startswith("lost: it was selected and left no record") for record in lost)


def test_a_context_that_died_ends_a_run_in_process(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.run.run_case.context_error", lambda device: "an illegal memory access")
    result = toys.run("toy_honest")
    assert [record.outcome for record in toys.records] == [Outcome.CRASH]
    assert toys.records[0].reason == "the device context died: an illegal memory access"
    result.stdout.fnmatch_lines(["1 of 2 cases were not run: the device context died, and with -n 0 *"])


BARREN = """
import os, sys
from pathlib import Path

def pytest_configure(config):
    if hasattr(config, "workerinput"):
        seen = os.environ["CUDA_VISIBLE_DEVICES"] + " torch" * ("torch" in sys.modules)
        Path(config.workerinput["workerid"]).write_text(seen)
        os._exit(7)
"""


def test_workers_that_die_before_they_have_collected_do_not_go_on_for_ever(
    toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each sees its GPU before torch is imported, whoever replaces it the same."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    toys.pytester.makeconftest(BARREN)
    result = toys.run("toy_honest", "--device=auto", "-n2", isolated=True)
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR
    result.stdout.fnmatch_lines(["*3 workers in a row died before they had collected*ended itself with status 7*"])
    seen = {path.name: path.read_text() for path in toys.pytester.path.glob("gw*")}
    assert (seen.get("gw0", "4"), seen.get("gw1", "7")) == ("4", "7")  # three died, and so perhaps not both of these
    assert set(seen.values()) <= {"4", "7"}
