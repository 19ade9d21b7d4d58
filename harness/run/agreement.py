"""Agreement of twins: what only moves bytes must not move a bit of the output.

Invariant: case and twin are the same problem and differ in one of TWIN_AXES alone, on the same device kernels and, in
the interpreter, in the same order of programs; so where bits differ that axis changed the arithmetic. Either output may
lie within its tolerance. An axis of which the contract says that it does change the arithmetic is not compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from harness.case import Case
from harness.errors import KernelRaised
from harness.kernel.contract import Contract
from harness.kernel.launch import launch
from harness.kernel.registry import Launcher, code_home
from harness.matrix.axes import AXES
from harness.matrix.axis_types import Choice
from harness.problem.admission import layout_refusal, placement_refusal
from harness.run.outcome import Outcome, Verdict
from harness.run.setup import Setup, build_arguments, check_setup
from harness.run.twice import bit_difference
from harness.triage.explain import with_row
from harness.triage.raised import explain_raised


def with_agreement(
    verdict: Verdict, contract: Contract, setup: Setup, launcher: Launcher, axes: Iterable[str]
) -> Verdict:
    """`verdict` (a PASS), or FAIL where the twin in one of `axes` breaks a rule or leaves other bits.

    What has no twin to compare with is told in the row "twins" of the explanation.
    """
    wrong, untold = [], []
    for axis in axes:
        twin = twin_in(axis, setup.problem.case, contract)
        if isinstance(twin, Case):
            wrong += _differences(axis, twin, contract, setup, launcher)
        else:
            untold.append(f"not compared in {axis}: {twin}")
    if untold or wrong:
        verdict = replace(verdict, explanation=with_row(verdict.explanation, "twins", *wrong, *untold))
    if not wrong:
        return verdict
    reason = "; ".join(wrong)
    explanation = {**(verdict.explanation or {}), "summary": reason, "shape": "twins"}
    return replace(verdict, outcome=Outcome.FAIL, reason=reason, explanation=explanation)


def twin_in(axis: str, case: Case, contract: Contract) -> Case | str:
    """`case` with the next value of `axis` that goes to the same device kernels, or why there is none.

    The next one, in turn, so that the cases of a sweep compare all values with each other.
    """
    if axis in contract.arithmetic_by:
        return f"it changes the arithmetic of {contract.name}"
    kind = AXES[axis].type
    assert isinstance(kind, Choice)
    at = kind.words.index(getattr(case, axis))
    for word in (*kind.words[at + 1 :], *kind.words[:at]):
        changed: dict[str, Any] = {axis: word}
        twin = replace(case.without_writer(), **changed)  # what a writer had stored is built: the same bits
        if contract.unsupported(twin) or layout_refusal(twin) or placement_refusal(twin):
            continue
        if contract.must_launch(twin) == contract.must_launch(case):
            return twin
    return f"{contract.name} takes no other one here"


def _differences(axis: str, twin: Case, contract: Contract, setup: Setup, launcher: Launcher) -> list[str]:
    """What the outputs of `twin` have that those of `setup` have not, a line each."""
    other = build_arguments(replace(setup.problem, case=twin), contract, fences=setup.fences)
    check_setup(other, contract)
    name, seed = f"the twin with {axis} {getattr(twin, axis)}", twin.geometry_seed
    pools = other.cache.pools_by_argument
    try:
        result = launch(contract, twin, launcher, other.args, other.outputs, program_order_seed=seed, pools=pools)
    except KernelRaised as error:
        return [f"{name}: {explain_raised(error, code_home(contract))['summary']}"]
    said = [f"{name}: {violation}" for violation in result.violations]
    for own, its in zip(setup.outputs, other.outputs, strict=True):
        if difference := bit_difference(own.tensor, its.tensor):
            said.append(f"{name} has other bits in {own.name}: {difference}")
    return said
