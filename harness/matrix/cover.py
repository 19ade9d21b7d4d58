"""Covering arrays under constraints: few rows in which every possible t-tuple of axis values occurs.

Invariant: a t-tuple is left out only when a complete search has proved that no full assignment which satisfies all
constraints contains it. `cover` builds rows greedily from a seed; `check` counts them anew, tuple by tuple.
Rows and tuples hold indices into the lists of values; constraints see the values.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from harness.errors import AttnregError

Row = tuple[int, ...]
Tuple = tuple[tuple[int, int], ...]  # (axis, value) pairs, by axis
Key = tuple[int | None, ...]  # values of the axes of a constraint
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


@dataclass(frozen=True)
class _Watched:
    """A constraint over the axes of `scope`, and what is known of it by their values in a row."""

    scope: tuple[int, ...]
    mask: int  # of the bits of its axes
    holds: Callable[[Sequence[int | None]], bool]
    known: dict[Key, bool] = field(default_factory=dict)
    barred: dict[Key, tuple[int, ...]] = field(default_factory=dict)  # by keys with one None: values that break it


class Model:
    """Axes with their values and the constraints among them."""

    def __init__(self, axes: Mapping[str, Sequence[Any]], constraints: Iterable[Constraint]) -> None:
        self.names = tuple(axes)
        self.values = tuple(tuple(axes[name]) for name in self.names)
        self.free = tuple(i for i, values in enumerate(self.values) if len(values) > 1)
        self._watching: list[list[_Watched]] = [[] for _ in self.names]
        for constraint in constraints:
            scope = tuple(i for i, name in enumerate(self.names) if name in constraint.axes)
            if not scope and self.names:
                scope = (0,)  # it holds for every row or for none: any axis tells
            watched = _Watched(scope, _mask(scope), self._on_rows(constraint, scope))
            for axis in scope:
                self._watching[axis].append(watched)
        narrow = [sum(len(w.scope) < len(self.names) for w in watching) for watching in self._watching]
        self._entangled_first = sorted(range(len(self.names)), key=lambda axis: -narrow[axis])

    def _on_rows(self, constraint: Constraint, scope: tuple[int, ...]) -> Callable[[Sequence[int | None]], bool]:
        named = [(axis, self.names[axis], self.values[axis]) for axis in scope]
        return lambda row: constraint.holds(
            {name: values[value] for axis, name, values in named if (value := row[axis]) is not None}
        )

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
        for watched in {id(w): w for axis in axes for w in self._watching[axis]}.values():
            key = tuple([row[axis] for axis in watched.scope])
            if None not in key:
                if key not in watched.known:
                    watched.known[key] = watched.holds(row)
                if not watched.known[key]:
                    return False
        return True

    def excluded(self, row: list[int | None], axes: Iterable[int], unassigned: int) -> Iterator[tuple[int, int]]:
        """(axis, value) pairs that constraints on one of `axes` rule out: those with a single axis among the bits of
        `unassigned`, the axes that `row` does not assign. A pair may come twice.
        """
        for axis in axes:
            for watched in self._watching[axis]:
                gap = watched.mask & unassigned
                if gap and not gap & (gap - 1):
                    key = tuple([row[a] for a in watched.scope])
                    last = gap.bit_length() - 1
                    if (barred := watched.barred.get(key)) is None:
                        barred = watched.barred[key] = self._barred(watched, row, last)
                    for value in barred:
                        yield last, value

    def _barred(self, watched: _Watched, row: list[int | None], last: int) -> tuple[int, ...]:
        found = []
        for value in range(len(self.values[last])):
            row[last] = value
            if not watched.holds(row):
                found.append(value)
        row[last] = None
        return tuple(found)

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
        rest = [axis for axis in self.order if row[axis] is None]
        axes, unassigned = [axis for axis, _ in fixed], _mask(rest)
        if not self.model.allows(row, axes) or self._narrow(row, range(len(row)), unassigned, left) is None:
            return None
        return tuple(v for v in row if v is not None) if self._extend(row, rest, unassigned, left) else None

    def _extend(self, row: list[int | None], rest: list[int], unassigned: int, left: list[set[int]]) -> bool:
        if not rest:
            return True
        axis = next((axis for axis in rest if len(left[axis]) == 1), rest[0])
        others = [other for other in rest if other != axis]
        unassigned &= ~(1 << axis)
        for value in self.gain(axis, row) if self.gain and len(left[axis]) > 1 else sorted(left[axis]):
            if value not in left[axis]:
                continue
            self.steps -= 1
            if self.steps < 0:
                raise CoverError("the constraints are too entangled to tell which combinations are possible")
            row[axis] = value
            if (removed := self._narrow(row, (axis,), unassigned, left)) is not None:
                if self._extend(row, others, unassigned, left):
                    return True
                for other, gone in removed:
                    left[other].add(gone)
        row[axis] = None
        return False

    def _narrow(
        self, row: list[int | None], axes: Iterable[int], unassigned: int, left: list[set[int]]
    ) -> list[tuple[int, int]] | None:
        """Take from `left` what `row` excludes by constraints on `axes`: what was taken; None, and nothing taken, where
        that is all of some axis.
        """
        removed: list[tuple[int, int]] = []
        for axis, value in self.model.excluded(row, axes, unassigned):
            if value in left[axis]:
                left[axis].discard(value)
                removed.append((axis, value))
                if not left[axis]:
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
    wanted: dict[int, int] = {}  # part of a tuple to do -> the bits that complete it
    for mask in todo:
        for bit in _bits(mask):
            wanted[mask ^ bit] = wanted.get(mask ^ bit, 0) | bit
    rows: list[Row] = []
    while todo:
        mask, target = next(iter(todo.items()))
        best: tuple[int, Row] | None = None
        for _ in range(candidates):
            row = model.complete(target, rng, _gain(model, bits, wanted, size, rng))
            if row is None:
                break
            score = sum(m in todo for m in _masks(model, bits, row, size))
            if best is None or score > best[0]:
                best = (score, row)
        if best is not None:
            rows.append(best[1])
        for covered in [mask] if best is None else _masks(model, bits, best[1], size):
            if todo.pop(covered, None) is not None:
                for bit in _bits(covered):
                    wanted[covered ^ bit] ^= bit
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


def _mask(axes: Iterable[int]) -> int:
    return sum(1 << axis for axis in axes)


def _bits(mask: int) -> Iterator[int]:
    """The bits of `mask`, lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _gain(
    model: Model, bits: Mapping[int, list[int]], wanted: Mapping[int, int], size: int, rng: random.Random
) -> Gain:
    """Orders the values of an axis by how many tuples still to do they would complete; ties at random."""

    def order(axis: int, row: Sequence[int | None]) -> list[int]:
        values = list(range(len(model.values[axis])))
        chosen = [bits[other][value] for other in model.free if (value := row[other]) is not None]
        among = sum(chosen)
        rests = [sum(rest) for rest in combinations(chosen, size - 2)] if size > 1 else []

        def score(value: int) -> int:  # counts each tuple size - 1 times
            bit = bits[axis][value]
            if size == 1:
                return int(bit & wanted.get(0, 0) > 0)
            return sum((wanted.get(bit | rest, 0) & among).bit_count() for rest in rests)

        rng.shuffle(values)
        scores = {value: score(value) for value in values}
        return sorted(values, key=lambda value: -scores[value])

    return order
