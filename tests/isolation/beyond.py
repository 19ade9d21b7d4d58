"""One launch of a toy kernel that touches memory beyond a buffer, in a process that may die of it.

    python -m tests.isolation.beyond DEVICE KERNEL FENCES      one line of JSON: outcome and reason

FENCES: 1 or 0. As a command it runs on a GPU what the tests, whose process interprets Triton, cannot.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch

from harness.case import Case, Rows
from harness.isolation.fault_address import note_fault_address
from harness.kernel.fences import NO_FENCES, Fences
from harness.kernel.registry import find_kernels
from harness.run.outcome import Verdict
from harness.run.run_case import Options, run_case

KERNELS = find_kernels([Path(__file__).parents[1] / "plugin" / "kernels"])
ROWS = Rows("mix", (3, 1, 2), (5, 20, 9))


def attempt(kernel: str, device: str, *, fences: bool = True, buffer_map: Path | None = None) -> Verdict:
    case = Case("m", f"toy_{kernel}", ROWS, dtype="fp32", num_q_heads=4, gqa_ratio=2, head_size=8)
    options = Options(device=device, fences=Fences(True) if fences else NO_FENCES, buffer_map=buffer_map)
    return run_case(case, KERNELS[case.kernel], options)


def attempt_in_child(kernel: str, folder: Path, *, fences: bool = True) -> int:
    """Exit status of a child on the CPU, -n for signal n; `folder` gets the address (fault) and buffers.json."""
    child = os.fork()
    if not child:
        status = 9
        try:
            torch.set_num_threads(1)  # a pool of threads does not outlive a fork
            faulthandler.disable()
            undo = note_fault_address(folder / "fault")
            status = int(attempt(kernel, "cpu", fences=fences, buffer_map=folder / "buffers.json").outcome.is_failure)
            undo()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(device: str, kernel: str, fences: str) -> None:
    verdict = attempt(kernel, device, fences=fences == "1")
    print(json.dumps([verdict.outcome.value, verdict.reason]), flush=True)
    os._exit(0)  # a dead device context has nothing to put in order


if __name__ == "__main__":
    main(*sys.argv[1:])
