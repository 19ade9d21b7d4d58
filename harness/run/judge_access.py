"""The access oracle on one launch, or why it does not apply.

Invariant: nothing goes unsaid: whatever is not traced has a state that says so.
"""

from __future__ import annotations

from harness.kernel.contract import Contract
from harness.kernel.launch import LaunchResult
from harness.oracle.findings import AccessFindings
from harness.run.setup import Setup


def judge_launch(contract: Contract, setup: Setup, result: LaunchResult, *, asked: bool) -> AccessFindings:
    """What the accesses of `result` show; `asked` is whether they were to be traced."""
    if not asked:
        return AccessFindings("not traced: turned off")
    if setup.args.q.device.type != "cpu":
        return AccessFindings("not traced: the kernel was compiled")
    if result.trace is None:
        return AccessFindings("not traced: no Triton program ran")
    from harness.access.judge import judge_accesses  # needs numpy, which comes with triton

    unwritten = setup.outputs[0].unwritten().numpy()  # [num_tokens, num_q_heads, head_size_v]
    return judge_accesses(setup.problem.case, contract, setup.cache, setup.args, result.trace, unwritten)
