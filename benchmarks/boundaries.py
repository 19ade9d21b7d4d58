"""Boundary probes and large pools: seconds and peak memory of every case; set-up of pools of 10 and 64 GB of addresses.

    python benchmarks/boundaries.py [--device cuda]

Memory is what the system accounts for: on a CPU the proportional set size of the process (aliases of one page count
once), on a GPU what the driver says is in use; both sampled while a case runs, less what was there before the first
one. Exits 1 where a probe is not green, or takes more than its limit.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import PROJECT, finish, parser

from harness.cache.pool import Extent, make_pool
from harness.case import Case
from harness.kernel.registry import find_kernels
from harness.matrix.axes import case_id
from harness.matrix.loading import load
from harness.run.outcome import Outcome
from harness.run.run_case import Options, resolve_device, run_case

MATRICES = {"boundaries": ("smoke", "probe"), "page_transitions": ("smoke", "ci")}  # tier if quick, else
MAX_SECONDS = {"boundaries": 2.0, "page_transitions": 15.0}  # the latter: 128 queries, 2,048 keys, 8 heads, interpreted
MAX_MEMORY = {
    "boundaries": {"cpu": 256 << 20, "cuda": 512 << 20},
    "page_transitions": {"cpu": 1 << 30, "cuda": 2 << 30},
}
GB = 1 << 30
Gauge = Callable[[], int]  # bytes in use now


def gauge_of(device: torch.device) -> Gauge:
    if device.type == "cuda":
        return lambda: torch.cuda.mem_get_info(device)[1] - torch.cuda.mem_get_info(device)[0]
    return lambda: next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    )


@dataclass
class Peak:
    """The largest reading of a gauge while a block ran."""

    gauge: Gauge
    highest: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.highest = max(self.highest, self.gauge())
            self._done.wait(0.005)


@dataclass(frozen=True)
class Measured:
    id: str
    kernel: str
    matrix: str
    target: str
    outcome: str
    seconds: float
    peak_bytes: int  # beyond the process or context itself
    address_bytes: int
    pool: str


def probes(quick: bool) -> list[Case]:
    kernels, found = find_kernels(), []
    for name, tiers in MATRICES.items():
        matrix = load(PROJECT / "cases" / f"{name}.yaml", kernel_names=kernels)
        tier = tiers[0] if quick else tiers[1]
        found += matrix.expand(tier, supported=lambda case: kernels[case.kernel].unsupported(case)).cases
    return found


def measure(cases: list[Case], device: torch.device) -> list[Measured]:
    kernels, gauge, options = find_kernels(), gauge_of(device), Options(device=device.type)
    seen: set[str] = set()
    for case in cases:  # imports and compilations are the process's, not a probe's
        if case.kernel not in seen:
            seen.add(case.kernel)
            run_case(case, kernels[case.kernel], options)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    gc.collect()
    before, found = gauge(), []
    print(f"the process itself: {before / 2**20:.0f} MiB")
    for case in cases:
        peak, start = Peak(gauge), time.perf_counter()
        with peak.watched():
            verdict = run_case(case, kernels[case.kernel], options)
        seconds, memory = time.perf_counter() - start, verdict.memory or {}
        found.append(
            Measured(
                id=case_id(case),
                kernel=case.kernel,
                matrix=case.matrix,
                target="pages" if case.boundary is None else case.boundary_target,
                outcome=verdict.outcome.value,
                seconds=seconds,
                peak_bytes=peak.highest - before,
                address_bytes=memory.get("address_bytes", 0),
                pool=memory.get("pool", ""),
            )
        )
    return found


def set_up(device: torch.device, quick: bool) -> dict[str, dict[str, float]]:
    """Seconds and physical bytes of a pool with two pages of its own, by the size of its range."""
    found = {}
    for size in (10,) if quick else (10, 64):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            pool = make_pool(Extent(4 * GB, (size - 4) * GB, 0), [(0, 4096), (5 * GB, 5 * GB + 4096)], device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            physical = pool.physical_bytes
            del pool
        found[f"{size} GB"] = {"seconds": sorted(seconds)[2], "physical_bytes": physical}
    return found


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    chosen = options.parse_args()
    device = resolve_device(chosen.device)
    pools = set_up(device, chosen.quick)
    for size, pool in pools.items():
        print(f"pool of {size}: {pool['seconds'] * 1e3:.1f} ms, {pool['physical_bytes'] / 2**20:.1f} MiB")
    rows = measure(probes(chosen.quick), device)
    titles = ("probes", "green", "worst s", "mean s", "peak MiB", "reach GiB")
    print(f"\n{'kernel':<30}{'of':<10}", *(f"{title:>9}" for title in titles))
    for kernel, target in sorted({(row.kernel, row.target) for row in rows}):
        group = [row for row in rows if (row.kernel, row.target) == (kernel, target)]
        seconds, green = [row.seconds for row in group], sum(row.outcome == Outcome.PASS for row in group)
        peak, reach = max(row.peak_bytes for row in group) / 2**20, max(row.address_bytes for row in group) / GB
        figures = (f"{max(seconds):.2f}", f"{sum(seconds) / len(seconds):.2f}", f"{peak:.1f}", f"{reach:.1f}")
        print(f"{kernel:<30}{target:<10}", *(f"{text:>9}" for text in (len(group), green, *figures)))
    wrong = [
        row
        for row in rows
        if row.outcome != Outcome.PASS
        or row.seconds > MAX_SECONDS[row.matrix]
        or row.peak_bytes > MAX_MEMORY[row.matrix][device.type]
    ]
    for row in wrong:
        print(f"WRONG: {row.id}: {row.outcome}, {row.seconds:.2f} s, {row.peak_bytes / 2**20:.1f} MiB")
    finish({"pools": pools, "probes": [vars(row) for row in rows]}, chosen.json)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
