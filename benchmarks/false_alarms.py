"""False alarms of the oracle: honest kernels over dtypes, data laws, features and seeds. Any alarm is a fault of ours.

    python benchmarks/false_alarms.py [--quick] [--json FILE] [--runs N] [--workers N] [--only INDEX]

Prints the worst error over tolerance per kernel, query dtype and cache dtype: tier 1 on N(0,1) data, on all generic
laws and on structured ones, tier L, and |z| of tier 2 (each over its threshold). Exit status 1 if anything exceeds 1.
Run number i is the same case on every machine with a GPU, and on every one without: --only i repeats it and prints its
facts.

Honest are the in-tree kernels, torch's own on contiguous K and V, and emulations of roundings neither has (fp8 P, sums
after the cast, 16-bit partials, fp8 output). On a CPU the in-tree Triton kernels are interpreted and get a tenth of the
runs.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from common import finish, parser
from emulated import EMULATED
from staging import find_kernel, stage
from torch_backends import BACKENDS, accepts

from harness.case import Case, Rows
from harness.errors import KernelRaised
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels
from harness.problem.admission import LAWS, descales_refusal, law_refusal
from harness.run.run_case import resolve_device

DEFAULT_RUNS = {"cpu": 2_000, "cuda": 5_000}
DECODE = (
    Rows("decode", (1, 1, 1), (255, 36, 700)),
    Rows("decode_short", (1, 1, 1, 1), (0, 15, 16, 17)),
    Rows("decode_long", (1,), (2047,)),
)
WHOLE = (Rows("prompts", (64, 33, 1), (0, 0, 0)), Rows("prompt_long", (257,), (0,)))
MIXED = (
    Rows("chunk", (40, 1, 20, 3), (260, 256, 0, 97)),
    Rows("two_chunks", (17, 129), (333, 64)),
    Rows("no_key", (4, 1, 33), (-2, 300, 31)),
)
HEADS = ((4, 1), (4, 2), (8, 4), (6, 3), (8, 8))  # num_q_heads, gqa_ratio
MAX_DRAWS = 10_000  # until a case is admitted: one in a few dozen is
TRITON_SHARE = {"cpu": 0.1, "cuda": 0.5}


def plan(index: int, device: str, contracts: dict[str, Contract]) -> Case:
    """Case number `index`: every axis drawn by its own number, redrawn until kernel and data law admit it."""
    draw = random.Random(index)
    triton = [name for name, contract in contracts.items() if "triton" in contract.needs]
    others = [name for name in contracts if name not in triton]
    contract = contracts[draw.choice(triton if draw.random() < TRITON_SHARE[device] else others)]
    refusal: str | None = None
    for _ in range(MAX_DRAWS):
        case = _drawn(draw, contract, index)
        masked = contract.name in {backend.name for backend, _ in BACKENDS} and not accepts(case)
        refusal = contract.unsupported(case) or law_refusal(case) or ("its rows need a mask" if masked else None)
        refusal = refusal or descales_refusal(case)
        if refusal is None:
            return case
    raise ValueError(f"no case for {contract.name} in {MAX_DRAWS} draws; the last was refused: {refusal}")


def _drawn(draw: random.Random, contract: Contract, index: int) -> Case:
    def seldom(value: Any, feature: str) -> Any:
        return value if feature in contract.features and draw.random() < 0.2 else None

    heads, group = draw.choice(HEADS)
    kv_dtype = "auto" if draw.random() < 0.4 else draw.choice(sorted(contract.kv_dtypes))
    per = "tensor" if kv_dtype == "auto" else draw.choice(sorted(contract.descales_per))
    return Case(
        matrix="false_alarms",
        kernel=contract.name,
        rows=draw.choice((*DECODE, *WHOLE, *MIXED)),
        dtype=draw.choice(sorted(contract.dtypes)),
        kv_dtype=kv_dtype,
        descales_per=per,
        descales="loud" if per == "tensor" else draw.choice(("loud", "quiet")),
        q_dtype="auto" if draw.random() < 0.7 else draw.choice(sorted(contract.q_dtypes)),
        out_dtype="auto" if draw.random() < 0.8 else draw.choice(sorted(contract.out_dtypes)),
        num_q_heads=heads,
        gqa_ratio=group,
        head_size=draw.choice((64, 128)),
        page_size=draw.choice((16, 64)),
        sliding_window=seldom(draw.choice((16, 100)), "sliding_window"),
        causal=draw.random() < 0.8 or "noncausal" not in contract.features,
        logits_soft_cap=seldom(20.0, "logits_soft_cap"),
        alibi=bool(seldom(True, "alibi")),
        sinks=bool(seldom(True, "sinks")),
        num_splits=seldom(4, "split_kv"),
        data="normal" if draw.random() < 0.4 else draw.choice(sorted(LAWS)),
        geometry_seed=index,
        data_seed=index,
    )


def all_contracts() -> dict[str, Contract]:
    """Honest kernels by name: in-tree, torch's own, emulated."""
    return {**find_kernels(), **{contract.name: contract for contract, _ in (*EMULATED, *BACKENDS)}}


