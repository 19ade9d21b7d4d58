"""Covering arrays under constraints: few rows in which every possible t-tuple of axis values occurs.

Invariant: a t-tuple is left out only when a complete search has proved that no full assignment which satisfies all
constraints contains it. `cover` builds rows greedily from a seed; `check` counts them anew, tuple by tuple.
Rows and tuples hold indices into the lists of values; constraints see the values.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from harness.errors import AttnregError

Row = tuple[int, ...]
Tuple = tuple[tuple[int, int], ...]  # (axis, value) pairs, by axis
_QUICK = 400  # steps of the first, randomly ordered attempt
_LIMIT = 1_000_000  # steps of the complete search


class CoverError(AttnregError):
    """The constraints are so entangled that a tuple can neither be completed nor ruled out."""


@dataclass(frozen=True)
class Constraint:
    """A predicate over `axes`; `holds` is given a mapping with at least those. `text` says it to people."""

    axes: frozenset[str]
    holds: Callable[[Mapping[str, Any]], bool]
    text: str = ""


@dataclass(frozen=True)
class Report:
    """What `check` found for strength `t`. `missing` are possible tuples that no row contains."""

    t: int
    covered: int
    missing: tuple[Tuple, ...]
    impossible: tuple[Tuple, ...]

    @property
    def feasible(self) -> int:
        return self.covered + len(self.missing)


class Model:
    """Axes with their values and the constraints among them."""

    def __init__(self, axes: Mapping[str, Sequence[Any]], constraints: Iterable[Constraint]) -> None:
        self.names = tuple(axes)
        self.values = tuple(tuple(axes[name]) for name in self.names)
        self.free = tuple(i for i, values in enumerate(self.values) if len(values) > 1)
        index = {name: i for i, name in enumerate(self.names)}
        self._watching: list[list[int]] = [[] for _ in self.names]
        self._constraints: list[tuple[tuple[int, ...], Constraint, dict[tuple[int | None, ...], bool]]] = []
        for constraint in constraints:
            scope = tuple(sorted(index[name] for name in constraint.axes if name in index))
            if not scope and self.names:
                scope = (0,)  # it holds for every row or for none: any axis tells
            for axis in scope:
                self._watching[axis].append(len(self._constraints))
            self._constraints.append((scope, constraint, {}))
        narrow = [sum(len(self._constraints[c][0]) < len(self.names) for c in w) for w in self._watching]
        self._entangled_first = sorted(range(len(self.names)), key=lambda axis: -narrow[axis])

    def strength(self, t: int) -> int:
        """t, or fewer where fewer axes vary."""
        return min(t, len(self.free))

    def tuples(self, t: int) -> Iterator[Tuple]:
        """All t-tuples over the axes that vary."""
        for axes in combinations(self.free, self.strength(t)):
            for row in product(*(range(len(self.values[axis])) for axis in axes)):
                yield tuple(zip(axes, row, strict=True))

    def assignment(self, row: Row) -> dict[str, Any]:
        return {name: values[i] for name, values, i in zip(self.names, self.values, row, strict=True)}

    def allows(self, row: Sequence[int | None], axes: Iterable[int]) -> bool:
        """Whether every constraint on one of `axes` whose axes are all assigned in `row` holds."""
        numbers = {c for axis in axes for c in self._watching[axis]}
        return all(self._holds(number, row) for number in numbers if None not in self._key(number, row))

    def excluded(
        self, row: list[int | None], axes: Iterable[int], left: Sequence[set[int]]
    ) -> Iterator[tuple[int, int]]:
        """(axis, value) pairs out of `left`, the values of each axis, that constraints on one of `axes` rule out: those
        with a single axis that `row` does not assign.
        """
        for number in {c for axis in axes for c in self._watching[axis]}:
            key = self._key(number, row)
            if key.count(None) == 1:
                axis = self._constraints[number][0][key.index(None)]
                for value in [*left[axis]]:
                    row[axis] = value
                    if not self._holds(number, row):
                        yield axis, value
                row[axis] = None

    def _key(self, number: int, row: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple([row[axis] for axis in self._constraints[number][0]])

    def _holds(self, number: int, row: Sequence[int | None]) -> bool:
        """Of a constraint whose axes are all assigned."""
        scope, constraint, known = self._constraints[number]
        key = tuple([row[axis] for axis in scope])
        if key not in known:
            chosen = {self.names[axis]: self.values[axis][value] for axis in scope if (value := row[axis]) is not None}
            known[key] = constraint.holds(chosen)
        return known[key]

    def possible(self, fixed: Tuple = ()) -> Row | None:
        """Some full row that contains `fixed`, or None: proof that there is none."""
        search = _Search(self, self._entangled_first, None, _LIMIT)
        return search.run(fixed)

    def complete(self, fixed: Tuple, rng: random.Random, gain: Gain) -> Row | None:
        """As `possible`, preferring values of high gain; a short random attempt, then the complete search."""
        order = list(range(len(self.names)))
        rng.shuffle(order)
        try:
            return _Search(self, order, gain, _QUICK).run(fixed)
        except CoverError:
            return _Search(self, self._entangled_first, gain, _LIMIT).run(fixed)


Gain = Callable[[int, Sequence[int | None]], list[int]]  # (axis, row so far) -> values, best first


class _Search:
    """Depth first over the axes in `order`, but axes with one value left at once; CoverError after `limit` steps.

    Of every axis it keeps the values that no constraint excludes yet, and turns back where one has none left: an
    entanglement shows as soon as all but one of its axes are assigned.
    """

    def __init__(self, model: Model, order: Sequence[int], gain: Gain | None, limit: int) -> None:
        self.model, self.order, self.gain, self.steps = model, order, gain, limit

    def run(self, fixed: Tuple) -> Row | None:
        row: list[int | None] = [None] * len(self.model.names)
        for axis, value in fixed:
            row[axis] = value
        left = [set(range(len(values))) for values in self.model.values]
        axes = [axis for axis, _ in fixed]
        if not self.model.allows(row, axes) or self._narrow(row, range(len(row)), left) is None:
            return None
        rest = [axis for axis in self.order if row[axis] is None]
        return tuple(v for v in row if v is not None) if self._extend(row, rest, left) else None

    def _extend(self, row: list[int | None], rest: list[int], left: list[set[int]]) -> bool:
        if not rest:
            return True
        axis = next((axis for axis in rest if len(left[axis]) == 1), rest[0])
        others = [other for other in rest if other != axis]
        for value in self.gain(axis, row) if self.gain and len(left[axis]) > 1 else sorted(left[axis]):
            if value not in left[axis]:
                continue
            self.steps -= 1
            if self.steps < 0:
                raise CoverError("the constraints are too entangled to tell which combinations are possible")
            row[axis] = value
            if (removed := self._narrow(row, (axis,), left)) is not None:
                if self._extend(row, others, left):
                    return True
                for other, gone in removed:
                    left[other].add(gone)
        row[axis] = None
        return False

    def _narrow(self, row: list[int | None], axes: Iterable[int], left: list[set[int]]) -> list[tuple[int, int]] | None:
        """Take from `left` what `row` excludes by constraints on `axes`: what was taken; None, and nothing taken, where
        that is all of some axis.
        """
        removed: list[tuple[int, int]] = []
        for axis, value in self.model.excluded(row, axes, left):
            left[axis].discard(value)
            removed.append((axis, value))
            if not left[axis]:
                row[axis] = None
                for other, gone in removed:
                    left[other].add(gone)
                return None
        return removed


def cover(model: Model, t: int, seed: int = 0, candidates: int = 4) -> list[Row]:
    """Rows that contain every possible t-tuple of `model`, none of them superfluous at the time it was added.

    The same arguments give the same rows on every machine. No row at all means that nothing is possible.
    """
    rng = random.Random(seed)
    size = model.strength(t)
    if size == 0:
        only = model.possible()
        return [] if only is None else [only]
    bits = _literals(model)
    todo = {sum(bits[axis][value] for axis, value in pairs): pairs for pairs in model.tuples(t)}
    rows: list[Row] = []
    while todo:
        mask, target = next(iter(todo.items()))
        best: tuple[int, Row] | None = None
        for _ in range(candidates):
            row = model.complete(target, rng, _gain(model, bits, todo, size, rng))
            if row is None:
                break
            score = sum(m in todo for m in _masks(model, bits, row, size))
            if best is None or score > best[0]:
                best = (score, row)
        if best is None:
            del todo[mask]
            continue
        rows.append(best[1])
        for covered in _masks(model, bits, best[1], size):
            todo.pop(covered, None)
    return rows


def check(model: Model, rows: Iterable[Row], t: int) -> Report:
    """Count anew: which t-tuples the rows contain, which are missing, which are proved impossible.

    Raises ValueError for a row that violates a constraint.
    """
    seen: set[Tuple] = set()
    for row in rows:
        if not model.allows(row, range(len(row))):
            raise ValueError(f"row {model.assignment(row)} violates a constraint")
        seen.update(combinations([(axis, row[axis]) for axis in model.free], model.strength(t)))
    missing: list[Tuple] = []
    impossible: list[Tuple] = []
    for pairs in model.tuples(t):
        if pairs not in seen:
            (impossible if model.possible(pairs) is None else missing).append(pairs)
    return Report(model.strength(t), len(seen), tuple(missing), tuple(impossible))


def _literals(model: Model) -> dict[int, list[int]]:
    """One bit per (axis, value): a tuple is the sum of its bits, so looking one up is one set access."""
    position = 0
    bits: dict[int, list[int]] = {}
    for axis in model.free:
        count = len(model.values[axis])
        bits[axis] = [1 << (position + i) for i in range(count)]
        position += count
    return bits


def _masks(model: Model, bits: Mapping[int, list[int]], row: Row, size: int) -> Iterator[int]:
    return (sum(chosen) for chosen in combinations([bits[axis][row[axis]] for axis in model.free], size))


def _gain(
    model: Model, bits: Mapping[int, list[int]], todo: Mapping[int, Tuple], size: int, rng: random.Random
) -> Gain:
    """Orders the values of an axis by how many tuples still to do they would complete; ties at random."""

    def order(axis: int, row: Sequence[int | None]) -> list[int]:
        values = list(range(len(model.values[axis])))
        if axis not in bits:
            return values
        chosen = [bits[other][value] for other in model.free if (value := row[other]) is not None and other != axis]
        rests = [sum(rest) for rest in combinations(chosen, size - 1)]
        rng.shuffle(values)
        score = {v: sum((bits[axis][v] | rest) in todo for rest in rests) for v in values}
        return sorted(values, key=lambda v: -score[v])

    return order
