"""Seconds per case of the contexted-KV sweep at full size, with a cold and with a warm Triton cache.

    python benchmarks/contexted_kv.py [--quick] [--json FILE] [--workers N]

The sweep is the nightly tier of cases/contexted_kv.yaml and its ALiBi twin, one seed of each: 64 heads, 10 sequences of
up to 2048 tokens. Each pass runs in processes of its own: `cold` with an empty Triton cache, `warm` with the cache that
`cold` left behind, `steady` is the second round over all cases within the warm processes. A case counts from its
description to its verdict: problem, cache and read-back, compilation, launch, float64 reference, tolerance. With
--workers N the cases are dealt to N processes on the same device and the wall time is shared out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

from common import PROJECT, finish, parser

MATRICES = ("contexted_kv", "contexted_kv_alibi")


def run_pass(worker: int, workers: int, quick: bool) -> dict[str, Any]:
    """Two rounds over this worker's share of the cases, in this process."""
    from harness.kernel.registry import find_kernels
    from harness.matrix.axes import case_id
    from harness.matrix.loading import load
    from harness.run.run_case import Options, resolve_device, run_case

    kernels = find_kernels()
    cases = []
    for name in MATRICES:
        matrix = load(PROJECT / "cases" / f"{name}.yaml", kernel_names=kernels)
        tier = "smoke" if quick else "nightly"
        expanded = matrix.expand(tier, supported=lambda case: kernels[case.kernel].unsupported(case)).cases
        cases += [case for case in expanded if (case.geometry_seed, case.data_seed) == (0, 0)]
    cases = cases[worker::workers][: 4 if quick else None]
    device = resolve_device("auto")  # imports torch before the clock starts, as a test session would
    if device.type == "cuda":
        import torch

        torch.zeros(1, device=device)
    rounds = []
    for _ in range(2):
        phases: dict[str, float] = defaultdict(float)
        outcomes: dict[str, int] = defaultdict(int)
        seconds: dict[str, float] = {}
        worst = 0.0
        for case in cases:
            start = time.perf_counter()
            verdict = run_case(case, kernels[case.kernel], Options())
            seconds[case_id(case)] = time.perf_counter() - start
            outcomes[verdict.outcome.value] += 1
            worst = max(worst, verdict.err_over_tol or 0.0)
            for phase, spent in (verdict.seconds or {}).items():
                phases[phase] += spent
        rounds.append({"seconds": seconds, "phases": dict(phases), "outcomes": dict(outcomes), "worst": worst})
    return {"rounds": rounds}


def spawn(workers: int, quick: bool, cache: str) -> list[dict[str, Any]]:
    """One pass in fresh processes with Triton's cache at `cache`: the results per worker."""
    flags = ["--quick"] if quick else []
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--pass", str(i), "--workers", str(workers), *flags],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(workers)
    ]
    results = []
    for process in processes:
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"a worker ended with status {process.returncode}")
        results.append(json.loads(output.splitlines()[-1]))
    return results


def merge(results: list[dict[str, Any]], which: int) -> dict[str, Any]:
    """Figures of round `which` over all workers."""
    seconds = [s for result in results for s in result["rounds"][which]["seconds"].values()]
    total: dict[str, dict[str, float]] = {"phases": defaultdict(float), "outcomes": defaultdict(float)}
    for result in results:
        for kind, sums in total.items():
            for name, value in result["rounds"][which][kind].items():
                sums[name] += value
    slowest = max(sum(result["rounds"][which]["seconds"].values()) for result in results)
    return {
        "cases": len(seconds),
        "seconds_per_case": slowest / len(seconds),
        "median": statistics.median(seconds),
        "worst_err_over_tol": max(result["rounds"][which]["worst"] for result in results),
        "outcomes": dict(total["outcomes"]),
        "phases_per_case": {name: spent / len(seconds) for name, spent in total["phases"].items()},
    }


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--workers", type=int, default=1, help="processes that share the cases (default: 1)")
    options.add_argument(
        "--pass", type=int, dest="worker", help="internal: run one worker's share and print its figures"
    )
    chosen = options.parse_args()
    if chosen.worker is not None:
        print(json.dumps(run_pass(chosen.worker, chosen.workers, chosen.quick)))
        return
    with tempfile.TemporaryDirectory() as cache:
        cold = spawn(chosen.workers, chosen.quick, cache)
        warm = spawn(chosen.workers, chosen.quick, cache)
    figures = {"workers": chosen.workers, "cold": merge(cold, 0), "warm": merge(warm, 0), "steady": merge(warm, 1)}
    for name in ("cold", "warm", "steady"):
        row: Any = figures[name]
        seconds = f"{row['seconds_per_case']:.3f} s per case  median {row['median']:.3f} s"
        print(f"{name:<7} {row['cases']} cases  {seconds}  {row['outcomes']}")
        print("        " + "  ".join(f"{phase} {1e3 * s:.1f} ms" for phase, s in row["phases_per_case"].items()))
    finish(figures, chosen.json)


if __name__ == "__main__":
    main()
