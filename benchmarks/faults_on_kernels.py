"""Faults injected into the in-tree kernels through their inputs, on batches as they are served (for detection.py).

Invariant: every percentage stands beside the one measured for the same fault on production kernels of the same contract
(H200, N(0, 1)), which the oracle was designed to reach. Those kernels differ in tiles, splits and where descales enter,
so the targets are what to expect, not a limit; only a false alarm is an error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import finish
from input_faults import (
    NONE,
    Change,
    InputFault,
    Target,
    gqa_modulo,
    heads_reversed,
    length,
    newest,
    page_descale,
    softmax_scale,
    stale_slot,
    tensor_descale,
    through,
    window,
    wrong_page,
)
from staging import TIERS, Staged, find_kernel, stage

from harness.case import Case, Rows
from harness.oracle.gains import K_DESCALE, V_DESCALE
from harness.run.run_case import resolve_device

LAWS = ("normal", "probe")
NAMED = "named"
SHORT, LONG = "short", "long"  # which sequence is faulted: the second but last one, or the last one


@dataclass(frozen=True)
class Group:
    """One kernel, its batches and its profiles. `lens`: (query_len, seq_len) per sequence, one batch per entry."""

    kernel: str
    lens: tuple[tuple[tuple[int, int], ...], ...]
    profiles: tuple[Mapping[str, Any], ...]
    seeds: int = 4  # runs per fault and law = seeds * batches * profiles
    page_size: int = 16


@dataclass(frozen=True)
class Planned:
    """A fault, the sequence it goes to, and the percentages to expect by group and tier."""

    fault: InputFault
    targets: Mapping[str, Mapping[str, int]]  # group it is run in -> tier -> percent
    where: str = LONG
    page_kind: str | None = None  # what tier 2 should call it, with the right page and KV head


_MIXED = ((64, 1000), (129, 463), (1, 700))
_DECODE = ((1, 300), (1, 1500), (1, 700))
_FP8 = {"kv_dtype": "fp8_e4m3"}
_QUIET = {**_FP8, "descales_per": "page", "descales": "quiet"}
GROUPS: dict[str, Group] = {
    "mixed": Group(
        "chunked_prefill_paged_decode",
        ((*_MIXED, (1, 2047)), (*_MIXED, (1, 8190))),
        (
            {"dtype": "bf16"},
            {"dtype": "bf16", **_FP8},
            {"dtype": "fp16", "sliding_window": 64},
            {"dtype": "fp16", **_FP8},
        ),
    ),
    "decode": Group(
        "unified_paged",
        ((*_DECODE, (1, 2047)), (*_DECODE, (1, 8190))),
        (
            {"dtype": "bf16", "num_splits": 16},
            {"dtype": "bf16", **_FP8, "sliding_window": 64, "num_splits": 16},
            {"dtype": "bf16", **_QUIET, "num_splits": 16},
            {"dtype": "fp16", **_FP8, "num_splits": 16},
        ),
    ),
    "p1024": Group(
        "unified_paged",
        (((128, 2048),), ((1, 2048), (1, 2048))),
        (
            {"dtype": "bf16", **_QUIET},
            {"dtype": "bf16", **_QUIET, "num_splits": 4},
        ),
        page_size=1024,
    ),
}


def _expected(**groups: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Percentages of T1, T2 and, for kernels that return one, L."""
    return {group: dict(zip(("T1", "T2", "L"), percents, strict=False)) for group, percents in groups.items()}


def _page(which: str, factor: float, where: str, **groups: tuple[int, ...]) -> Planned:
    name = f"{which.upper()} of one page x{factor:g}, {where} sequence"
    kind = K_DESCALE if which == "k" else V_DESCALE
    return Planned(InputFault(name, through(page_descale(which, factor))), _expected(**groups), where, kind)


