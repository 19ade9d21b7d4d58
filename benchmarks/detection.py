"""Which faults the oracle sees, beside the pass rules of public suites on the very same outputs.

    python benchmarks/detection.py [--quick] [--json FILE] [--seeds N] [--workers N]
    python benchmarks/detection.py --faults-on-kernels [...]     the in-tree kernels, batches of served shapes

A table of fault x rule for 2 and 32 pages of fp8 KV, with P in bfloat16 and in fp8: in how many of N seeds the fault is
caught. T1, L and T2 are the oracle's tiers, any is their union; the peers' rules are in peer_rules.py. vLLM's rule is
replayed on its own data law, with the same fault in it. On a CPU both kernels are emulated; on a GPU the one with
bfloat16 P is unified_paged.
Exit status 1 if a tier alarms without a fault, or if a K descale 1.7 % off on one page is missed once.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from common import finish, parser
from faults_on_kernels import on_kernels
from input_faults import FAULTS, NONE, Target
from peer_rules import RULES, Outputs, low_precision_attention, vllm_prefix
from staging import TIERS, Staged, find_kernel, stage

from harness.case import Case, Rows
from harness.dtypes import element_type
from harness.run.run_case import resolve_device
from references.attention import attend

KEYS, QUERIES, HEADS, GROUP = 2048, 16, 8, 4
PAGES = (2, 32)
KERNELS = {
    "bf16 P": {"cpu": "emulated", "cuda": "unified_paged"},
    "fp8 P": {"cpu": "emulated_fp8_p", "cuda": "emulated_fp8_p"},
}
MUST_SEE = "K descale of one page x1.017"
ANY, VLLM = "any", "vLLM prefix"
COLUMNS = (*TIERS, ANY, VLLM, *RULES)
Hits = dict[str, dict[str, bool]]  # fault -> column -> caught


def case_of(kernel: str, pages: int, seed: int, needs: Mapping[str, Any]) -> Case:
    """One chunk of queries at the end of one sequence: N(0, 1), fp8 KV, descales per page within 2 %."""
    case = Case(
        matrix="detection",
        kernel=kernel,
        rows=Rows("chunk", (QUERIES,), (KEYS - QUERIES,)),
        dtype="bf16",
        kv_dtype="fp8_e4m3",
        descales_per="page",
        descales="quiet",
        num_q_heads=HEADS,
        gqa_ratio=GROUP,
        page_size=KEYS // pages,
        geometry_seed=seed,
        data_seed=seed,
    )
    return replace(case, **needs)


def run_seed(work: tuple[str, str, int, int]) -> Hits:
    """All faults in one seed of one set-up: (device, kernel, pages, seed)."""
    device_name, kernel_name, pages, seed = work
    torch.set_num_threads(1)
    device = resolve_device(device_name)
    kernel = find_kernel(kernel_name)
    at = Target(seq=0, page=seed % pages, kv_head=seed // 2 % (HEADS // GROUP))

    @functools.cache
    def staged(needs: tuple[tuple[str, Any], ...], theirs: bool) -> tuple[Staged, Callable[[], Outputs]]:
        case = case_of(kernel_name, pages, seed, dict(needs))
        ready = stage(
            replace(case, data="tiny", descales_per="tensor", descales="one") if theirs else case, kernel, device
        )
        return ready, _replayed(ready, unquantised=theirs)

    hits = {}
    for fault in (NONE, *FAULTS):
        needs = tuple(sorted(fault.needs.items()))
        ours, outputs = staged(needs, theirs=False)
        tiers = ours.judge(fault.inject(ours, at)).caught()
        peers = {name: rule(outputs()) for name, rule in RULES.items()}
        tiny, outputs = staged(needs, theirs=True)
        fault.inject(tiny, at)
        hits[fault.name] = tiers | {ANY: any(tiers.values()), VLLM: vllm_prefix(outputs())} | peers
    return hits


def _replayed(staged: Staged, unquantised: bool) -> Callable[[], Outputs]:
    """What the peers' rules see of the outputs as they stand; vLLM's reference has the values before quantisation."""
    inputs, p_type = staged.inputs, staged.kernel.contract.numerics.p_type(staged.case.dtype)
    want = staged.reference.out
    if unquantised:
        drawn = replace(inputs, k=staged.problem.k.float(), v=staged.problem.v.float())
        want = attend(drawn, staged.reference.rounding).out
    low = low_precision_attention(inputs, element_type(p_type).torch)
    return lambda: Outputs(staged.setup.outputs[0].tensor, want, low, fp8=staged.case.kv_dtype != "auto")


def tables(device: str, seeds: int, workers: int) -> dict[str, dict[str, Counter[str]]]:
    """set-up -> fault -> column -> seeds caught."""
    setups = {f"{pages} pages, {p}": (device, names[device], pages) for pages in PAGES for p, names in KERNELS.items()}
    work = [(*setup, seed) for setup in setups.values() for seed in range(seeds)]
    if workers == 1:
        results = list(map(run_seed, work))
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = pool.map(run_seed, work, chunksize=1)
    counted: dict[str, dict[str, Counter[str]]] = {}
    for i, name in enumerate(setups):
        counted[name] = {fault.name: Counter() for fault in (NONE, *FAULTS)}
        for hits in results[i * seeds : (i + 1) * seeds]:
            for fault, columns in hits.items():
                counted[name][fault].update(column for column, caught in columns.items() if caught)
    return counted


def show(counted: Mapping[str, Mapping[str, Counter[str]]], seeds: int) -> None:
    width = max(len(fault.name) for fault in FAULTS)
    for name, faults in counted.items():
        print(f"\n{name}: caught, of {seeds}")
        print(" " * width, *(f"{column:>11}" for column in COLUMNS))
        for fault, caught in faults.items():
            print(f"{fault:<{width}}", *(f"{caught[column]:>11}" for column in COLUMNS))


def failures(counted: Mapping[str, Mapping[str, Counter[str]]], seeds: int) -> list[str]:
    """What must not be: false alarms of the oracle, and the descale of one page missed."""
    wrong = []
    for name, faults in counted.items():
        if faults[NONE.name][ANY]:
            wrong.append(f"{name}: {faults[NONE.name][ANY]} false alarms")
        if faults[MUST_SEE][ANY] < seeds:
            wrong.append(f"{name}: {MUST_SEE} is seen in {faults[MUST_SEE][ANY]} of {seeds}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--seeds", type=int, help="seeds per fault (default: 20; 2 with --quick)")
    options.add_argument("--workers", type=int, help="processes (default: 1 with --quick, else 2, or 8 on a GPU)")
    options.add_argument("--faults-on-kernels", action="store_true", help="faults in the in-tree kernels instead")
    chosen = options.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.faults_on_kernels:
        return on_kernels(device, chosen)
    seeds = chosen.seeds or (2 if chosen.quick else 20)
    usual = 1 if chosen.quick else 8 if device == "cuda" else 2
    workers = chosen.workers or min(usual, os.cpu_count() or 1)
    start = time.perf_counter()
    counted = tables(device, seeds, workers)
    seconds = time.perf_counter() - start
    show(counted, seeds)
    wrong = failures(counted, seeds)
    print(f"\n{seconds:.0f} s on {workers} processes", *(f"\nWRONG: {what}" for what in wrong))
    figures: dict[str, Any] = {name: {f: dict(c) for f, c in faults.items()} for name, faults in counted.items()}
    finish({"seeds": seeds, "caught": figures, "wrong": wrong, "seconds": seconds}, chosen.json)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
