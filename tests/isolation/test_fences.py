"""Fences: whoever touches memory beyond a buffer dies of it, and the report says whose memory that was."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.isolation import fence_search
from harness.isolation.alone import Alone
from harness.isolation.autopsy import Death
from harness.isolation.fault_address import read_fault
from harness.isolation.fence_search import MAX_SEARCHES, FenceSearch, culprit
from harness.kernel.buffer_map import Span, describe_address, in_fence, read_buffer_map
from harness.run.outcome import Outcome
from harness.session import PROJECT
from harness.store.record import Record
from tests.isolation.beyond import attempt_in_child
from tests.plugin.test_session import FEW, Toys

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FAULTS = {  # toy kernel: what is said of its fault
    "beyond_block_table": "read right behind block_table (fence behind it)",
    "beyond_seq_lens": "read right behind seq_lens (fence behind it)",
    "beyond_query_start_loc": "read right behind query_start_loc (fence behind it)",
    "beyond_q": "read right behind q (fence behind it)",
    "beyond_k_cache": "read right behind k_cache (fence behind it)",
    "beyond_v_cache": "read right behind v_cache (fence behind it)",
    "beyond_v_scale": "read right behind v_scale (fence behind it)",
    "beyond_out": "wrote right behind out (fence behind it)",
    "beyond_workspace": "wrote right behind workspace scratch (fence behind it)",
    "beyond_far_behind": "read 1,048,576 bytes behind block_table (fence behind it)",
    "beyond_before": "read 4,19[0-9],[0-9]{3} bytes before q [(]fence before it[)]",  # from its end
}


def attempt_on_gpu(kernel: str, *, fences: bool) -> tuple[str, str]:
    """Outcome and reason, from a process of its own: this one interprets Triton, and the context may die."""
    command = [sys.executable, "-m", "tests.isolation.beyond", "cuda", kernel, str(int(fences))]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, timeout=300)
    outcome, reason = json.loads(done.stdout.splitlines()[-1])
    return outcome, reason


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_touch_beyond_a_buffer_is_a_fault_at_an_address_that_names_it(
    kernel: str, device: str, tmp_path: Path
) -> None:
    if device == "cuda":  # which tells no address
        outcome, reason = attempt_on_gpu(kernel, fences=True)
        assert (outcome, "illegal memory access" in reason) == ("CRASH", True), reason
        return
    assert attempt_in_child(kernel, tmp_path) < 0
    fault, spans = read_fault(tmp_path / "fault"), read_buffer_map(tmp_path / "buffers.json")
    assert fault is not None
    assert in_fence(fault.address, spans)
    said, expected = f"{fault.access} {describe_address(fault.address, spans)}", FAULTS[kernel]
    said = re.sub("^touched", expected.split()[0], said)  # by a processor that does not tell
    assert said == expected or re.fullmatch(expected, said)


@pytest.mark.parametrize("device", DEVICES)
def test_without_its_fault_the_kernel_is_green_and_without_fences_the_fault_is_not_seen(
    device: str, tmp_path: Path
) -> None:
    if device == "cuda":
        assert attempt_on_gpu("honest", fences=True)[0] == "PASS"
        assert attempt_on_gpu("beyond_block_table", fences=False)[0] == "PASS"
        return
    assert attempt_in_child("honest", tmp_path) == 0
    assert read_fault(tmp_path / "fault") is None
    assert attempt_in_child("beyond_block_table", tmp_path, fences=False) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_session_tells_which_fence_it_was_and_loses_no_other_case(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # this process interprets, the session is to compile
    kernels = "toy_beyond_block_table, toy_honest"
    result = toys.run(kernels, "--fences", f"--device={device}", expect=FEW, isolated=True)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert toys.outcomes == {"toy_beyond_block_table": {Outcome.CRASH}, "toy_honest": {Outcome.PASS}}
    record = next(record for record in toys.records if record.outcome is Outcome.CRASH)
    said = {
        "cpu": "the process died of SIGSEGV at beyond.py:[0-9]+ in launch, "
        "(read|touched) right behind block_table [(]fence behind it[)]",
        "cuda": "the device context died: .*; touched memory behind block_table [(]with its fence alone it crashes, "
        "without any it does not[)]",
    }
    assert re.fullmatch(said[device], record.reason), record.reason
    assert "--fences" in record.reproduce
    result.stdout.fnmatch_lines(["*behind block_table*"])


def test_fences_without_workers_are_refused(toys: Toys) -> None:
    result = toys.run("toy_honest", "--fences")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--fences needs worker processes: cases run in this process (-n 0)*"])


# ---- the search, where no address is told ----

NAMES = ("q", "k_cache", "v_cache", "block_table", "seq_lens", "out", "lse")


@pytest.mark.parametrize("amount", range(1, len(NAMES) + 1))
def test_a_culprit_is_found_by_halving(amount: int) -> None:
    names = NAMES[:amount]
    for wanted in names:
        asked: list[tuple[str, ...]] = []

        def crashes(some: Sequence[str], wanted: str = wanted, asked: list[tuple[str, ...]] = asked) -> bool:
            asked.append(tuple(some))
            return wanted in some

        assert culprit(names, crashes) == wanted
        assert len(asked) <= 4
        assert (wanted,) in asked  # never by elimination alone


def test_no_culprit_is_named_where_none_is_enough() -> None:
    assert culprit(NAMES, lambda some: {"q", "out"} <= set(some)) is None
    assert culprit((), lambda some: True) is None


CRASH = Record("id", "m", "m.yaml", 1, "smoke", "k", Outcome.CRASH, "the device context died", reproduce="pytest x")
LEFT = Alone(
    replace(CRASH, outcome=Outcome.PASS), Death(0, ""), buffers=tuple(Span(n, i, 1) for i, n in enumerate(NAMES))
)


def searched(search: FenceSearch, record: Record) -> Record:
    report: Any = SimpleNamespace(when="call", attnreg=record.to_json(), nodeid=record.id, longrepr=None)
    search.pytest_runtest_logreport(report)
    return Record.from_json(report.attnreg)


@pytest.mark.parametrize(
    ("culprits", "said"),
    [
        ({"lse"}, "touched memory behind lse (with its fence alone it crashes, without any it does not)"),
        (
            {"lse", "front"},
            "touched memory before or far behind lse (with its fence alone it crashes, without any it does not)",
        ),
        ({""}, "it crashes without any fence as well"),
        ({"none"}, "no single fence makes it crash, and without any it does not"),
        ({"hanging"}, "no single fence makes it crash, and without any it does not"),
    ],
)
def test_a_crash_without_an_address_is_searched_and_told(
    monkeypatch: pytest.MonkeyPatch, culprits: set[str], said: str
) -> None:
    def run(session: object, line: str, *, environment: object) -> Alone:
        *command, option = shlex.split(line.removesuffix(" --fence-front"))
        assert command == shlex.split(CRASH.reproduce)
        only = option.removeprefix("--fence-only=")
        if line.endswith("--fence-front") and "front" not in culprits:
            return LEFT
        if "hanging" in culprits:
            return replace(LEFT, record=None, death=Death(1, "Timeout (0:00:05)!\n"))
        return replace(LEFT, record=None, death=Death(-11, "")) if culprits & set(only.split(",")) else LEFT

    monkeypatch.setattr(fence_search, "run_alone", run)
    session: Any = None
    search = FenceSearch(session)
    found = searched(search, CRASH)
    assert found.reason == f"{CRASH.reason}; {said}"
    assert found.explanation is not None
    assert found.explanation["rows"]["fence"] == [said]
    for _ in range(MAX_SEARCHES):
        found = searched(search, CRASH)
    assert found.reason == f"{CRASH.reason}; which fence it was is not known: 3 crashes of this kernel were looked into"


@pytest.mark.parametrize(
    "record",
    [
        replace(CRASH, outcome=Outcome.FAIL),
        replace(CRASH, explanation={"fault": {"address": 1}}),
        replace(CRASH, explanation={"rows": {"alone": ["ends in PASS"]}}),
    ],
    ids=["no crash", "address known", "collateral"],
)
def test_what_needs_no_search_gets_none(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence_search, "run_alone", lambda *args, **kwargs: pytest.fail("searched"))
    session: Any = None
    assert searched(FenceSearch(session), record) == record


def test_a_case_that_cannot_be_run_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Alone(None, Death(4, ""), started=False)
    monkeypatch.setattr(fence_search, "run_alone", lambda *args, **kwargs: refused)
    session: Any = None
    assert (
        "alone it could not be run (the process ended itself with status 4"
        in searched(FenceSearch(session), CRASH).reason
    )