def _loud(name: str, change: Change, needs: Mapping[str, Any] | None = None, **groups: tuple[int, ...]) -> Planned:
    """A fault that every tier saw in every run, unless said otherwise."""
    targets = {"mixed": (100, 100), "decode": (100, 100, 100)} | groups
    return Planned(InputFault(name, through(change), needs or {}), _expected(**targets))


_WINDOW = {"sliding_window": 64}
PLAN: tuple[Planned, ...] = (
    Planned(NONE, _expected(mixed=(0, 0), decode=(0, 0, 0), p1024=(0, 0, 0))),
    _loud("newest token: zeros", newest(zeros=True)),
    _loud("newest token: stale", newest(zeros=False)),
    _page("k", 1.005, SHORT, mixed=(87, 100), decode=(50, 56, 100), p1024=(81, 100, 100)),
    _page("k", 1.017, SHORT, mixed=(100, 100), decode=(75, 93, 100), p1024=(100, 100, 100)),
    _page("k", 1.017, LONG, mixed=(62, 81), decode=(53, 87, 93)),
    _page("v", 1.017, SHORT, mixed=(87, 100), decode=(50, 100, 0), p1024=(100, 100, 0)),
    _page("v", 1.017, LONG, mixed=(56, 68), decode=(50, 68, 0)),
    _page("v", 1.05, LONG, mixed=(62, 100), decode=(53, 100, 0)),
    _loud("wrong page", wrong_page),
    _loud("stale slot", stale_slot),
    _loud("window +1", window(1), _WINDOW),
    _loud("window -1", window(-1), _WINDOW),
    _loud("softmax scale x1.02", softmax_scale(1.02)),
    _loud("softmax scale x1.005", softmax_scale(1.005), decode=(65, 75, 100)),
    _loud("K descale x1.005", tensor_descale("k", 1.005), _FP8, decode=(87, 50, 100)),
    _loud("V descale x1.02", tensor_descale("v", 1.02), _FP8, decode=(100, 100, 0)),
    _loud("KV heads reversed", heads_reversed),
    Planned(InputFault("GQA modulo", gqa_modulo), _expected(decode=(100, 100, 100))),
    _loud("length -1", length(-1)),
    _loud("length +1", length(1)),
)


