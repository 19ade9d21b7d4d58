"""What a dead process left behind, read: signal, status, the stack that matters, the kernel's own line."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.isolation.alone import Alone
from harness.isolation.autopsy import Death, autopsy, stack_of
from harness.isolation.fault_address import Fault, read_fault
from harness.isolation.postmortem import memory_kills, second_opinion
from harness.kernel.buffer_map import Span
from harness.run.outcome import Outcome
from harness.session import PROJECT
from harness.store.record import Record

KERNELS = Path("/k/family")
BUFFERS = (Span("k_cache", 0x1000, 512),)
SEGFAULT = """Fatal Python error: Segmentation fault

Thread 0x00007f0000000001 (most recent call first):
  File "/py/threading.py", line 10 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "/py/ctypes/__init__.py", line 519 in string_at
  File "/k/family/attention.py", line 72 in step_kernel
  File "/a/harness/run/run_case.py", line 174 in _launched

Extension modules: numpy (total: 1)
"""
NO_FRAME = SEGFAULT.replace("Current thread", "Thread")  # what faulthandler writes where a thread of C failed
TIMEOUT = "Timeout (0:00:05)!\n" + NO_FRAME.partition("\n\n")[2]
ON_DEVICE = """Timeout (0:00:05)!
Thread 0x00007f0000000002 (most recent call first):
  File "/py/torch/cuda/__init__.py", line 1040 in synchronize
  File "/a/harness/kernel/launch.py", line 64 in launch
  File "/a/harness/run/run_case.py", line 174 in _launched
