"""An argument that is not what was built for the case is a fault of the test, never of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from harness.case import Case, Rows
from harness.kernel.arguments import LaunchArguments
from harness.kernel.registry import find_kernels
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, run_case

CONTRACT = find_kernels()["chunked_prefill_paged_decode"]
CASE = Case(
    "handover",
    CONTRACT.name,
    Rows("mixed", (5, 1), (20, 33)),
    kv_dtype="fp8_e4m3",
    num_q_heads=4,
    gqa_ratio=2,
    head_size=32,
    sliding_window=11,
    alibi=True,
)


def run(change: Callable[[LaunchArguments], LaunchArguments], case: Case = CASE) -> Verdict:
    return run_case(case, CONTRACT, Options(device="cpu", plant=replace(NO_PLANT, arguments=change)))


def rolled(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    integers = tensor.view(torch.int16)
    return integers.roll(1, 0).view(tensor.dtype)


CHANGES: dict[str, Callable[[LaunchArguments], LaunchArguments]] = {
    "block_table": lambda a: replace(a, block_table=a.block_table.flip(0)),
    "k_scale": lambda a: replace(a, k_scale=a.v_scale),
    "v_scale": lambda a: replace(a, v_scale=a.v_scale * 2),
    "k_cache": lambda a: replace(a, k_cache=torch.zeros_like(a.k_cache)),
    "v_cache": lambda a: replace(a, v_cache=a.k_cache),
    "q": lambda a: replace(a, q=rolled(a.q)),
    "k": lambda a: replace(a, k=rolled(a.k)),
    "v": lambda a: replace(a, v=a.k),
    "softmax_scale": lambda a: replace(a, softmax_scale=a.softmax_scale * 1.02),
    "sliding_window": lambda a: replace(a, sliding_window=a.sliding_window + 1),
    "causal": lambda a: replace(a, causal=False),
    "logits_soft_cap": lambda a: replace(a, logits_soft_cap=30.0),
    "alibi_slopes": lambda a: replace(a, alibi_slopes=-a.alibi_slopes if a.alibi_slopes is not None else None),
    "sinks": lambda a: replace(a, sinks=torch.zeros(4)),
    "layout": lambda a: replace(a, layout="vllm_classic"),
    "kv_dtype": lambda a: replace(a, kv_dtype="auto"),
    "num_splits": lambda a: replace(a, num_splits=2),
    "max_seq_len": lambda a: replace(a, max_seq_len=a.max_seq_len + 1000),
    "out": lambda a: replace(a, out=a.out.clone()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_argument_is_a_test_bug_and_nothing_is_launched(name: str) -> None:
    verdict = run(CHANGES[name])
    assert verdict.outcome is Outcome.TEST_BUG, verdict.reason
    assert f"before launch: {name}" in verdict.reason
    assert verdict.ran == ()


@pytest.mark.parametrize("strides", ["compact", "cache", "all"])
def test_what_was_built_is_handed_over(strides: str) -> None:
    assert run(lambda args: args, replace(CASE, strides=strides)).outcome is Outcome.PASS


def test_a_changed_lse_buffer_is_a_test_bug() -> None:
    verdict = run(lambda args: replace(args, lse=args.lse.clone() if args.lse is not None else None))
    assert verdict.outcome is Outcome.TEST_BUG
