"""What compute-sanitizer says, read; and a session under a stand-in of it that says what was recorded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from harness.isolation.alone import Alone
from harness.isolation.autopsy import Death
from harness.isolation.sanitizer import SanitizerFinding, fold, read_findings
from harness.kernel.buffer_map import Span, describe_address
from harness.run.outcome import Outcome
from harness.store.record import Record
from tests.plugin.test_session import Toys

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at paged_kernel+0xc0 in /a/attention.py:72
=========     by thread (122,0,0) in block (0,0,0)
=========     Address 0x1200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x1000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cudaLaunchKernel [0x79f87] in libcudart.so.12
=========
========= Invalid __global__ read of size 4 bytes
=========     at paged_kernel+0xc0 in /a/attention.py:72
=========     by thread (123,0,0) in block (0,0,0)
=========     Access to 0x1204 is out of bounds
=========
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call.
=========     Saved host backtrace up to driver entry point at error
========= ERROR SUMMARY: 3 errors
"""
OLD = """========= Invalid __global__ write of size 2 bytes
=========     at 0xd80 in /src/paged.cu:162:void add_kernel<(bool)1>(T2 *)
=========     Address 0x7fcd is out of bounds
========= ERROR SUMMARY: 1 error
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void sum_kernel(int *, int *)+0x90 in /a/sum.cu:41
=========     and Read access at sum_kernel(int *, int *)+0x100 in /a/sum.cu:51 [508 hazards]
=========
========= Warning: Race reported between Write access at other(int *)+0x90 in /a/sum.cu:9
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 1 warning)
"""
INITCHECK = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at foreign_kernel+0x7be0
=========     by thread (25,0,0) in block (0,0,0)
=========     Address 0x7f3c
========= ERROR SUMMARY: 1 error
"""
SYNCCHECK = """========= Barrier error detected. Missing wait.
=========     at sync_kernel(int *)+0xa0 in sync.cu:61
=========     by thread (19,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
BLIND = "========= Error: Target application terminated before first instrumented API call\n"
BUFFERS = (Span("k_cache", 0x1000, 512), Span("out", 0x2000, 64))


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (
            MEMCHECK,
            SanitizerFinding(
                "Invalid __global__ read of size 4 bytes", "paged_kernel", "attention.py:72", 0x1200,
                "1 bytes after the nearest allocation of size 512 bytes",
            ),
        ),
        (OLD, SanitizerFinding("Invalid __global__ write of size 2 bytes", "add_kernel", "paged.cu:162", 0x7FCD)),
        (RACECHECK, SanitizerFinding("Race", "sum_kernel", "sum.cu:41")),
        (
            INITCHECK,
            SanitizerFinding("Uninitialized __global__ memory read of size 4 bytes", "foreign_kernel", "", 0x7F3C),
        ),
        (SYNCCHECK, SanitizerFinding("Barrier error detected. Missing wait", "sync_kernel", "sync.cu:61")),
    ],
)  # fmt: skip
def test_reports_of_every_tool_are_read(said: str, first: SanitizerFinding) -> None:
    found = read_findings(said)
    assert found[0] == first
    assert len(found) == (2 if said == MEMCHECK else 1)
    assert read_findings(CLEAN) == []


def _alone(outcome: Outcome | None, buffers: tuple[Span, ...] = ()) -> Alone:
    record = None if outcome is None else Record("id", "m", "m.yaml", 1, "smoke", "k", outcome, "")
    return Alone(record, Death(1, ""), output="ImportError: nothing here", buffers=buffers)


def test_a_finding_makes_a_pass_a_failure_and_names_the_buffer() -> None:
    verdict = fold(_alone(Outcome.PASS, BUFFERS), MEMCHECK, ("paged_kernel",), "memcheck")
    assert verdict.outcome is Outcome.FAIL
    assert verdict.reason == (
        "memcheck: Invalid __global__ read of size 4 bytes in paged_kernel at attention.py:72, address 0x1200: "
        "0 bytes behind k_cache (of 512 bytes) (and 1 more like it)"
    )


def test_a_crash_stays_a_crash_and_says_what_the_tool_found() -> None:
    verdict = fold(_alone(Outcome.CRASH), MEMCHECK, ("paged_kernel",), "memcheck")
    assert verdict.outcome is Outcome.CRASH
    assert "1 bytes after the nearest allocation of size 512 bytes" in verdict.reason