def batch_of(lens: tuple[tuple[int, int], ...], shrink: int) -> Rows:
    """The batch, its lengths divided by `shrink` (decode rows stay decode rows)."""
    small = [(max(q // shrink, 1) if q > 1 else 1, max(n // shrink, 1)) for q, n in lens]
    return Rows("served", tuple(q for q, _ in small), tuple(n - q for q, n in small))


def cases(group: Group, law: str, quick: bool) -> list[Case]:
    """Every profile on every batch with every seed; with `quick` one batch, one seed, lengths (and pages) over 8."""
    shrink = 8 if quick else 1
    found = []
    for seed in range(1 if quick else group.seeds):
        for lens in group.lens[: 1 if quick else None]:
            plain = Case(
                matrix="faults_on_kernels",
                kernel=group.kernel,
                rows=batch_of(lens, shrink),
                gqa_ratio=4,
                page_size=group.page_size // (shrink if group.page_size > 16 else 1),
                geometry_seed=seed,
                data_seed=seed,
                data=law,
            )
            found += [replace(plain, **profile) for profile in group.profiles]
    return found


def target_of(staged: Staged, where: str) -> Target:
    """A page of the faulted sequence that its last query sees whole or in part, another one for every seed."""
    case = staged.case
    seq = max(case.rows.num_seqs - (2 if where == SHORT else 1), 0)
    seq_len, size = case.rows.seq_lens[seq], case.page_size
    last = (seq_len - 1) // size
    first = 0 if case.sliding_window is None else max(seq_len - case.sliding_window, 0) // size
    spread = 0x9E3779B1 * (case.data_seed + 1)  # golden ratio: successive seeds land far apart
    return Target(seq, first + spread % (last - first + 1), case.data_seed % case.num_kv_heads)


def run_one(work: tuple[str, str, Case]) -> dict[str, dict[str, bool]]:
    """fault -> tier -> caught; for faults of a page also whether tier 2, where it caught it, named the page."""
    device_name, group, case = work
    torch.set_num_threads(1)
    device = resolve_device(device_name)
    staged = stage(case, find_kernel(case.kernel), device)
    result: dict[str, dict[str, bool]] = {}
    for planned in PLAN:
        fault = planned.fault
        if group not in planned.targets or any(getattr(case, name) in (None, "auto") for name in fault.needs):
            continue
        at = target_of(staged, planned.where)
        judged = staged.judge(fault.inject(staged, at))
        caught = judged.caught()
        if planned.page_kind is not None and caught["T2"] and judged.best is not None:
            wanted = (planned.page_kind, staged.setup.cache.pages[at.seq][at.page], at.kv_head)
            caught[NAMED] = (judged.best.kind, judged.best.page, judged.best.kv_head) == wanted
        result[fault.name] = caught
    return result


def measure(device: str, quick: bool, workers: int) -> dict[str, dict[str, dict[str, list[bool]]]]:
    """ "group, law" -> fault -> tier -> caught, per run."""
    work = [(device, name, case) for name, group in GROUPS.items() for law in LAWS for case in cases(group, law, quick)]
    if workers == 1:
        results = list(map(run_one, work))
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = pool.map(run_one, work, chunksize=1)
    table: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for (_, name, case), result in zip(work, results, strict=True):
        faults = table.setdefault(f"{name}, {case.data}", {})
        for fault, caught in result.items():
            for tier, hit in caught.items():
                faults.setdefault(fault, {}).setdefault(tier, []).append(hit)
    return table


def percent(hits: list[bool]) -> int:
    return round(100 * sum(hits) / len(hits))


def show(table: Mapping[str, Mapping[str, Mapping[str, list[bool]]]]) -> None:
    """% caught per tier; beside N(0, 1) data the target in brackets; the page named, in tenths of tier 2's hits."""
    width = max(len(planned.fault.name) for planned in PLAN)
    for name, faults in table.items():
        group, law = name.split(", ")
        print(f"\n{name}: % caught (target)")
        print(" " * width, f"{'runs':>5}", *(f"{tier:>10}" for tier in TIERS), f"{'named':>10}")
        for planned in PLAN:
            fault = planned.fault.name
            if fault not in faults:
                continue
            cells = []
            for tier in TIERS:
                target = planned.targets[group].get(tier)
                aim = f" ({target})" if law == "normal" and target is not None else ""
                cells.append(f"{percent(faults[fault][tier])}{aim}")
            hits = faults[fault].get(NAMED)
            named = f"{percent(hits) / 10:.0f} of 10" if hits else "-"
            runs = len(faults[fault][TIERS[0]])
            print(f"{fault:<{width}} {runs:>5}", *(f"{cell:>10}" for cell in cells), f"{named:>10}")


def on_kernels(device: str, chosen: argparse.Namespace) -> int:
    """The command: measure, print, write; exit status 1 for an alarm without a fault."""
    usual = 1 if chosen.quick else 8 if device == "cuda" else 2
    workers = chosen.workers or min(usual, os.cpu_count() or 1)
    start = time.perf_counter()
    table = measure(device, chosen.quick, workers)
    seconds = time.perf_counter() - start
    show(table)
    alarms = [name for name, faults in table.items() if any(any(hits) for hits in faults[NONE.name].values())]
    print(f"\n{seconds:.0f} s on {workers} processes", *(f"\nWRONG: false alarms in {name}" for name in alarms))
    figures = {
        name: {fault: {tier: percent(hits) for tier, hits in tiers.items()} for fault, tiers in faults.items()}
        for name, faults in table.items()
    }
    finish({"caught_percent": figures, "false_alarms_in": alarms, "seconds": seconds}, chosen.json)
    return 1 if alarms else 0
