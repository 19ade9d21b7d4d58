"""A case staged once and launched many times: set-up, float64 reference and tolerance are kept, outputs judged anew.

Invariant: the reference belongs to what was staged; whatever a launch is handed instead (a fault) never moves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from emulated import EMULATED
from torch_backends import BACKENDS

from harness.case import Case
from harness.kernel.arguments import LaunchArguments
from harness.kernel.contract import Contract
from harness.kernel.guarded import guarded_output
from harness.kernel.launch import launch
from harness.kernel.registry import Launcher, find_kernels, load_entry
from harness.oracle.judge import judge
from harness.oracle.tolerance import Tolerance, tolerance
from harness.problem.problem import Problem, build_problem
from harness.run.run_case import build_reference
from harness.run.setup import Setup, build_arguments
from references.attention import AttentionReference


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
    """What the tiers say of one launch, each as a multiple of its threshold: above 1 is an alarm. None: not run."""

    out: float  # tier 1, worst element
    lse: float | None  # tier L, worst row
    gain: float | None = None  # tier 2, worst |z| over its threshold
    names: str = ""  # what tier 2 calls the fault
    violations: tuple[str, ...] = ()  # exact invariants broken

    @property
    def alarm(self) -> bool:
        """Whether any tier would fail the case; NaN counts."""
        return bool(self.violations) or any(x is not None and not x <= 1 for x in (self.out, self.lse, self.gain))


@dataclass(frozen=True)
class Staged:
    """A case ready for launches. `setup.args` are the right arguments."""

    kernel: Kernel
    setup: Setup
    reference: AttentionReference
    allowed: Tolerance

    @property
    def problem(self) -> Problem:
        return self.setup.problem

    @property
    def case(self) -> Case:
        return self.setup.problem.case

    def fresh_outputs(self) -> Staged:
        """The same case with outputs of its own, so that no launch finds what another one wrote."""
        outputs = tuple(
            guarded_output(o.name, tuple(o.tensor.shape), o.tensor.dtype, o.tensor.device, self.case.strides == "all")
            for o in self.setup.outputs
        )
        args = replace(self.setup.args, out=outputs[0].tensor, lse=outputs[1].tensor if len(outputs) > 1 else None)
        return replace(self, setup=replace(self.setup, args=args, outputs=outputs))

    def launch(self, args: LaunchArguments) -> tuple[str, ...]:
        """Launch on `args` (the arguments of this case or a fault of them): the violations."""
        result = launch(
            self.kernel.contract,
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
        return Judged(ratios["out"], ratios.get("lse"), violations=violations)


def stage(
    case: Case, kernel: Kernel, device: torch.device, change: Callable[[Problem], Problem] = lambda problem: problem
) -> Staged:
    """Build everything but the launch. `change` replaces the drawn problem."""
    problem = change(build_problem(case, device))
    setup = build_arguments(problem, kernel.contract)
    reference = build_reference(problem, setup.cache, kernel.contract)
    allowed = tolerance(reference, kernel.contract.numerics, case.dtype, case.head_size, structured=problem.structured)
    return Staged(kernel, setup, reference, allowed)
