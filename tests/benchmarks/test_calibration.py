"""The calibration benchmarks measure what they say: peer rules by hand-made numbers, quick runs by their two ends.

Invariant: an honest run raises no alarm, and a loud fault is caught, in the same code that produces the tables.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

DEVICE = "cpu"  # kernels are interpreted in this process, which a GPU's cannot be
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/<command>.py` has it

import detection  # noqa: E402
import false_alarms  # noqa: E402
import faults_on_kernels  # noqa: E402
import input_faults  # noqa: E402
import page_transitions  # noqa: E402
import peer_rules  # noqa: E402
import staging  # noqa: E402

from harness.case import Case, Rows  # noqa: E402
from harness.kernel.registry import find_kernels  # noqa: E402
from harness.run.run_case import resolve_device  # noqa: E402
from references.attention import AttentionInputs, Rounding, attend  # noqa: E402


def outputs(
    error: float, want: float = 0.5, low_error: float = 0.0, dtype: torch.dtype = torch.float32, fp8: bool = False
) -> peer_rules.Outputs:
    """Four equal elements `want`, the last one wrong by `error`; the yardstick is wrong by `low_error` there."""
    right = torch.full((1, 1, 4), want, dtype=torch.float64)
    off = torch.zeros_like(right)
    off[..., -1] = 1.0
    return peer_rules.Outputs((right + error * off).to(dtype), right, right + low_error * off, fp8)


@pytest.mark.parametrize(
    ("rule", "passes", "fails"),
    [
        (peer_rules.vllm_prefix, outputs(0.9e-4), outputs(1.1e-4)),
        (peer_rules.vllm_prefix, outputs(0.9e-3, fp8=True), outputs(1.1e-3, fp8=True)),
        (peer_rules.close_1e_2, outputs(1.4e-2), outputs(1.6e-2)),  # 1e-2 + 1e-2 * 0.5
        (peer_rules.aiter_max_abs, outputs(0.054), outputs(0.056)),
        (peer_rules.flashinfer_bench, outputs(0.9e-2, want=0.01), outputs(1.1e-2, want=0.01)),
        (peer_rules.flashinfer_bench, outputs(1.5e-2, want=2.0), outputs(2.1e-2, want=2.0)),  # both must exceed 1e-2
        (peer_rules.cudnn_fp8, outputs(0.17), outputs(0.19)),  # 0.08 + 0.2 * 0.5
        # twice the yardstick's error and twice the grain of ref + 0.3 - 0.3 in float16, 2^-12 at 0.5
        (
            peer_rules.flash_attention_2x,
            outputs(0.019, low_error=0.01, dtype=torch.float16),
            outputs(0.021, low_error=0.01, dtype=torch.float16),
        ),
    ],
)  # fmt: skip
def test_a_rule_passes_and_fails_where_its_suite_does(
    rule: Callable[[peer_rules.Outputs], bool], passes: peer_rules.Outputs, fails: peer_rules.Outputs
) -> None:
    assert not rule(passes)
    assert rule(fails)


def test_rmse_counts_in_units_of_the_range_of_values() -> None:
    want = torch.linspace(0, 1, 5, dtype=torch.float64).view(1, 1, 5)
    assert not peer_rules.te_rmse(peer_rules.Outputs(want + 0.12, want, want, fp8=True))  # 0.12 < 0.11 * 1.12
    assert peer_rules.te_rmse(peer_rules.Outputs(want + 0.13, want, want, fp8=True))


@pytest.mark.parametrize("rule", [*peer_rules.RULES.values(), peer_rules.vllm_prefix])
def test_no_rule_lets_nan_through(rule: Callable[[peer_rules.Outputs], bool]) -> None:
    assert rule(outputs(math.nan))


def test_the_yardstick_of_relative_rules_is_attention() -> None:
    g = torch.Generator().manual_seed(0)
    inputs = AttentionInputs(
        q=torch.randn(5, 4, 32, generator=g),
        k=torch.randn(40, 2, 32, generator=g),
        v=torch.randn(40, 2, 32, generator=g),
        query_lens=(4, 1),
        seq_lens=(30, 10),
        softmax_scale=32**-0.5,
        sliding_window=7,
        logits_soft_cap=3.0,
        alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        sinks=torch.tensor([0.0, 1.0, 2.0, 3.0]),
    )
    want = attend(inputs, Rounding(2.0**-24)).out
    assert (peer_rules.low_precision_attention(inputs, torch.float32) - want).abs().max() < 1e-6
    rough = replace(inputs, q=inputs.q.bfloat16())
    assert 1e-4 < (peer_rules.low_precision_attention(rough, torch.bfloat16) - want).abs().max() < 5e-2


def test_honest_kernels_raise_no_alarm(tmp_path: Path) -> None:
    """As a command of its own: on a machine with a GPU it measures there."""
    report = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "false_alarms.py"), "--quick", "--runs", "25", "--json", str(report)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures = json.loads(report.read_text(encoding="utf-8"))
    assert figures["runs"] == 25
    assert figures["alarms"] == []
    assert "25 runs, 0 alarms" in done.stdout


def test_a_wrong_kernel_is_an_alarm_with_its_facts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = staging.find_kernel

    def find_wrong(name: str) -> staging.Kernel:
        kernel = honest(name)
        return replace(kernel, launcher=lambda args: args.out.zero_() and None)

    monkeypatch.setattr(false_alarms, "find_kernel", find_wrong)
    assert false_alarms.main(["--only", "3", "--device", DEVICE]) == 1
    printed = capsys.readouterr().out
    assert "ALARM" in printed
    assert "--only 3" in printed


SMALL = Case(
    matrix="m",
    kernel="emulated",
    rows=Rows("chunk", (8,), (248,)),
    dtype="bf16",
    kv_dtype="fp8_e4m3",
    num_q_heads=4,
    gqa_ratio=2,
    page_size=64,
    head_size=96,
    sliding_window=100,
    logits_soft_cap=30.0,
    alibi=True,
    sinks=True,
)
AT = input_faults.Target(seq=0, page=3, kv_head=1)


@pytest.mark.parametrize(("descales_per", "descales"), [("tensor", "loud"), ("page", "quiet")])
def test_every_fault_changes_the_output_and_none_stays(descales_per: str, descales: str) -> None:
    case = replace(SMALL, descales_per=descales_per, descales=descales)
    staged = staging.stage(case, staging.find_kernel("emulated"), resolve_device(DEVICE))
    assert not staged.judge(input_faults.NONE.inject(staged, AT)).alarm
    honest = staged.setup.outputs[0].tensor.clone()
    for fault in input_faults.FAULTS:
        fault.inject(staged, AT)
        assert not torch.equal(staged.setup.outputs[0].tensor, honest), fault.name
        input_faults.NONE.inject(staged, AT)
        assert torch.equal(staged.setup.outputs[0].tensor, honest), fault.name


@pytest.mark.parametrize("pages", detection.PAGES)
@pytest.mark.parametrize("kernel", ["emulated", "emulated_fp8_p"])
def test_the_descale_of_one_page_is_caught_where_fixed_tolerances_are_blind(
    kernel: str, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [fault for fault in input_faults.FAULTS if fault.name in (detection.MUST_SEE, "output zero", "wrong page")]
    monkeypatch.setattr(detection, "FAULTS", chosen)
    hits = detection.run_seed((DEVICE, kernel, pages, 1))
    assert not any(hits["none"].values())
    assert hits[detection.MUST_SEE][detection.ANY]
    assert not any(hits[detection.MUST_SEE][rule] for rule in ("1e-2", "aiter .055", "cuDNN fp8", "TE RMSE"))
    assert hits["output zero"]["T1"]
    assert hits["output zero"]["1e-2"]
    assert not hits["output zero"][detection.VLLM]  # its data are smaller than its tolerance
    assert hits["wrong page"]["1e-2"]


def test_what_must_not_be_is_told() -> None:
    seen = {"none": {"any": 0}, detection.MUST_SEE: {"any": 3}}
    assert detection.failures({"set-up": seen}, seeds=3) == []
    assert len(detection.failures({"set-up": seen}, seeds=4)) == 1
    alarmed = seen | {"none": {"any": 1}}
    assert detection.failures({"set-up": alarmed}, seeds=3) == ["set-up: 1 false alarms"]


def test_faults_on_an_in_tree_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a K descale is named by tier 2; a run without a fault is silent."""
    wanted = ("none", "K of one page x1.017, short sequence", "wrong page")
    monkeypatch.setattr(faults_on_kernels, "PLAN", [p for p in faults_on_kernels.PLAN if p.fault.name in wanted])
    case = faults_on_kernels.cases(faults_on_kernels.GROUPS["decode"], "normal", quick=True)[2]
    result = faults_on_kernels.run_one((DEVICE, "decode", case))
    assert not any(result["none"].values())
    assert all(result[wanted[1]][tier] for tier in ("L", "T2", faults_on_kernels.NAMED))
    assert all(result["wrong page"][tier] for tier in ("T1", "L", "T2"))


