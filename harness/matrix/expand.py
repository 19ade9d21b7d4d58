"""From a Matrix to cases: products, covers and lists, under the constraints of harness.matrix.constraints.

Within products they leave combinations out; a value that never meets them, or a list entry that does not, is a mistake.

Invariant: equal matrices and contracts give equal cases in equal order; every case knows the line that asked for it;
what a cover leaves out is proved impossible, by constraint or by contract.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import combinations, product

from harness.case import Case
from harness.matrix.axes import AXES, case_id
from harness.matrix.constraints import assemble, constraints, contract_constraints
from harness.matrix.cover import CoverError, Model, check, cover
from harness.matrix.matrix import Matrix, Supported, Tier, Values
from harness.matrix.source import MatrixError, Mistake

_SELDOM = frozenset({"writer", "steps", "boundary", "boundary_target", "boundary_position"})
TUPLES = {0: "values", 1: "values", 2: "pairs", 3: "triples"}
_MAX_NAMED = 3  # values without a case, named in a summary
_CANDIDATES = {0: 1, 1: 1, 2: 12, 3: 4}  # tries per row of a cover: small tiers are worth squeezing


@dataclass(frozen=True)
class Coverage:
    """How well a tier covers: t-tuples that are possible, that its cases contain, and why others are not possible."""

    t: int
    feasible: int
    covered: int
    excluded_by_constraint: int
    excluded_by_contract: int
    unsupported: tuple[str, ...] = ()  # values that no case has, as no kernel takes them, e.g. "page_size 24"

    def describe(self, covered: int | None = None) -> str:
        """For summaries: "pairs 100 %"; never rounded up. covered: tuples of the cases that ran, where not all did."""
        amount = self.covered if covered is None else covered
        share = 100 if amount == self.feasible else min(int(100 * amount / self.feasible), 99)
        more = len(self.unsupported) - _MAX_NAMED
        named = ", ".join(self.unsupported[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{TUPLES[self.t]} {share} %" + (f", unsupported: {named}" if named else "")


@dataclass(frozen=True)
class Expansion:
    """The cases of one tier. `lines[i]` is where cases[i] was asked for; coverage is None for lists and products.

    Of a cover, the first `num_covering` cases form it; what `also` asks for follows.
    """

    matrix: Matrix
    tier: str
    cases: tuple[Case, ...] = ()
    lines: tuple[int, ...] = ()
    coverage: Coverage | None = None
    num_covering: int = 0

    def describe(self) -> str:
        """For summaries: what the selection promises, if all of it runs."""
        if self.coverage is not None:
            return self.coverage.describe()
        tier = self.matrix.tiers.get(self.tier)
        return "all" if tier is not None and tier.full else "listed"

    def describe_part(self, ran: Collection[str]) -> str:
        """For summaries: what the cases with ids `ran` cover by themselves; nothing where no cover was promised."""
        if self.coverage is None:
            return ""
        values = tier_values(self.matrix, self.matrix.tiers[self.tier])
        free = [axis for axis, several in values.items() if len(several) > 1]
        met: set[tuple[tuple[str, str], ...]] = set()
        for case in self.cases[: self.num_covering]:
            if case_id(case) in ran:
                met.update(combinations([(axis, spell(getattr(case, axis))) for axis in free], self.coverage.t))
        return self.coverage.describe(len(met))


def spell(value: object) -> str:
    """A value of an axis as a matrix writes it; rows and placements by name."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "name", value))


def expand(matrix: Matrix, tier_name: str, supported: Supported) -> Expansion:
    """See Matrix.expand."""
    tier = matrix.tiers.get(tier_name)
    if tier is None:
        return Expansion(matrix, tier_name)
    try:
        return _expand_tier(matrix, tier, supported)
    except Mistake as mistake:
        raise MatrixError(matrix.source.path, matrix.source.lines, [mistake]) from None


