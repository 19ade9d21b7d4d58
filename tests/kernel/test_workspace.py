"""Workspaces: poison in red zones under a name; stores behind them, and reads of what nobody stored, are red."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.case import Case, Rows
from harness.kernel.contract import Contract
from harness.kernel.registry import find_kernels
from harness.kernel.workspace import Workspaces, plain_workspace
from harness.problem.boundary import workspace_geometry
from harness.run.outcome import Outcome, Verdict
from harness.run.run_case import Options, run_case
from tests.run.boundary_faults import mutated, split

KERNELS = find_kernels()
DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
CASE = Case("m", "unified_paged", Rows("two_parts", (3, 1), (70, 80)), num_q_heads=2, head_size=32, num_splits=2)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_what_is_handed_out_is_poison_and_what_lies_around_it_is_watched(
    dtype: torch.dtype, device: torch.device
) -> None:
    workspaces = Workspaces(device)
    first, again, empty = (workspaces("part", shape, dtype) for shape in ((1, 3, 4), (3, 4), (0, 4)))
    plain = plain_workspace((3, 4), dtype, device)
    for tensor in (first, again, plain):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert bool((tensor.view(torch.uint8) == 0xFF).all())
    assert (tuple(first.shape), tuple(again.shape), tuple(empty.shape)) == ((1, 3, 4), (3, 4), (0, 4))
    assert list(workspaces.handed) == ["part", "part #2", "part #3"]
    first.zero_()
    assert all(made.overrun() is None for made in workspaces.handed.values())
    again.as_strided((1,), (1,), again.storage_offset() + 12).zero_()
    assert workspaces.handed["part"].overrun() is None
    assert "1 elements behind or between the rows of workspace part #2 were written, the first +12" in str(
        workspaces.handed["part #2"].overrun()
    )


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_rows_lie_at_the_boundary_wherever_there_are_two(device: torch.device) -> None:
    workspaces = Workspaces(device, workspace_geometry(split("elements31")))
    parts = workspaces("parts", (1, 3, 2, 5), torch.float32)
    assert parts.shape == (1, 3, 2, 5)
    assert 2 * parts.stride(1) >= 1 << 31
    assert parts.stride()[2:] == (5, 1)
    assert bool(parts.isnan().all())
    assert workspaces("flat", (64,), torch.float32).is_contiguous()
    assert workspaces("single", (1, 64), torch.float32).is_contiguous()


def run(contract: Contract, old: str, new: str, folder: Path, case: Case = CASE) -> Verdict:
    return run_case(replace(case, kernel=contract.name), mutated(contract, old, new, folder), Options(device="cpu"))


def test_a_kernel_may_take_workspaces_or_allocate_by_itself() -> None:
    for kernel in ("unified_paged", "torch_sdpa_paged"):
        case = replace(CASE, kernel=kernel, num_splits=2 if kernel == "unified_paged" else None)
        assert run_case(case, KERNELS[kernel], Options(device="cpu", twice=True)).outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # of the last head's row of the last part: into what lies behind
        ("tl.store(partial_max_ptr + max_offsets,", "tl.store(partial_max_ptr + max_offsets + 1,",
         "4 bytes past the end of 'workspace partial_max'"),
        ("for split in range(0, with_keys):", "for split in range(0, with_keys + 1):",
         "past the end of 'workspace partial_max'"),
        ("tl.store(partial_out_ptr + out_offsets, acc,", "tl.store(partial_out_ptr + out_offsets, acc * 0,",
         "elements"),
    ],
    ids=["a store behind", "a load behind", "a wrong value"],
)  # fmt: skip
def test_a_fault_in_a_workspace_is_red_and_names_it(old: str, new: str, words: str, tmp_path: Path) -> None:
    verdict = run(KERNELS["unified_paged"], old, new, tmp_path)
    assert verdict.outcome is Outcome.FAIL
    assert words in verdict.reason


def test_what_torch_stores_behind_a_workspace_is_red_and_names_it(tmp_path: Path) -> None:
    old = "    starts, seq_lens = args"
    new = f"""    scratch = args.workspace("scores", (4, 8), torch.float32)
    scratch.as_strided((33,), (1,)).zero_()
{old}"""
    verdict = run(KERNELS["torch_sdpa_paged"], old, new, tmp_path, replace(CASE, num_splits=None))
    assert verdict.outcome is Outcome.FAIL
    assert "1 elements behind or between the rows of workspace scores were written, the first +32" in verdict.reason


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"partial_out", (', '"partial_out", (-1, ', "workspace 'partial_out': sizes must not be negative: (-1, "),
        (", torch.float32)", ", torch.complex128)", "elements have 1, 2, 4 or 8 bytes, not 16 (torch.complex128)"),
    ],
)
def test_a_workspace_that_cannot_be_is_told_by_its_name(old: str, new: str, words: str, tmp_path: Path) -> None:
    verdict = run_case(CASE, mutated(KERNELS["unified_paged"], old, new, tmp_path), Options(device="cpu"))
    assert verdict.outcome is Outcome.FAIL
    assert words in verdict.reason


def test_a_part_that_was_not_stored_is_poison(tmp_path: Path) -> None:
    verdict = run(
        KERNELS["unified_paged"],
        "tl.store(partial_sum_ptr + sum_offsets, row_sum, mask=present)",
        "tl.store(partial_sum_ptr + sum_offsets, row_sum, mask=present & (split == 0))",
        tmp_path,
    )
    assert verdict.outcome is Outcome.FAIL
    assert "NaN" in str(verdict.explanation) or "nan" in str(verdict.explanation)
