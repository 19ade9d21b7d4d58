"""What is wrong with the combinations that a tier of a matrix asks for, contracts of kernels aside.

Invariant: a matrix that passes has, in every tier and entry, some case for every value it lists there, and no more
combinations than can be told apart in seconds. What is told is the narrowest reason: a value that is never possible,
else one constraint, else all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, product
from typing import Any

from harness.case import Case
from harness.matrix.constraints import (
    BOUNDARY_AXES,
    DESCALE_AXES,
    LAW_AXES,
    LAYOUT_AXES,
    PLACEMENT_AXES,
    SERVING_AXES,
    assemble,
    constraints,
)
from harness.matrix.cover import Constraint, CoverError, Model
from harness.matrix.expand import TUPLES, entry_values, spell, tier_values
from harness.matrix.matrix import Matrix, Tier, Values
from harness.matrix.rows import ROWS_AXES
from harness.matrix.source import Mistake, Span
from harness.problem.admission import (
    descales_refusal,
    law_refusal,
    layout_refusal,
    placement_refusal,
    serving_refusal,
)
from harness.problem.boundary import boundary_refusal

MAX_COMBINATIONS = 250_000  # of a product, or tuples of a cover
Spans = Mapping[tuple[str, Any], Span]


def check_tier(matrix: Matrix, tier: Tier) -> Iterator[Mistake]:
    """What is wrong with the combinations of `tier`; nothing is multiplied out before their number is known."""
    if tier.cover is not None or tier.full:
        where = f"tier '{tier.name}'"
        yield from _check_part(matrix, tier_values(matrix, tier), where, tier.span, matrix.spans, tier.cover)
    for entry in tier.entries:
        where = f"the entry on line {entry.span.line}"
        yield from _check_part(matrix, entry_values(matrix, tier, entry.values), where, entry.span, {}, None)


def _check_part(
    matrix: Matrix, values: Values, where: str, span: Span, spans: Spans, cover: int | None
) -> Iterator[Mistake]:
    """What is wrong with one cover (of strength `cover`) or product (None)."""
    if too_many := _too_many(values, cover):
        yield Mistake(span, f"{where} {too_many}")
    else:
        yield from _check_values(matrix, values, where, span, spans)


def _too_many(values: Values, cover: int | None) -> str | None:
    """Why a cover or product would be too large to go through, or None."""
    sizes = [len(several) for several in values.values() if len(several) > 1]
    if cover is None:
        amount, what, advice = math.prod(sizes), "combinations", "cover: 2 or 3 takes few of them"
    else:
        strength = min(cover, len(sizes))
        amount, what = sum(map(math.prod, combinations(sizes, strength))), TUPLES[strength]
        advice = "shrink some axis"
    if amount <= MAX_COMBINATIONS:
        return None
    return (
        f"has {amount:,} {what} before constraints, more than the {MAX_COMBINATIONS:,} that are gone through: {advice}"
    )


def _check_values(matrix: Matrix, values: Values, where: str, span: Span, spans: Spans) -> Iterator[Mistake]:
    """The narrowest reasons: single values that are never possible; else one constraint; else all of them."""
    if values["rows"] == (None,):
        yield Mistake(span, f"{where} has no rows: give the axis 'rows' a row mix")
        return
    never = [
        *_indivisible(values, where, span, spans),
        *_meaningless_rows(matrix, values, where, span, spans),
        *_refused(matrix, values, where, span, spans),
    ]
    yield from never
    if never:
        return
    for rule in matrix.rules:
        if Model(values, constraints(matrix.name, [rule], values)).possible() is None:
            place = rule.span if spans else span  # an entry breaks a constraint; a whole tier is broken by one
            yield Mistake(place, f"the constraint excludes every case of {where}: {rule.where.text}")
            return
    if Model(values, constraints(matrix.name, matrix.rules, values)).possible() is None:
        yield Mistake(span, f"{where} selects no case: the constraints together exclude every combination")
        return
    yield from _emptied(matrix, values, where, span, spans)


def _emptied(matrix: Matrix, values: Values, where: str, span: Span, spans: Spans) -> Iterator[Mistake]:
    """Values that are listed among others and that constraints, written or implied, leave in no case."""
    every = constraints(matrix.name, matrix.rules, values)
    model = Model(values, every)
    met: set[tuple[int, int]] = set()
    for axis in model.free:
        name = model.names[axis]
        for number, value in enumerate(model.values[axis]):
            if (axis, number) in met:
                continue
            what, place = f"no case of {where} has {name} {spell(value)}", spans.get((name, value), span)
            if alone := next((c for c in every if _excludes(c, every, values, name, value)), None):
                yield Mistake(place, f"{what}: excluded by the constraint {alone.text}")
                continue
            try:
                row = model.possible(((axis, number),))
            except CoverError:
                continue  # neither proved nor refuted: a cover says so itself
            if row is None:
                yield Mistake(place, f"{what}: the constraints together exclude it")
            else:
                met.update(enumerate(row))


def _excludes(one: Constraint, every: list[Constraint], values: Values, name: str, value: object) -> bool:
    """Whether `one`, with those on no other axes than its own, leaves no combination of these axes with `value`."""
    if name not in one.axes or len(one.axes) == len(values):
        return False
    mine = {axis: (value,) if axis == name else several for axis, several in values.items() if axis in one.axes}
    return Model(mine, [one, *(c for c in every if c.axes < one.axes)]).possible() is None


def _indivisible(values: Values, where: str, span: Span, spans: Spans) -> Iterator[Mistake]:
    heads = values["num_q_heads"]
    for ratio in values["gqa_ratio"]:
        if all(head % ratio for head in heads):
            what = f"gqa_ratio {ratio} does not divide num_q_heads {_list(heads)} of {where}"
            yield Mistake(spans.get(("gqa_ratio", ratio), span), what)


def _meaningless_rows(matrix: Matrix, values: Values, where: str, span: Span, spans: Spans) -> Iterator[Mistake]:
    for mix in values["rows"]:
        if not any(assemble(matrix.name, chosen) for chosen in _products(values, ROWS_AXES, rows=mix)):
            pages, windows = _list(values["page_size"]), _list(values["sliding_window"])
            what = f"row mix '{mix.name}' has no valid lengths with page_size {pages} and sliding_window {windows}"
            yield Mistake(spans.get(("rows", mix), span), f"{what} of {where}")


def _refused(matrix: Matrix, values: Values, where: str, span: Span, spans: Spans) -> Iterator[Mistake]:
    told: set[str] = set()
    for axis, axes, refusal in (
        ("data", LAW_AXES, law_refusal),
        ("descales", DESCALE_AXES, descales_refusal),
        ("layout", LAYOUT_AXES, layout_refusal),
        ("placement", PLACEMENT_AXES, placement_refusal),
        ("num_pages", PLACEMENT_AXES, placement_refusal),
        ("boundary", BOUNDARY_AXES, boundary_refusal),
        ("writer", SERVING_AXES, serving_refusal),
        ("steps", SERVING_AXES, serving_refusal),
    ):
        for value in values.get(axis, ()):
            tried = (
                assemble(matrix.name, chosen) for chosen in _products(values, axes & values.keys(), **{axis: value})
            )
            reason = _refused_all(tried, refusal)
            if reason and reason not in told:  # one that two axes share is told at the first
                told.add(reason)
                what = f"{reason} (in every combination of {where})"
                yield Mistake(spans.get((axis, value), span), what)


def _refused_all(cases: Iterable[Case | None], refusal: Callable[[Case], str | None]) -> str | None:
    """The first reason, if each of `cases` (None: no case) is refused."""
    first = None
    for case in cases:
        if case is not None:
            reason = refusal(case)
            if reason is None:
                return None
            first = first or reason
    return first


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(spell, values))


def _products(values: Values, axes: frozenset[str], **given: object) -> Iterator[dict[str, Any]]:
    """All combinations of `values` over `axes`, those of `given` held."""
    names = sorted(axes)
    for row in product(*((given[name],) if name in given else values[name] for name in names)):
        yield dict(zip(names, row, strict=True))