@pytest.mark.parametrize(
    ("stale", "pages", "outcome", "named", "wrong"),
    [
        ("honest", (6, 7), "PASS", False, ""),
        ("honest", (6, 7), "FAIL", False, "FAIL of what is right"),
        ("K", (6, 7), "FAIL", True, ""),
        ("K", (6, 7), "ELEVATED", True, ""),
        ("K", (6, 7), "PASS", False, "a stale descale is PASS"),
        ("K", (6, 7), "FAIL", False, "called nothing"),
        ("K", (6, 6), "PASS", False, ""),  # nothing to get wrong
        ("K", (6,), "FAIL", False, "FAIL of what is right"),
    ],
)
def test_page_transitions_count_what_must_not_be(
    stale: str, pages: tuple[int, ...], outcome: str, named: bool, wrong: str
) -> None:
    row = page_transitions.Row("k", stale, pages, "quiet", 0, outcome, {"T1": 0.5}, named, "", 0.01, "PASS")
    assert row.wrong == wrong


def test_page_transitions_has_the_probes_and_a_plant_for_each_kernel() -> None:
    pages = {case.placement.pages[0] for case in page_transitions.probes()}
    assert {(4096,), (4097,), (4096, 4096), (4095, 4096), (4098, 4099)} < pages
    assert len(pages) == 8
    for kernel, plants in page_transitions.PLANTS.items():
        contract = find_kernels()[kernel]
        assert contract.folder is not None
        source = (contract.folder / contract.entry.partition(":")[0]).read_text()
        for old, new in (edit for edits in plants.values() for edit in edits):
            assert source.count(old) == 1
            assert new not in source
