"""The access oracle on one launch, or why it does not apply.

Invariant: nothing goes unsaid: whatever is not traced has a state that says so.
"""

from __future__ import annotations

import torch

from harness.case import Case
from harness.kernel.contract import Contract
from harness.kernel.launch import LaunchResult
from harness.oracle.findings import AccessFindings
from harness.run.setup import Setup


def untraceable(case: Case, device: torch.device, *, asked: bool) -> str | None:
    """Why a launch of `case` on `device` is not to be traced; None where it is. `asked`: whether that was wanted."""
    if not asked:
        return "not traced: turned off"
    if device.type != "cpu":
        return "not traced: the kernel was compiled"
    if case.boundary is not None and case.boundary_target == "table" and case.page_table == "block_table":
        return "not traced: rows of the page table lie too far apart to judge it entry by entry"
    return None


def judge_launch(contract: Contract, setup: Setup, result: LaunchResult, untraced: str | None) -> AccessFindings:
    """What the accesses of `result` show; `untraced` is what `untraceable` said of it."""
    if untraced is not None:
        return AccessFindings(untraced)
    if result.trace is None:
        return AccessFindings("not traced: no Triton program ran")
    from harness.access.judge import judge_accesses  # needs numpy, which comes with triton

    unwritten = setup.outputs[0].unwritten().numpy()  # [num_tokens, num_q_heads, head_size_v]
    return judge_accesses(setup.problem.case, contract, setup.cache, setup.args, result.trace, unwritten)
