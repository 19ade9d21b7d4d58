"""Cases that end their process, among cases that do not: each is told as what it is, and costs no other case.

    python benchmarks/crashes.py [--quick] [--json FILE] [--runs N] [--workers N] [--device cpu|cuda] [--dist MODE]

A matrix of 60 cases, 6 of which end in six ways: on a CPU SIGSEGV, abort, os._exit, an endless loop, memory that is not
to be had, and sys.exit; with --device cuda (compiled Triton kernels) an illegal access, a device assert and an endless
loop, two cases each. Every run is a pytest session of its own. Prints, per run, seconds and what was not as it had to
be; exit status 1 if anything was not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PROJECT, finish, parser

from harness.run.outcome import Outcome
from harness.store.record import Record
from harness.store.run_log import read_run

KERNELS = PROJECT / "tests" / "plugin" / "kernels"
CPU: dict[str, tuple[Outcome, str]] = {  # kernel: outcome, and a word of the reason
    "toy_segfaulting": (Outcome.CRASH, "SIGSEGV"),
    "toy_aborting": (Outcome.CRASH, "SIGABRT"),
    "toy_exiting": (Outcome.CRASH, "status 3"),
    "toy_spinning": (Outcome.TIMEOUT, "in spinning"),
    "toy_gorging": (Outcome.OUT_OF_MEMORY, "memory"),
    "toy_quitting": (Outcome.FAIL, "SystemExit"),
}
CUDA: dict[str, tuple[Outcome, str]] = {
    "toy_illegal": (Outcome.CRASH, "illegal memory access"),
    "toy_asserting": (Outcome.CRASH, "assert"),
    "toy_endless": (Outcome.TIMEOUT, "waiting for the device"),
}
MATRIX = """
matrix: crashes
about: Cases that end their process, among cases that do not.
kernels: [toy_honest, {kernels}]
fixed: {{dtype: fp32, num_q_heads: 4, gqa_ratio: 2, head_size: 16}}
axes:
  rows: [{{name: mix, query_lens: [3, 1], context_lens: [5, 20]}}]
  data_seed: [{seeds}]
constraints:
  - {{require: "kernel == 'toy_honest' or data_seed % {every} == {at}", because: "few of them crash"}}
tiers:
  smoke: full
"""


def write_matrix(path: Path, crashing: dict[str, tuple[Outcome, str]], cases: int) -> None:
    """`cases` cases, six of which crash, spread over the file."""
    each = 6 // len(crashing)
    honest = cases - 6
    text = MATRIX.format(
        kernels=", ".join(crashing),
        seeds=", ".join(str(i) for i in range(honest)),
        every=honest // each,
        at=honest // each // 2,
    )
    path.write_text(text, encoding="utf-8")


def wrong(records: list[Record], crashing: dict[str, tuple[Outcome, str]], cases: int) -> list[str]:
    """What is not as it has to be."""
    found = []
    ids = [record.id for record in records]
    if len(set(ids)) != cases or len(ids) != cases:
        found.append(f"{len(ids)} records of {len(set(ids))} cases, for {cases} cases")
    if sum(record.kernel in crashing for record in records) != 6:
        found.append("not six cases that crash")
    for record in records:
        outcome, word = crashing.get(record.kernel, (Outcome.PASS, ""))
        if record.outcome is not outcome or word not in record.reason or "it ends in" in record.reason:
            found.append(f"{record.id}: {record.outcome.value} {record.reason}")
        if record.id not in record.reproduce:
            found.append(f"{record.id}: no reproduce line")
    return found


def run_once(folder: Path, options: list[str], device: str, limit: float) -> tuple[float, str, list[Record]]:
    command = [sys.executable, "-m", "pytest", "-p", "harness.plugin", "-p", "no:cacheprovider", "-q", "crashes.yaml"]
    command += [f"--rootdir={folder}", f"--device={device}", f"--kernels={KERNELS}", f"--case-timeout={limit}"]
    command += [f"--reports={folder / 'reports'}", *options]
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(PROJECT))))
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    latest = folder / "reports" / "latest.jsonl"
    return seconds, done.stdout + done.stderr, read_run(latest)[1] if latest.exists() else []


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--runs", type=int, default=100)
    options.add_argument("--workers", type=int, default=0, help="for -n; 0: as without it")
    options.add_argument("--dist", choices=("load", "worksteal"), default="load")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--case-timeout", type=float, help="seconds (default: 5 on cpu, 40 on cuda)")
    chosen = options.parse_args()
    crashing = CUDA if chosen.device == "cuda" else CPU
    cases, runs = (15, 1) if chosen.quick else (60, chosen.runs)
    limit = chosen.case_timeout or (40.0 if chosen.device == "cuda" else 5.0)
    extra = [f"-n{chosen.workers}", f"--dist={chosen.dist}"] if chosen.workers else []
    bad, seconds = 0, []
    for i in range(runs):
        with tempfile.TemporaryDirectory(prefix="attnreg-crashes-") as name:
            folder = Path(name)
            write_matrix(folder / "crashes.yaml", crashing, cases)
            took, output, records = run_once(folder, extra, chosen.device, limit)
        seconds.append(took)
        found = wrong(records, crashing, cases)
        bad += bool(found)
        print(f"run {i + 1:3d}: {took:5.1f} s  {'as it has to be' if not found else '; '.join(found)}", flush=True)
        if found:
            print(output[-4000:])
    print(f"{runs - bad} of {runs} runs of {cases} cases: 6 told as what they are, {cases - 6} passed")
    figures: dict[str, Any] = {"runs": runs, "bad": bad, "cases": cases, "seconds": seconds, "options": extra}
    finish({"crashes": figures}, chosen.json)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
