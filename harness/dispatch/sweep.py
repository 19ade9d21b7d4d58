"""Sweep: which branch of a dispatch each case of some matrices would take, here or on a platform that is not at hand.

Invariant: nothing is run; what is asked is the same predicate that a launch is held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.case import Case
from harness.dispatch.predicate import Decision, Predicate
from harness.errors import UsageError
from harness.kernel.contract import Contract
from harness.matrix.axes import case_id
from harness.matrix.matrix import Unreached
from harness.matrix.source import suggestion


@dataclass(frozen=True)
class Sweep:
    """The cases of one kernel whose contract admits them, by the branch they take."""

    kernel: str
    predicate: Predicate[Any]
    platform: str  # "": the machine at hand
    explained: Mapping[str, str]  # why a branch is left out, as the matrices state it
    taken: dict[str, list[str]] = field(default_factory=dict)  # ids of cases by branch
    decisions: dict[str, Decision] = field(default_factory=dict)  # by branch
    not_asked: list[str] = field(default_factory=list)  # cases for which the choice does not come up

    @property
    def unreached(self) -> dict[str, str]:
        """Branches that no case takes, for no reason, and what they are taken for; none where the machine decides."""
        if self.decided_by_machine:
            return {}
        known = {*self.taken, *self.explained}
        return {branch: words for branch, words in self.predicate.branches.items() if branch not in known}

    @property
    def decided_by_machine(self) -> bool:
        """Whether the platform leaves cases no choice: no sweep could reach another branch there."""
        return any(clause.machine and clause.name in self.taken for clause in self.predicate.clauses)

    def add(self, case: Case) -> None:
        """Count `case`."""
        if (decided := self.predicate.of(case, self.platform)) is None:
            self.not_asked.append(case_id(case))
        else:
            self.decisions[decided.branch] = decided
            self.taken.setdefault(decided.branch, []).append(case_id(case))


def sweep(
    cases: Iterable[Case],
    kernels: Mapping[str, Contract],
    unreached: Iterable[Unreached] = (),
    platform: str = "",
) -> list[Sweep]:
    """One entry per kernel of `cases` that chooses on `platform`, in the order of their first case.

    `unreached` is what matrices state of the dispatches of here; of other platforms they state nothing.
    Raises UsageError where no kernel of `kernels` chooses on that platform.
    """
    known = {name for contract in kernels.values() for one in contract.elsewhere for name in one.platforms}
    if platform and platform not in known:
        raise UsageError(f"--platform: no kernel chooses on '{platform}'{suggestion(platform, known)}")
    explained: dict[str, dict[str, str]] = {}
    for one in () if platform else unreached:
        explained.setdefault(one.kernel, {})[one.branch] = one.because
    found: dict[str, Sweep] = {}
    for case in cases:
        contract = kernels[case.kernel]
        predicate = _asked(contract, platform)
        if predicate is not None and contract.unsupported(case) is None:
            new = Sweep(case.kernel, predicate, platform, explained.get(case.kernel, {}))
            found.setdefault(case.kernel, new).add(case)
    return list(found.values())


def _asked(contract: Contract, platform: str) -> Predicate[Any] | None:
    """The predicate that decides about the cases of a kernel."""
    if not platform:
        return contract.dispatch
    return next((one for one in contract.elsewhere if platform in one.platforms), None)
