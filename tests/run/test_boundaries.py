"""Boundary probes: honest kernels are green in little memory; each wrong address is caught, and the report names it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from harness.cache import pool, pool_cpu
from harness.case import Rows
from harness.kernel.launch import LaunchResult, launch
from harness.run import twice
from harness.run.outcome import Outcome
from harness.run.plant import PLANTS
from harness.run.run_case import Options, run_case
from harness.session import PROJECT
from tests.run.boundary_faults import ALL, KERNELS, Told, mutated, probe, tell

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@functools.cache
def told_by_a_gpu() -> dict[str, Told]:
    """In another process: this one interprets Triton."""
    command = [sys.executable, "-m", "tests.run.boundary_faults", "cuda"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return {name: Told(*told) for name, told in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_a_wrong_address_is_caught_and_named_and_nothing_is_without_it(name: str, device: str, tmp_path: Path) -> None:
    told = tell(name, device, tmp_path) if device == "cpu" else told_by_a_gpu()[name]
    assert told.honest == "PASS"
    assert told.pool == "aliased"
    assert told.physical_bytes < 256 << 20
    assert told.outcome == "FAIL"
    place = 0
    for words in ALL[name].says:
        assert words in told.lines[place:], told
        place = told.lines.index(words, place) + len(words)
    assert told.lines.split(" | ")[0] in told.reason


def test_a_straddled_page_that_no_query_looks_into_is_blind() -> None:
    case = replace(
        probe("prefix_prefill", "elements31", boundary_target="k", boundary_position="straddling"),
        rows=Rows("short", (3, 1), (12, 14)),
    )
    verdict = run_case(case, KERNELS["prefix_prefill"], Options(device="cpu"))
    assert verdict.outcome is Outcome.BLIND
    assert verdict.reason == (
        "cannot see a wrong address of K: the output is the same where a signed 32-bit offset in elements wraps"
    )


def test_a_workspace_that_a_kernel_leaves_alone_is_blind() -> None:
    case = probe("unified_paged", "elements31", boundary_target="workspace", num_splits=2)  # one tile: one part
    verdict = run_case(case, KERNELS["unified_paged"], Options(device="cpu"))
    assert verdict.outcome is Outcome.BLIND
    assert verdict.reason == (
        "cannot see a wrong address of a workspace: nothing was stored where a signed 32-bit offset in elements wraps"
    )
    verdict = run_case(replace(case, num_splits=None), KERNELS["unified_paged"], Options(device="cpu"))
    assert verdict.outcome is Outcome.BLIND


@pytest.mark.parametrize(("boundary", "target"), [("page24", "kv"), ("elements32", "out"), ("elements31", "table")])
def test_accesses_are_judged_but_where_the_range_is_too_large_and_that_is_said(boundary: str, target: str) -> None:
    page = {"page_size": 16, "head_size": 16} if boundary == "page24" else {}
    case = probe("unified_paged", boundary, boundary_target=target, boundary_position="far", **page)
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu"))
    assert verdict.outcome is Outcome.PASS
    untraced = "not traced: rows of the page table lie too far apart to judge it entry by entry"
    assert verdict.access == (untraced if target == "table" else "traced")


@pytest.mark.parametrize(
    ("target", "apart"), [("kv", {"k_cache", "v_cache"}), ("out", set()), ("table", {"block_table"})]
)
def test_a_second_launch_knows_which_addresses_are_no_memory(
    target: str, apart: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[set[str]] = []

    def spied(*args: Any, pools: Mapping[str, pool.Pool] = MappingProxyType({}), **kwargs: Any) -> LaunchResult:
        known.append(set(pools))
        return launch(*args, pools=pools, **kwargs)

    monkeypatch.setattr(twice, "launch", spied)
    case = probe("unified_paged", "bytes32", boundary_target=target)
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu", twice=True))
    assert (verdict.outcome, verdict.reason) == (Outcome.PASS, "")
    assert known == [apart]


@pytest.mark.parametrize("rows", [Rows("one", (1,), (63,)), Rows("two", (3, 1), (20, 14))], ids=lambda rows: rows.name)
def test_the_twin_of_a_probe_may_have_a_list_too_short_for_one(rows: Rows) -> None:
    case = probe("unified_paged", "carry", boundary_target="table", boundary_position="straddling", data="normal")
    case = replace(case, page_table="kv_indices", rows=rows)
    options = Options(device="cpu", noise_floor="report", twins=("page_table", "table_padding"))
    verdict = run_case(case, KERNELS[case.kernel], options)
    assert verdict.outcome is Outcome.PASS, verdict.reason


@pytest.mark.parametrize("plant", ["zero-pool", "decode-token-missing", "index-int64"])
def test_faults_of_the_set_up_are_no_faults_of_the_kernel(plant: str) -> None:
    case = probe("unified_paged", "elements31", boundary_target="k")
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu", plant=PLANTS[plant]))
    assert verdict.outcome is Outcome.TEST_BUG


def test_addresses_that_cannot_be_had_are_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = probe("unified_paged", "elements32", boundary_target="k", boundary_position="far")
    monkeypatch.setattr(pool_cpu, "cpu_can_alias", lambda: False)
    monkeypatch.setattr(pool, "available", lambda device: 1 << 30)
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu"))
    assert verdict.outcome is Outcome.OUT_OF_MEMORY
    assert "bytes on cpu, and 1,073,741,824 are free" in verdict.reason


def test_a_probe_can_ask_for_all_of_its_addresses_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "available", lambda device: 1 << 30)
    case = replace(probe("unified_paged", "elements31", boundary_target="k"), pool="dense")
    verdict = run_case(case, KERNELS[case.kernel], Options(device="cpu"))
    assert verdict.outcome is Outcome.OUT_OF_MEMORY
    assert "host memory: a dense pool needs " in verdict.reason


TORCH_LAUNCH = "    starts, seq_lens = args"
TORCH_CASE = probe("torch_sdpa_paged", "carry", boundary_target="kv")


def test_a_kernel_that_asks_for_too_much_memory_is_out_of_memory(tmp_path: Path) -> None:
    greedy = mutated(KERNELS["torch_sdpa_paged"], TORCH_LAUNCH, "    torch.empty(1 << 52)\n" + TORCH_LAUNCH, tmp_path)
    assert run_case(TORCH_CASE, greedy, Options(device="cpu")).outcome is Outcome.OUT_OF_MEMORY


@pytest.mark.parametrize("page", [14, 1], ids=["in use", "shared by all unused addresses"])
def test_a_kernel_that_writes_into_an_aliased_cache_fails(page: int, tmp_path: Path) -> None:
    writing = f"    args.k_cache[{page}, 15].zero_()\n" + TORCH_LAUNCH
    verdict = run_case(
        TORCH_CASE, mutated(KERNELS["torch_sdpa_paged"], TORCH_LAUNCH, writing, tmp_path), Options(device="cpu")
    )
    assert verdict.outcome is Outcome.FAIL
    assert "k_cache was written by the kernel" in verdict.reason


def test_every_record_says_what_memory_the_cache_took() -> None:
    case = replace(probe("unified_paged", "carry"), boundary=None, boundary_position="straddling", data="normal")
    dense = run_case(case, KERNELS[case.kernel], Options(device="cpu")).memory
    assert dense is not None
    assert dense["pool"] == "dense"
    assert dense["physical_bytes"] == dense["address_bytes"] > 0
