"""What tracing and judging accesses costs: the same interpreted cases with and without it, in turns.

    python benchmarks/access_trace.py

Runs a sample of the smoke tier of every kernel written in Triton; the ratio is of whole runs, from the description of a
case to its verdict. Each case runs in both ways in turn and counts with its fastest run of either. Exits 1 where a case
does not pass, is not traced, or the ratio is above 1.15.
"""

from __future__ import annotations

import sys
import time

from common import finish, parser
from same_verdicts import cases_of

from harness.case import Case
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels
from harness.run.run_case import Options, run_case

LIMIT = 1.15
WAYS = (True, False)


def seconds(case: Case, contract: Contract, traced: bool) -> float:
    """Wall time of one run. Ends the command where the run is not as it has to be."""
    start = time.perf_counter()
    verdict = run_case(case, contract, Options(device="cpu", access_trace=traced))
    taken = time.perf_counter() - start
    if verdict.outcome.value != "PASS" or (verdict.access == "traced") is not traced:
        sys.exit(f"{case}: {verdict.outcome.value}, {verdict.access}: {verdict.reason}")
    return taken


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=5, help="runs of each case in each way (default: 5)")
    options.add_argument("--every", type=int, default=8, help="every how many cases one is taken (default: 8)")
    chosen = options.parse_args()
    rounds, every = (2, 40) if chosen.quick else (chosen.rounds, chosen.every)
    kernels = find_kernels()
    figures: dict[str, dict[str, float]] = {}
    for name, contract in kernels.items():
        if "triton" not in contract.needs:
            continue
        cases = cases_of(name, kernels, False)[::every]
        seconds(cases[0], contract, True)  # imports
        total = dict.fromkeys(WAYS, 0.0)
        for case in cases:
            runs = [(way, seconds(case, contract, way)) for _ in range(rounds) for way in WAYS]
            for way in WAYS:
                total[way] += min(taken for used, taken in runs if used is way)
        figures[name] = {"cases": len(cases), "traced": total[True], "untraced": total[False]}
        print(f"{name:<30} {len(cases):>3} cases  {total[False]:6.2f} s  traced {total[True]:6.2f} s", end="")
        print(f"  {total[True] / total[False]:.3f}x")
    ratio = sum(f["traced"] for f in figures.values()) / sum(f["untraced"] for f in figures.values())
    print(f"all: {ratio:.3f}x (at most {LIMIT})")
    finish({"kernels": figures, "ratio": ratio}, chosen.json)
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