def _expand_tier(matrix: Matrix, tier: Tier, supported: Supported) -> Expansion:
    found: dict[Case, int] = {}
    coverage = None
    if tier.cover is not None:
        coverage = _expand_cover(matrix, tier, supported, found)
    elif tier.full:
        for case in _cases(matrix, tier_values(matrix, tier)):
            found.setdefault(case, tier.span.line)
    num_covering = len(found) if coverage is not None else 0
    for entry in tier.entries:
        for case in _cases(matrix, entry_values(matrix, tier, entry.values)):
            found.setdefault(case, entry.span.line)
    if not found:
        raise Mistake(
            tier.span,
            f"tier '{tier.name}' selects no case that a contract admits: {_refusals(matrix, tier, supported)}",
        )
    if len({case_id(case) for case in found}) != len(found):
        raise AssertionError(f"{matrix.path}: two cases of tier '{tier.name}' share an id")
    return Expansion(matrix, tier.name, tuple(found), tuple(found.values()), coverage, num_covering)


def _refusals(matrix: Matrix, tier: Tier, supported: Supported) -> str:
    """Why no kernel takes part: for each, the clause of its contract that rules out the first case it would have."""
    said = []
    for kernel in matrix.kernels:
        values = {**tier_values(matrix, tier), "kernel": (kernel,)}
        model = Model(values, constraints(matrix.name, matrix.rules, values))
        row = model.possible()
        case = None if row is None else assemble(matrix.name, model.assignment(row))
        said.append(f"{kernel}: {(case and supported(case)) or 'constraints leave none'}")
    return "; ".join(said)


def tier_values(matrix: Matrix, tier: Tier) -> Values:
    """The values of every axis in `tier`, in the order of AXES, axes that only have their default included.

    Axes of boundary probes are left out where there is none, those of writers where they are not given: they would only
    slow down a cover, and change which cases form it.
    """
    given = {**matrix.values, **(tier.shrink or {})}
    return {
        name: given.get(name, (axis.default,))
        for name, axis in AXES.items()
        if name in given or name not in _SELDOM or ("boundary" in given and name.startswith("boundary"))
    }


def entry_values(matrix: Matrix, tier: Tier, entry: Values) -> Values:
    """The values of an entry of `list` or `also`: what it says; else all kernels; else the axis's first value."""
    plain = {name: values if name == "kernel" else values[:1] for name, values in tier_values(matrix, tier).items()}
    probe = {name: (axis.default,) for name, axis in AXES.items() if name.startswith("boundary")}
    return {**(probe if "boundary" in entry else {}), **plain, **entry}


def _cases(matrix: Matrix, values: Values) -> Iterator[Case]:
    """The product of `values` less what constraints exclude, in order."""
    rules = constraints(matrix.name, matrix.rules, values)
    model = Model(values, rules)
    names = tuple(values)
    for row in product(*(range(len(values[name])) for name in names)):
        if model.allows(row, range(len(names))):
            case = assemble(matrix.name, model.assignment(row))
            assert case is not None  # an implied constraint
            yield case


def _expand_cover(matrix: Matrix, tier: Tier, supported: Supported, found: dict[Case, int]) -> Coverage:
    values = tier_values(matrix, tier)
    written = constraints(matrix.name, matrix.rules, values)
    model = Model(values, [*written, *contract_constraints(matrix.name, values, supported)])
    assert tier.cover is not None
    try:
        rows = cover(model, tier.cover, candidates=_CANDIDATES[tier.cover])
        report = check(model, rows, tier.cover)
        without_contracts = Model(values, written)
        by_constraint = sum(without_contracts.possible(pairs) is None for pairs in report.impossible)
    except CoverError as error:
        raise Mistake(tier.span, f"tier '{tier.name}': {error}") from None
    for row in sorted(rows):
        case = assemble(matrix.name, model.assignment(row))
        assert case is not None  # an implied constraint
        found.setdefault(case, tier.span.line)
    by_contract = len(report.impossible) - by_constraint
    without_case = tuple(
        f"{model.names[axis]} {spell(value)}"
        for axis in model.free
        for number, value in enumerate(model.values[axis])
        if all(row[axis] != number for row in rows)
    )
    return Coverage(report.t, report.feasible, report.covered, by_constraint, by_contract, without_case)
