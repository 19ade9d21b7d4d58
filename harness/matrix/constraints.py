"""The constraints on cases: those that a matrix writes, those implied, and what the contracts of kernels say.

Implied: gqa_ratio divides num_q_heads; a row mix has a meaning for the page size and window at hand; the data law, the
descales, the layout, the placement, a boundary and a writer can keep their promise (harness.problem.admission).

Invariant: a constraint looks at its axes alone, whatever the others are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from harness.case import Case, Rows
from harness.matrix.axes import AXES
from harness.matrix.cover import Constraint
from harness.matrix.expression import ExpressionError
from harness.matrix.matrix import Rule, Supported, Values
from harness.matrix.rows import ROWS_AXES, RowMix
from harness.matrix.source import Mistake
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
Predicate = Callable[[Mapping[str, Any]], bool]
_STORED = frozenset({"dtype", "kv_dtype", "q_dtype"})
_DESCALED = frozenset({"descales_per", "page_size"})
_COUPLED = (frozenset({"head_size", "head_size_v"}), _STORED, _DESCALED, ROWS_AXES)  # one clause looks at them together
_NEVER_ALONE = _STORED | {"kernel", "rows", "head_size_v", "descales_per"}


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
