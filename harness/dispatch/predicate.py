"""Predicate: how an engine chooses between device kernels, as named clauses over a few facts. Pure, free of torch.

Invariant: a decision names the kernels and the one branch that led there: the first clause that does not hold, or that
all of them hold. So a sweep that has taken every branch has seen every clause hold, and every clause decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from harness.case import Case

Facts = TypeVar("Facts")
ALL_HOLD = "all_hold"


@dataclass(frozen=True)
class Clause(Generic[Facts]):
    """One condition. Its name is also that of the branch on which it is the first not to hold; `fails` says it.

    A clause of the machine is one that no case can change (an architecture, a setting of the engine).
    """

    name: str
    fails: str
    holds: Callable[[Facts], bool]
    kernels: tuple[str, ...] = ()  # that run on this branch; (): those of Predicate.otherwise
    machine: bool = False


@dataclass(frozen=True)
class Decision:
    """What a predicate says of one case."""

    kernels: tuple[str, ...]  # device kernels
    branch: str  # name of the first clause that does not hold, or ALL_HOLD
    because: str  # the same in words


@dataclass(frozen=True)
class Predicate(Generic[Facts]):
    """A choice between `kernels`, where all clauses hold, and `otherwise`.

    `facts` are those of a case, on a platform where there is one to know ("" for the machine at hand); None where the
    choice does not come up.
    """

    name: str
    facts: Callable[[Case, str], Facts | None]
    clauses: tuple[Clause[Facts], ...]
    kernels: tuple[str, ...]
    otherwise: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()  # where the choice comes up, if only there

    def __post_init__(self) -> None:
        """ValueError for a branch that has no name of its own or leads to no kernel."""
        if wrong := next(self._mistakes(), None):
            raise ValueError(f"predicate {self.name}: {wrong}")

    def _mistakes(self) -> Iterator[str]:
        names = [ALL_HOLD, *(clause.name for clause in self.clauses)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"two branches are called {twice[0]}"
        if not self.kernels:
            yield "no kernels where all clauses hold"
        for clause in self.clauses:
            if not clause.kernels and not self.otherwise:
                yield f"no kernels where {clause.name} does not hold"

    @property
    def branches(self) -> dict[str, str]:
        """Name and words of every branch that a case decides about, in the order of the clauses."""
        return {ALL_HOLD: "every condition holds"} | {c.name: c.fails for c in self.clauses if not c.machine}

    @property
    def every_kernel(self) -> frozenset[str]:
        """All device kernels that some branch leads to."""
        return frozenset((*self.kernels, *self.otherwise, *(name for c in self.clauses for name in c.kernels)))

    def decide(self, facts: Facts) -> Decision:
        """The decision on `facts`."""
        for clause in self.clauses:
            if not clause.holds(facts):
                return Decision(clause.kernels or self.otherwise, clause.name, clause.fails)
        return Decision(self.kernels, ALL_HOLD, self.branches[ALL_HOLD])

    def of(self, case: Case, platform: str = "") -> Decision | None:
        """The decision on `case`; None where the choice does not come up."""
        facts = self.facts(case, platform)
        return None if facts is None else self.decide(facts)
