"""A case staged once and launched many times: set-up, float64 reference and tolerance are kept, outputs judged anew.

Invariant: the reference belongs to what was staged; whatever a launch is handed instead (a fault) never moves it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from emulated import EMULATED
from torch_backends import BACKENDS

from harness.case import Case
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.launch import launch
from harness.kernel.registry import Launcher, find_kernels, load_entry
from harness.oracle.gain_findings import Z_LIMIT
from harness.oracle.gains import Gain
from harness.oracle.hull import judge_hull
from harness.oracle.judge import judge
from harness.oracle.tolerance import Tolerance, rounding_of, tolerance
from harness.problem.problem import Problem, build_problem
from harness.run.judge_gains import all_gains
from harness.run.reference import reference_inputs
from harness.run.setup import Setup, build_arguments
from references.attention import AttentionInputs, AttentionReference, attend

TIERS = ("T1", "L", "T2", "hull")


@dataclass(frozen=True)
class Kernel:
    """A kernel to measure: in-tree, one of torch's, or an emulation."""

    contract: Contract
    launcher: Launcher

    @property
    def name(self) -> str:
        return self.contract.name


def find_kernel(name: str) -> Kernel:
    """The kernel called `name`; imports it, so the device must have been chosen (harness.interpreter.prepare)."""
    for contract, launcher in (*EMULATED, *BACKENDS):
        if contract.name == name:
            return Kernel(contract, launcher)
    contract = find_kernels()[name]
    return Kernel(contract, load_entry(contract))


@dataclass(frozen=True)
class Judged:
    """What the tiers say of one launch, the first three as multiples of their thresholds. None: not run."""

    out: float  # tier 1, worst element
    lse: float | None  # tier L, worst row
    gain: float | None  # tier 2, worst |z|
    best: Gain | None  # what tier 2 calls the fault
    outside: int  # elements outside the hull of the attended values
    violations: tuple[str, ...]  # exact invariants broken

    def caught(self) -> dict[str, bool]:
        """Which tiers would fail the case; NaN counts."""
        values = zip(TIERS, (self.out, self.lse, self.gain), strict=False)
        return {tier: value is not None and not value <= 1 for tier, value in values} | {"hull": self.outside > 0}

    @property
    def alarm(self) -> bool:
        """Whether anything would fail the case."""
        return bool(self.violations) or any(self.caught().values())


@dataclass(frozen=True)
class Staged:
    """A case ready for launches. `setup.args` are the right arguments."""

    kernel: Kernel
    setup: Setup
    inputs: AttentionInputs  # what a right kernel sees
    reference: AttentionReference
    allowed: Tolerance

    @property
    def problem(self) -> Problem:
        return self.setup.problem

    @property
    def case(self) -> Case:
        return self.setup.problem.case

    def launch(self, args: LaunchArguments) -> tuple[str, ...]:
        """Launch on `args` (the arguments of this case or a fault of them): the violations."""
        result = launch(
            self.kernel.contract,
            self.case,
            self.kernel.launcher,
            args,
            self.setup.outputs,
            program_order_seed=self.case.geometry_seed,
        )
        return result.violations

    def judge(self, violations: tuple[str, ...] = ()) -> Judged:
        """What the tiers say of the outputs as they stand."""
        outputs = self.setup.outputs
        findings = judge(
            outputs[0].tensor,
            outputs[1].tensor if len(outputs) > 1 else None,
            self.reference,
            self.allowed,
            unwritten=tuple(o.unwritten() for o in outputs),
            violations=violations,
        )
        ratios = {t.name: t.err_over_tol for t in findings.tensors}
        profile, dtype = self.kernel.contract.numerics, self.case.dtype
        out = outputs[0].tensor.double() * profile.out_scale  # [num_tokens, num_q_heads, head_size_v]
        gains = all_gains(self.kernel.contract, self.setup, self.inputs)
        return Judged(
            out=ratios["out"],
            lse=ratios.get("lse"),
            gain=gains.z / Z_LIMIT if gains.num_statistics else None,
            best=gains.best,
            outside=judge_hull(self.inputs, out, profile, dtype).num_outside,
            violations=violations,
        )


def stage(case: Case, kernel: Kernel, device: torch.device) -> Staged:
    """Build everything but the launch."""
    problem = build_problem(case, device)
    kernel = replace(kernel, contract=kernel.contract.of_output(case.out_dtype, problem.output_scale))
    setup = build_arguments(problem, kernel.contract)
    inputs = reference_inputs(problem, setup.cache, kernel.contract)
    reference = attend(inputs, rounding_of(kernel.contract.numerics, case.dtype))
    allowed = tolerance(reference, kernel.contract.numerics, case.dtype, case.head_size, structured=problem.structured)
    return Staged(kernel, setup, inputs, reference, allowed)
