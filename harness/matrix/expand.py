"""From a Matrix to cases: products, covers and lists, under the constraints that are written and those implied.

Implied constraints: gqa_ratio divides num_q_heads; a row mix has a meaning for the page size and window at hand; the
data law, the descales, the layout and the placement can keep their promise (harness.problem.admission).
Within products they leave combinations out, as written constraints do; a value that never meets them, or a list entry
that does not, is a mistake.

Invariant: equal matrices and contracts give equal cases in equal order; every case knows the line that asked for it;
what a cover leaves out is proved impossible, by constraint or by contract.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from harness.case import Case, Rows
from harness.matrix.axes import AXES, case_id
from harness.matrix.cover import Constraint, CoverError, Model, check, cover
from harness.matrix.expression import ExpressionError
from harness.matrix.matrix import Matrix, Rule, Supported, Tier, Values
from harness.matrix.rows import ROWS_AXES, RowMix
from harness.matrix.source import MatrixError, Mistake
from harness.problem.admission import (
    descales_refusal,
    law_refusal,
    layout_refusal,
    placement_refusal,
    serving_refusal,
)
from harness.problem.boundary import boundary_refusal

_NO_ROWS = (1,), (16,)  # stands in where a batch is not known yet or does not matter
_HEADS = frozenset({"num_q_heads", "gqa_ratio"})
LAW_AXES = frozenset({"data", "logits_soft_cap", "alibi", "causal", "placement"})
DESCALE_AXES = frozenset({"descales", "descales_per", "kv_dtype", "q_dtype", "data"})
LAYOUT_AXES = frozenset({"layout", "page_size", "head_size", "dtype", "kv_dtype"})
PLACEMENT_AXES = ROWS_AXES | {"placement", "num_pages", "steps"}
BOUNDARY_AXES = ROWS_AXES | {
    "boundary", "boundary_target", "boundary_position", "placement", "num_pages", "strides", "dtype", "kv_dtype",
    "descales_per", "out_dtype", "num_q_heads", "gqa_ratio", "head_size", "head_size_v", "page_table", "writer",
}  # fmt: skip
SERVING_AXES = ROWS_AXES | {
    "writer", "steps", "boundary", "boundary_target", "causal", "placement", "data", "num_pages", "pool",
}  # fmt: skip
_SELDOM = frozenset({"writer", "steps", "boundary", "boundary_target", "boundary_position"})
Predicate = Callable[[Mapping[str, Any]], bool]
_STORED = frozenset({"dtype", "kv_dtype", "q_dtype"})
_DESCALED = frozenset({"descales_per", "page_size"})
_COUPLED = (frozenset({"head_size", "head_size_v"}), _STORED, _DESCALED, ROWS_AXES)  # one clause looks at them together
_NEVER_ALONE = _STORED | {"kernel", "rows", "head_size_v", "descales_per"}
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


def assemble(name: str, assignment: Mapping[str, Any]) -> Case | None:
    """The case of an assignment; axes it does not hold are at their default. None where its rows have no meaning."""
    values = {axis.name: axis.default for axis in AXES.values()} | {"kernel": ""} | dict(assignment)
    mix = values.pop("rows")
    rows: Rows | None = Rows("", *_NO_ROWS)
    if isinstance(mix, RowMix):
        if assignment.keys() >= ROWS_AXES:
            rows = mix.resolve(values["page_size"], values["sliding_window"], values["geometry_seed"])
        else:
            rows = Rows(mix.name, *_NO_ROWS)  # the name is all that a constraint on fewer axes can ask for
    return None if rows is None else Case(matrix=name, rows=rows, **values)


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


def constraints(name: str, rules: Iterable[Rule], values: Values) -> list[Constraint]:
    """The implied constraints and those of `rules`, over `values` of axes."""

    def divides(values: Mapping[str, Any]) -> bool:
        return bool(values["num_q_heads"] % values["gqa_ratio"] == 0)

    def rows_resolve(values: Mapping[str, Any]) -> bool:
        return assemble(name, values) is not None

    implied = [
        Constraint(_HEADS, divides, "gqa_ratio divides num_q_heads"),
        Constraint(ROWS_AXES, rows_resolve, "rows have valid lengths"),
        Constraint(LAW_AXES, _admits(name, law_refusal), "the data law is possible"),
        Constraint(DESCALE_AXES, _admits(name, descales_refusal), "the descales are possible"),
        Constraint(LAYOUT_AXES, _admits(name, layout_refusal), "the layout is possible"),
        Constraint(PLACEMENT_AXES & values.keys(), _admits(name, placement_refusal), "the placement is possible"),
    ]
    if "boundary" in values:
        implied.append(
            Constraint(BOUNDARY_AXES & values.keys(), _admits(name, boundary_refusal), "the boundary can be probed")
        )
    if "writer" in values or "steps" in values:
        implied.append(
            Constraint(SERVING_AXES & values.keys(), _admits(name, serving_refusal), "the cache can be written")
        )
    return implied + [_rule_constraint(name, rule) for rule in rules]


def _admits(name: str, refusal: Callable[[Case], str | None]) -> Callable[[Mapping[str, Any]], bool]:
    def holds(values: Mapping[str, Any]) -> bool:
        case = assemble(name, values)
        return case is None or refusal(case) is None

    return holds


def _rule_constraint(name: str, rule: Rule) -> Constraint:
    def holds(values: Mapping[str, Any]) -> bool:
        case = assemble(name, values)
        try:
            return case is None or rule.where.evaluate(case)  # rows without a meaning are ruled out by what is implied
        except ExpressionError as error:
            raise Mistake(rule.span, error.what) from None

    return Constraint(rule.where.axes, holds, f"{rule.where.text} (line {rule.span.line})")


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


def contract_constraints(name: str, values: Values, supported: Supported) -> list[Constraint]:
    """What the contracts of the kernels say about `values`.

    The last constraint is the contract itself, on whole cases. The others only speed up proofs: a contract is a list
    of clauses on one axis each (or on the axes of _COUPLED together), so a value that is outside of it in an otherwise
    admitted case is outside of it in every case.
    """

    def admitted(assignment: Mapping[str, Any]) -> bool:
        case = assemble(name, assignment)
        return case is None or supported(case) is None

    groups = [frozenset({axis}) for axis in values if axis not in _NEVER_ALONE]
    bases = {kernel: _admitted_case(kernel, values, admitted) for kernel in values["kernel"]}

    def clause(group: frozenset[str]) -> Constraint:
        def holds(assignment: Mapping[str, Any]) -> bool:
            base = bases[assignment["kernel"]]
            return base is not None and admitted({**base, **{axis: assignment[axis] for axis in group}})

        return Constraint(group | {"kernel"}, holds)

    return [*(clause(group) for group in (*groups, *_COUPLED)), Constraint(frozenset(values), admitted)]


def _admitted_case(kernel: str, values: Values, admitted: Predicate) -> dict[str, Any] | None:
    """Some assignment that the contract of `kernel` admits: the plainest, else one drawn from `values`, made as plain
    as the contract allows.

    A kernel that admits neither the plain case nor any of 2,000 drawn ones takes no part: None.
    """
    plain = {axis.name: axis.default for axis in AXES.values()} | {"kernel": kernel}
    rng = random.Random(0)
    for attempt in range(2000):
        drawn = {axis: rng.choice((plain[axis], *values[axis])) for axis in values if axis not in ("kernel", "rows")}
        candidate = plain | drawn if attempt else plain
        if admitted(candidate):
            for axis, value in plain.items():
                if admitted({**candidate, axis: value}):
                    candidate[axis] = value
            return candidate
    return None
