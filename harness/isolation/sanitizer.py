"""One case under compute-sanitizer, and what it found as part of the verdict.

Invariant: a case is said to be clean only if the tool summed up and saw a kernel; a finding counts against the case if
it is in a device kernel of the case, and is shown as somebody else's if not.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import UsageError
from harness.isolation.alone import Alone, run_alone
from harness.isolation.autopsy import how
from harness.kernel.buffer_map import Span, describe_address
from harness.run.outcome import Outcome, Verdict
from harness.session import Session
from harness.store.record import Record
from harness.triage.explain import with_row

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EXECUTABLE = "compute-sanitizer"
SLOWER = 20.0  # times the limit on a case's time: instrumented kernels take that much longer
MAX_FINDINGS = 5  # told one by one
_NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else all tensors lie in one allocation, and nothing is out of it

_PREFIX = re.compile(r"^========= ?(.*)$", re.MULTILINE)
_KINDS = ("Invalid ", "Uninitialized ", "Barrier error", "Error: Race", "Error: Potential")  # warnings count nothing
_KERNEL = r"(?:void )?(?P<kernel>[^\s(<+:]+)"
_WHERE = re.compile(rf"\bat {_KERNEL}.*?\+0x[0-9a-f]+(?: in (?P<file>\S+):(?P<line>\d+))?")
_OLD_WHERE = re.compile(rf"\bat 0x[0-9a-f]+ in (?P<file>\S+?):(?P<line>\d+):{_KERNEL}")
_ADDRESS = re.compile(r"\b(?:Address|Access to) (0x[0-9a-f]+)")
_ALLOCATION = re.compile(r"and is (.* the nearest allocation) at 0x[0-9a-f]+ (of size [\d,]+ bytes)")
_SUMMARY = re.compile(r"^========= (?:ERROR|RACECHECK|INITCHECK) SUMMARY: ", re.MULTILINE)


@dataclass(frozen=True)
class SanitizerFinding:
    """One report of the tool. kernel, where: "" where it names none."""

    kind: str  # its first line
    kernel: str = ""
    where: str = ""  # file:line
    address: int | None = None
    allocation: str = ""  # the tool's own words on the nearest one


def find_tool() -> str:
    """Path of the executable. Raises UsageError with what to install."""
    found = shutil.which(EXECUTABLE)
    if found is None:
        raise UsageError(
            f"--sanitize: there is no {EXECUTABLE} on PATH; it is part of the CUDA toolkit "
            "(conda install -c nvidia cuda-sanitizer-api, or the toolkit's bin folder on PATH)"
        )
    return found


def sanitized(session: Session, reproduce: str, launches: Sequence[str], tool: str) -> Verdict:
    """The verdict on the case that `reproduce` runs, under `tool`.

    launches: names of its device kernels, empty where they are not known. Raises UsageError where there is no tool.
    """
    with tempfile.TemporaryDirectory(prefix="attnreg-") as folder:
        log = Path(folder) / "log.txt"
        under = [find_tool(), "--tool", tool, "--log-file", str(log), "--target-processes", "application-only"]
        alone = run_alone(
            session,
            reproduce,
            environment=_NO_CACHE,
            under=under,
            limit=session.case_timeout * SLOWER,
        )
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return fold(alone, said, launches, tool)


def fold(alone: Alone, said: str, launches: Sequence[str], tool: str) -> Verdict:
    """The verdict of the run, with what the tool said in its log."""
    verdict = _verdict_of(alone.record) if alone.record else Verdict(Outcome.CRASH, f"the process {how(alone.death)}")
    findings = read_findings(said)
    ours = [f for f in findings if not launches or not f.kernel or f.kernel in launches]
    others = [f for f in findings if f not in ours]
    if not findings and (why := _nothing_seen(said)):
        last = alone.output.strip().splitlines()[-1:] if alone.record is None else []
        return Verdict(Outcome.ERROR, "; ".join([f"{tool} checked nothing: {why}", *last]))
    for label, found in ((tool, ours), ("elsewhere", others)):
        if found:
            verdict = replace(verdict, explanation=with_row(verdict.explanation, label, *_told(found, alone.buffers)))
    if not ours:
        said_nothing = with_row(verdict.explanation, tool, "found nothing")
        return verdict if verdict.outcome is Outcome.PASS else replace(verdict, explanation=said_nothing)
    reason = f"{tool}: {_told(ours, alone.buffers)[0]}"
    explanation = {**(verdict.explanation or {}), "summary": reason, "shape": f"{tool}: {ours[0].kind}"}
    outcome = Outcome.FAIL if verdict.outcome is Outcome.PASS else verdict.outcome
    return replace(verdict, outcome=outcome, reason=reason, explanation=explanation)


def read_findings(said: str) -> list[SanitizerFinding]:
    """Every report in the log of the tool, in order."""
    blocks: list[list[str]] = []
    inside = False  # a report, to which the indented lines that follow belong
    for text in _PREFIX.findall(said):
        if text.startswith(_KINDS):
            blocks.append([text.strip()])
            inside = True
        elif inside and text.startswith((" ", "and ", "at ", "by ")):
            blocks[-1].append(text.strip())
        elif text.strip():
            inside = False
    return [_finding(block) for block in blocks]


def _finding(block: Sequence[str]) -> SanitizerFinding:
    text = "\n".join(block)
    where = _OLD_WHERE.search(text) or _WHERE.search(text)
    address, allocation = _ADDRESS.search(text), _ALLOCATION.search(text)
    file = Path(where["file"]).name if where and where["file"] else ""
    return SanitizerFinding(
        kind=re.split(r" at | reported between", block[0])[0].removeprefix("Error: ").rstrip("."),
        kernel=where["kernel"] if where else "",
        where=f"{file}:{where['line']}" if where and file else "",
        address=int(address[1], 16) if address else None,
        allocation=f"{allocation[1]} {allocation[2]}" if allocation else "",
    )


def _told(findings: Sequence[SanitizerFinding], buffers: Sequence[Span]) -> list[str]:
    """A line per kind and place: how often, and where the first address lies."""
    counts = Counter((f.kind, f.kernel, f.where) for f in findings)
    lines = []
    for (kind, kernel, where), amount in counts.most_common(MAX_FINDINGS):
        first = next(f for f in findings if (f.kind, f.kernel, f.where) == (kind, kernel, where))
        line = kind + (f" in {kernel}" if kernel else "") + (f" at {where}" if where else "")
        if first.address is not None:
            lies = describe_address(first.address, buffers) or first.allocation
            line += f", address {first.address:#x}" + (f": {lies}" if lies else "")
        lines.append(line + (f" (and {amount - 1:,} more like it)" if amount > 1 else ""))
    left = len(counts) - MAX_FINDINGS
    return lines + ([f"and {left} more kinds and places"] if left > 0 else [])


def _nothing_seen(said: str) -> str:
    """Why a log without findings does not say that there are none; "" where it does."""
    if "before first instrumented API call" in said:
        return "it saw no device kernel"
    return "" if _SUMMARY.search(said) else "it did not sum up"


def _verdict_of(record: Record) -> Verdict:
    shared = ("outcome", "reason", "ran", "err_over_tol", "lse_err_over_tol", "z", "seconds", "seeds", "law")
    return Verdict(**{name: getattr(record, name) for name in shared}, explanation=record.explanation)