def measure(share: tuple[int, int, int, str]) -> list[dict[str, Any]]:
    """Runs `first`, `first + step`, ... below `end` on a device: plain facts and figures of each. A worker's life."""
    first, end, step, name = share
    torch.set_num_threads(1)
    device = resolve_device(name)
    contracts, results = all_contracts(), []
    for index in range(first, end, step):
        case = plan(index, device.type, contracts)
        result: dict[str, Any] = {"index": index, "case": dataclasses.asdict(case)}
        try:
            staged = stage(case, find_kernel(case.kernel), device)
            judged = staged.judge(staged.launch(staged.setup.args))
            result |= dataclasses.asdict(judged) | {"alarm": judged.alarm, "structured": staged.problem.structured}
        except KernelRaised as error:
            result |= {"alarm": True, "raised": str(error)}
        results.append(result)
    return results


def spread(runs: range, device: str, workers: int) -> Iterator[dict[str, Any]]:
    """Results of all `runs`, dealt to processes."""
    shares = [(runs.start + i, runs.stop, workers, device) for i in range(workers)]
    if workers == 1:
        yield from measure(shares[0])
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for results in pool.imap_unordered(measure, shares):
            yield from results


def tally(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Worst figures by "kernel dtype cache": n, t1_normal, t1_all, structured, lse, z."""
    table: dict[str, dict[str, Any]] = defaultdict(lambda: {"runs": 0})
    for result in results:
        case = result["case"]
        row = table[f"{case['kernel']} {case['dtype']} {case['kv_dtype']}"]
        row["runs"] += 1
        if "raised" in result:
            continue
        figures = {"lse": result["lse"], "z": result["gain"]}
        figures["structured" if result["structured"] else "t1_all"] = result["out"]
        if case["data"] == "normal":
            figures["t1_normal"] = result["out"]
        for name, value in figures.items():
            if value is not None:
                row[name] = max(row.get(name, 0.0), value)
    return dict(sorted(table.items()))


COLUMNS = (("t1_normal", "T1 N(0,1)"), ("t1_all", "T1 all"), ("structured", "struct."), ("lse", "L"), ("z", "|z|/7"))


def extremes(results: list[dict[str, Any]], most: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The runs that came nearest to a limit, per tier: what to look at first when a limit is in doubt."""
    found = {}
    for tier in ("out", "lse", "gain"):
        measured = [result for result in results if result.get(tier) is not None]
        measured.sort(key=lambda result: -result[tier])
        found[tier] = measured[:most]
    return found


def show(table: dict[str, dict[str, Any]], alarms: list[dict[str, Any]]) -> None:
    width = max(len(name) for name in table)
    print(" " * width, f"{'runs':>5}", *(f"{title:>9}" for _, title in COLUMNS))
    for name, row in table.items():
        cells = (f"{row[key]:9.3f}" if key in row else f"{'-':>9}" for key, _ in COLUMNS)
        print(f"{name:<{width}} {row['runs']:>5}", *cells)
    for result in alarms:
        facts = {k: v for k, v in result.items() if k not in ("case", "alarm", "structured")}
        print(f"ALARM {facts}\n      {result['case']}\n      again: --only {result['index']}")


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__ or "")
    options.add_argument("--runs", type=int, help="runs (default: 2000 on a CPU, 5000 on a GPU; 60 with --quick)")
    options.add_argument("--workers", type=int, help="processes (default: 1 with --quick, else 2, or 8 on a GPU)")
    options.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    options.add_argument("--only", type=int, metavar="INDEX", help="repeat one run and print all there is to know")
    chosen = options.parse_args(arguments)
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    count = chosen.runs or (60 if chosen.quick else DEFAULT_RUNS[device])
    runs = range(count) if chosen.only is None else range(chosen.only, chosen.only + 1)
    usual = 8 if device == "cuda" else 2
    alone = chosen.quick or chosen.only is not None
    workers = chosen.workers or (1 if alone else min(usual, os.cpu_count() or 1))
    start = time.perf_counter()
    results = sorted(spread(runs, device, workers), key=lambda result: result["index"])
    seconds = time.perf_counter() - start
    alarms = [result for result in results if result["alarm"]]
    table = tally(results)
    show(table, alarms if chosen.only is None else results)
    print(f"{len(results)} runs, {len(alarms)} alarms, {seconds:.0f} s on {workers} processes")
    figures = {"runs": len(results), "alarms": alarms, "profiles": table, "extremes": extremes(results)}
    finish(figures | {"seconds": seconds}, chosen.json)
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