"""


@pytest.mark.parametrize(
    ("death", "outcome", "reason"),
    [
        (Death(-11, SEGFAULT), Outcome.CRASH, "the process died of SIGSEGV at attention.py:72 in step_kernel"),
        (Death(-11, NO_FRAME), Outcome.CRASH, "the process died of SIGSEGV at attention.py:72 in step_kernel"),
        (Death(-6, ""), Outcome.CRASH, "the process died of SIGABRT"),
        (
            Death(None, SEGFAULT),
            Outcome.CRASH,
            "the process died: Segmentation fault at attention.py:72 in step_kernel",
        ),
        (Death(None, ""), Outcome.CRASH, "the process died, how is not to be had"),
        (Death(3, ""), Outcome.CRASH, "the process ended itself with status 3, as os._exit does"),
        (Death(0, ""), Outcome.CRASH, "the process ended itself with status 0, as os._exit does"),
        (Death(-9, ""), Outcome.CRASH, "the process died of SIGKILL, as the system does for want of memory"),
        (Death(-9, "", 1), Outcome.OUT_OF_MEMORY, "the system killed the process for want of memory (SIGKILL)"),
        (Death(-11, SEGFAULT, 1), Outcome.CRASH, "the process died of SIGSEGV at attention.py:72 in step_kernel"),
        (Death(1, TIMEOUT), Outcome.TIMEOUT, "did not end within 5 s: it was at attention.py:72 in step_kernel"),
        (
            Death(1, ON_DEVICE),
            Outcome.TIMEOUT,
            "did not end within 5 s: it was waiting for the device, on which a kernel does not end",
        ),
    ],
)
def test_a_death_is_read_as_what_it_was(death: Death, outcome: Outcome, reason: str) -> None:
    verdict = autopsy(death, 5.0, KERNELS)
    assert (verdict.outcome, verdict.reason) == (outcome, reason)
    assert verdict.explanation is not None
    assert verdict.explanation["summary"] == reason
    shown = verdict.explanation["rows"].get("stack", [])
    assert not any("run_case.py" in frame or "threading" in frame for frame in shown)


def test_a_crash_outside_the_kernels_folder_is_not_said_to_be_in_it() -> None:
    assert autopsy(Death(-11, SEGFAULT), 5.0, Path("/k/other")).reason == "the process died of SIGSEGV"


def test_the_dump_of_this_python_is_understood(tmp_path: Path) -> None:
    """The format is faulthandler's: a real dump, of the stack of this very test."""
    with (tmp_path / "dump").open("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        dump = file.read()
    stack = stack_of(dump)
    assert stack[0].function == "test_the_dump_of_this_python_is_understood"
    assert Path(stack[0].path) == Path(__file__)


def test_a_fatal_signal_of_this_python_is_understood() -> None:
    code = "import ctypes, faulthandler\nfaulthandler.enable()\ndef f():\n    ctypes.string_at(0)\nf()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    verdict = autopsy(Death(done.returncode, done.stderr), 5.0, None)
    assert verdict.reason == "the process died of SIGSEGV"
    assert verdict.explanation is not None
    assert [frame["function"] for frame in verdict.explanation["stack"]] == ["string_at", "f", "<module>"]


def _alone(outcome: Outcome | None, reason: str = "") -> Alone:
    record = None
    if outcome is not None:
        record = Record("id", "m", "m.yaml", 1, "smoke", "k", outcome, reason)
    return Alone(record, Death(-11, SEGFAULT))


def test_a_crash_that_happens_again_is_the_cases_own() -> None:
    crash = autopsy(Death(-11, SEGFAULT), 5.0, KERNELS)
    seen = second_opinion(crash, _alone(None), "m.yaml::before", 5.0)
    assert (seen.outcome, seen.reason) == (crash.outcome, crash.reason)
    assert seen.explanation is not None
    assert seen.explanation["rows"]["again"] == ["alone in a fresh process it fails too: the process died of SIGSEGV"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [(0x1204, "address 0x1204: 4 bytes behind k_cache (of 512 bytes)"), (0, "address 0x0: near no buffer")],
)
def test_the_address_of_a_crash_names_the_buffer(fault: int, said: str) -> None:
    crash = autopsy(Death(-11, SEGFAULT), 5.0, KERNELS)
    alone = replace(_alone(None), fault=Fault(fault, "read"), buffers=BUFFERS if fault else ())
    seen = second_opinion(crash, alone, None, 5.0)
    assert seen.reason == f"{crash.reason}, {said}"


FAULT = """
import ctypes, faulthandler, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from harness.isolation.fault_address import note_fault_address
faulthandler.enable()
undo = note_fault_address(Path(sys.argv[2]))
if sys.argv[3] == "undone":
    undo()
if sys.argv[3] == "sent":
    os.kill(os.getpid(), 11)
ctypes.string_at(0x123450, 1)
"""


@pytest.mark.parametrize(
    ("how", "address"), [("read", 0x123450 if sys.platform == "linux" else None), ("undone", None), ("sent", None)]
)
def test_the_address_of_a_fatal_access_is_noted(tmp_path: Path, how: str, address: int | None) -> None:
    arguments = [sys.executable, "-c", FAULT, str(PROJECT), str(tmp_path / "fault"), how]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -11
    fault = read_fault(tmp_path / "fault")
    assert (fault and fault.address) == address
    assert fault is None or fault.access in ("read", "touched")
    assert "Segmentation fault" in done.stderr  # faulthandler has its say all the same


@pytest.mark.parametrize(
    ("before", "first", "last"),
    [
        ("m.yaml::before", "collateral damage", "; the case before it was m.yaml::before"),
        (None, "once only", ", and no case ran before it"),
    ],
)
def test_a_crash_that_does_not_happen_alone_is_told_as_that(before: str | None, first: str, last: str) -> None:
    crash = autopsy(Death(-11, SEGFAULT), 5.0, KERNELS)
    seen = second_opinion(crash, _alone(Outcome.PASS), before, 5.0)
    assert seen.outcome is Outcome.CRASH
    assert seen.reason == f"{first}: {crash.reason}, but alone in a fresh process it ends in PASS{last}"


def test_a_second_run_that_got_no_memory_acquits_nobody() -> None:
    crash = autopsy(Death(-11, SEGFAULT), 5.0, KERNELS)
    seen = second_opinion(crash, _alone(Outcome.OUT_OF_MEMORY, "no memory"), "m.yaml::before", 5.0)
    assert (seen.outcome, seen.reason) == (Outcome.CRASH, crash.reason)
    assert seen.explanation is not None
    assert seen.explanation["rows"]["again"] == ["alone in a fresh process nothing came of it: no memory"]


def test_a_second_run_that_did_not_come_to_the_case_says_nothing_of_it() -> None:
    crash = autopsy(Death(-11, SEGFAULT), 5.0, KERNELS)
    seen = second_opinion(crash, Alone(None, Death(4, ""), started=False, output="ERROR: no kernels here\n"), None, 5.0)
    assert seen.reason == crash.reason
    assert seen.explanation is not None
    assert seen.explanation["rows"]["again"] == ["alone it could not be run:", "ERROR: no kernels here"]


def test_kills_for_want_of_memory_are_counted(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    assert memory_kills(counters) == 0
    counters.write_text("nr_free_pages 5\noom_kill 3\npgmajfault 7\n")
    assert memory_kills(counters) == 3
