"""What a process that died left behind (exit status, last words) as the verdict on the case it was running.

Invariant: pure; every death becomes CRASH, TIMEOUT or OUT_OF_MEMORY, and nothing is claimed that was not left behind.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from harness.run.outcome import Outcome, Verdict

MAX_FRAMES = 12  # of the stack, in the report
_OURS = "run_case.py"  # a thread with such a frame is the one that runs the case
_TIMEOUT = re.compile(r"^Timeout \(", re.MULTILINE)
_THREAD = re.compile(r"^(Current thread|Thread) 0x.*most recent call first", re.MULTILINE)
_FRAME = re.compile(r'^ +File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


@dataclass(frozen=True)
class Frame:
    path: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.line} in {self.function}"


@dataclass(frozen=True)
class Death:
    """How a process ended. `dump` is what Python's faulthandler wrote, "" where it had no time to."""

    status: int | None  # as `subprocess` has it: -n is signal n; None: not to be had
    dump: str
    memory_kills: int = 0  # processes that the system killed for want of memory while this one lived


def autopsy(death: Death, limit: float, kernels: Path | None) -> Verdict:
    """The verdict on the case during which a process died.

    limit: seconds that a case may take. kernels: the folder of its kernel, to tell the kernel's line from others.
    """
    stack = stack_of(death.dump)
    own = [frame for frame in stack if kernels is not None and kernels in Path(frame.path).parents]
    where = f" at {own[0]}" if own else ""
    if _TIMEOUT.search(death.dump):
        outcome, shape = Outcome.TIMEOUT, "timeout"
        reason = f"did not end within {limit:g} s: it was{where or ' ' + _waiting(stack)}"
    elif death.status == -signal.SIGKILL and death.memory_kills:
        outcome, shape = Outcome.OUT_OF_MEMORY, "SIGKILL"
        reason = "the system killed the process for want of memory (SIGKILL)"
    else:
        outcome, shape = Outcome.CRASH, how(death)
        unsure = ", as the system does for want of memory" if death.status == -signal.SIGKILL else ""
        reason = f"the process {shape}{unsure}{where}"
    rows = {"hung" if outcome is Outcome.TIMEOUT else "died": [reason]}
    below = takewhile(lambda frame: Path(frame.path).name != _OURS, stack)  # what the harness had called
    if shown := [str(frame) for frame in islice(below, MAX_FRAMES)]:
        rows["stack"] = shown
    explanation: dict[str, Any] = {
        "rows": rows,
        "summary": reason,
        "shape": f"{shape}{where}",
        "status": death.status,
        "stack": [vars(frame) for frame in stack],
    }
    return Verdict(outcome, reason, explanation=explanation)


def how(death: Death) -> str:
    """The end in words that follow "the process": a signal by name, or the status it ended itself with."""
    if death.status is None:
        fatal = re.search(r"^Fatal Python error: (.*)$", death.dump, re.MULTILINE)
        return f"died: {fatal[1]}" if fatal else "died, how is not to be had"
    if death.status < 0:
        return f"died of {_signal(-death.status)}"
    return f"ended itself with status {death.status}, as os._exit does"


def stack_of(dump: str) -> list[Frame]:
    """The stack that matters in a dump, innermost frame first: of the thread that failed, else of the one that runs
    the case."""
    headers = list(_THREAD.finditer(dump))
    failed, running = [], []
    for i, header in enumerate(headers):
        end = headers[i + 1].start() if i + 1 < len(headers) else len(dump)
        frames = [Frame(path, int(line), name) for path, line, name in _FRAME.findall(dump, header.end(), end)]
        if header[1] == "Current thread":
            failed = frames
        if any(Path(frame.path).name == _OURS for frame in frames):
            running = frames
    return failed or running


def _waiting(stack: Sequence[Frame]) -> str:
    """Where a process hung that was not in the kernel's own code."""
    if any(frame.function == "synchronize" for frame in stack[:4]):
        return "waiting for the device, on which a kernel does not end"
    return f"at {stack[0]}" if stack else "nowhere that is known"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