def test_findings_in_other_kernels_are_shown_but_not_blamed() -> None:
    verdict = fold(_alone(Outcome.PASS), INITCHECK, ("paged_kernel",), "initcheck")
    assert verdict.outcome is Outcome.PASS
    assert verdict.explanation is not None
    assert "foreign_kernel" in verdict.explanation["rows"]["elsewhere"][0]
    assert fold(_alone(Outcome.PASS), INITCHECK, (), "initcheck").outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("said", "because"),
    [
        (BLIND, "it saw no device kernel"),
        ("", "it did not sum up"),
        ("========= COMPUTE-SANITIZER\n", "it did not sum up"),
    ],
)
def test_a_tool_that_checked_nothing_is_no_pass(said: str, because: str) -> None:
    assert fold(_alone(Outcome.PASS), CLEAN, (), "memcheck").outcome is Outcome.PASS
    verdict = fold(_alone(Outcome.PASS), said, (), "memcheck")
    assert (verdict.outcome, verdict.reason) == (Outcome.ERROR, f"memcheck checked nothing: {because}")
    assert fold(_alone(None), said, (), "memcheck").reason.endswith("ImportError: nothing here")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (0x1000, "byte 0 of k_cache (512 bytes)"),
        (0x11FF, "byte 511 of k_cache (512 bytes)"),
        (0x1204, "4 bytes behind k_cache (of 512 bytes)"),
        (0x1FFC, "4 bytes before out"),
        (0x90000000, None),
    ],
)
def test_addresses_are_told_by_buffer(address: int, said: str | None) -> None:
    assert describe_address(address, BUFFERS) == said
    assert describe_address(address, ()) is None


STAND_IN = """#!{python}
import json, subprocess, sys
arguments = sys.argv[1:]
log = arguments[arguments.index("--log-file") + 1]
command = arguments[arguments.index("application-only") + 1 :]
status = subprocess.run(command).returncode
kept = next(word.partition("=")[2] for word in command if word.startswith("--buffer-map="))
buffers = {{b["name"]: b for b in map(json.loads, open(kept))}}
behind = buffers["v_cache"]["start"] + buffers["v_cache"]["size"] + 4
open(log, "w").write({text!r}.replace("ADDRESS", hex(behind)))
sys.exit(status)
"""


DYING_STAND_IN = """#!{python}
import sys
open(sys.argv[sys.argv.index("--log-file") + 1], "w").write({text!r})
sys.exit(9)
"""


def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, script: str = STAND_IN) -> None:
    tool = folder / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(script.format(python=sys.executable, text=text))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_case_under_the_tool(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(toys.pytester.path, monkeypatch, MEMCHECK.replace("0x1200", "ADDRESS"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # this process interprets, the case may be compiled
    result = toys.run("toy_honest", "--device=auto", "--sanitize=memcheck", "-k", "s1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert toys.outcomes == {"toy_honest": {Outcome.FAIL}}
    assert "read of size 4 bytes in paged_kernel" in toys.records[0].reason
    if not torch.cuda.is_available():  # there another buffer may begin right behind
        assert "4 bytes behind v_cache" in toys.records[0].reason
    assert toys.records[0].err_over_tol is not None
    result.stdout.fnmatch_lines(["*memcheck*Invalid __global__ read of size 4 bytes in paged_kernel*"])


def test_a_case_that_dies_under_the_tool_interrupts_nothing(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(toys.pytester.path, monkeypatch, MEMCHECK, DYING_STAND_IN)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = toys.run("toy_honest", "--device=auto", "--sanitize=memcheck", "-k", "s1")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert toys.outcomes == {"toy_honest": {Outcome.CRASH}}
    result.stdout.no_fnmatch_line("*Interrupted*")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device=auto",), "--sanitize takes one case, and 2 are selected: name one id"),
        (("-k", "s1"), "compute-sanitizer sees kernels of a GPU only, not --device cpu"),
    ],
)
def test_what_cannot_be_sanitized_is_one_message(
    toys: Toys,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
) -> None:
    _stand_in(toys.pytester.path, monkeypatch, CLEAN)
    result = toys.run("toy_honest", "--sanitize=memcheck", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert words in result.stdout.str() + result.stderr.str()


def test_a_tool_that_is_not_there_is_one_message(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(toys.pytester.path))
    result = toys.run("toy_honest", "--device=auto", "--sanitize=memcheck")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--sanitize: there is no compute-sanitizer on PATH*part of the CUDA toolkit*"])
