"""What a kernel raises is told with the kernel's own line; memory that ran out is told from limits of a launch."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import harness.run.run_case
from harness.case import Case, Rows
from harness.errors import KernelRaised, OutOfMemory
from harness.kernel.failures import kernel_error
from harness.kernel.registry import find_kernels
from harness.report.plain import failure_text
from harness.run.outcome import Outcome, Verdict
from harness.run.run_case import Options, run_case
from harness.store.record import Record
from harness.triage.raised import explain_raised

CONTRACT = """
from harness.cache.content import Content
from harness.kernel.contract import Contract

KERNELS = (
    Contract("raiser", "raises", "kernel.py:launch", Content.ALL, frozenset({"prefill", "softmax_scale"})),
)
"""

KERNEL = """
import torch
import triton
import triton.language as tl

from .._shared.helper import helper


@triton.jit
def total(x):
    return x + no_such_name


@triton.jit
def kernel(q_ptr):
    x = tl.load(q_ptr + tl.arange(0, 16))
    tl.store(q_ptr, total(x))


def launch(args):
    {body}
"""
HELPER = """
import torch


def helper(tensor):
    return torch.einsum("a,b->ab", tensor, tensor)
"""
CASE = Case("raised", "raiser", Rows("mixed", (5, 1), (20, 33)), num_q_heads=2, head_size=16)


def run(folder: Path, body: str, kernel: str = KERNEL) -> Verdict:
    for name, text in {
        "raising/contract.py": CONTRACT,
        "raising/kernel.py": kernel.replace("{body}", body),
        "_shared/helper.py": HELPER,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    contract = replace(find_kernels([folder])["raiser"], returns_lse=False)
    return run_case(CASE, contract, Options(device="cpu"))


def rows(verdict: Verdict) -> dict[str, list[str]]:
    assert verdict.explanation is not None
    found = verdict.explanation["rows"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("body", "raised", "at"),
    [
        (
            "raise ValueError('no such layout')",
            "the kernel raised ValueError: no such layout",
            ["raising/kernel.py:21 in launch", "raise ValueError('no such layout')"],
        ),
        (
            "helper(args.q)",
            "the kernel raised RuntimeError: einsum()",
            ["_shared/helper.py:6 in helper", 'return torch.einsum("a,b->ab", tensor, tensor)'],
        ),
        (
            "kernel[(1,)](args.q)",
            "the kernel raised NameError: name 'no_such_name' is not defined",
            ["raising/kernel.py:11 in total", "return x + no_such_name"],
        ),
    ],
)
def test_a_kernel_that_raises_fails_with_its_own_line(tmp_path: Path, body: str, raised: str, at: list[str]) -> None:
    verdict = run(tmp_path, body)
    assert verdict.outcome is Outcome.FAIL
    assert rows(verdict)["raised"][0].startswith(raised)
    assert rows(verdict)["at"] == at
    record = Record.of(CASE, verdict, id="raised", matrix_path="m.yaml", line=1, tier="smoke", reproduce="pytest")
    assert f"  at           {at[0]}\n               {at[1]}\n" in failure_text(record)


def test_a_kernel_that_does_not_parse_fails_with_its_own_line(tmp_path: Path) -> None:
    verdict = run(tmp_path, "x = = 3")
    assert verdict.outcome is Outcome.FAIL
    assert rows(verdict)["at"] == ["raising/kernel.py:21 in <module>", "x = = 3"]


def test_a_kernel_that_triton_does_not_compile_fails_with_the_line_it_counts_from_def(tmp_path: Path) -> None:
    from triton.compiler.errors import CompilationError

    run(tmp_path, "pass")
    node = ast.parse("def total(x):\n    return x + no_such_name\n").body[0].body[0]  # type: ignore[attr-defined]
    refused = CompilationError("def total(x):\n    return x + no_such_name\n", node, "no_such_name is not defined")
    outer = CompilationError("def kernel(q_ptr):\n    total(x)\n", node)
    outer.__cause__ = refused
    error = kernel_error(outer)
    error.__cause__ = outer
    explanation = explain_raised(error, tmp_path)
    assert explanation["rows"]["at"] == ["raising/kernel.py:11 in total", "return x + no_such_name"]
    assert explanation["rows"]["raised"] == ["the kernel raised CompilationError: no_such_name is not defined"]


def test_host_memory_that_a_kernel_cannot_have_is_out_of_memory(tmp_path: Path) -> None:
    verdict = run(tmp_path, "torch.empty(1 << 46)")
    assert verdict.outcome is Outcome.OUT_OF_MEMORY
    assert verdict.reason == "the kernel ran out of host memory: 281,474,976,710,656 bytes could not be allocated"
    assert rows(verdict)["at"] == ["raising/kernel.py:21 in launch", "torch.empty(1 << 46)"]


def test_memory_that_attnreg_cannot_have_is_out_of_memory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.run.run_case, "build_problem", lambda case, device: torch.empty(1 << 46))
    verdict = run(tmp_path, "pass")
    assert verdict.outcome is Outcome.OUT_OF_MEMORY
    assert verdict.reason.startswith("attnreg ran out of host memory: 281,474,976,710,656 bytes")
    assert "phase problem" in verdict.reason


def out_of_resources(required: int, limit: int, name: str) -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(required, limit, name)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (MemoryError(), OutOfMemory, "the kernel ran out of host memory: MemoryError"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            OutOfMemory,
            "the kernel ran out of device memory",
        ),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfMemory, "the kernel ran out of device memory"),
        (RuntimeError("Triton Error [HIP]: out of memory"), OutOfMemory, "the kernel ran out of device memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory, "the kernel ran out of device memory"),
        (
            out_of_resources(262144, 232448, "shared memory"),
            KernelRaised,
            "the kernel cannot be launched: it needs 262,144 bytes of shared memory, a multiprocessor here has 232,448",
        ),
        (
            out_of_resources(1024, 512, "threads"),
            KernelRaised,
            "the kernel cannot be launched: it needs 1,024 threads, its registers leave room for 512",
        ),
        (
            RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
            KernelRaised,
            "the kernel cannot be launched: it needs more registers",
        ),
        (RuntimeError("my cache is out of memory slots"), KernelRaised, "the kernel raised RuntimeError: my cache"),
    ],
)
def test_memory_is_told_from_what_a_launch_asks_of_a_multiprocessor(
    error: Exception, kind: type[Exception], words: str
) -> None:
    told = kernel_error(error)
    assert type(told) is kind
    assert str(told).startswith(words)
