"""Covers against brute force: every possible tuple is covered, nothing impossible is asked for, nothing is guessed."""

from __future__ import annotations

import random
from itertools import combinations, product

import pytest

from harness.matrix import cover as cover_module
from harness.matrix.cover import Constraint, CoverError, Model, check, cover


def feasible_tuples(model: Model, t: int) -> set[tuple[tuple[int, int], ...]]:
    """By brute force: all t-tuples of all full assignments that satisfy every constraint."""
    found: set[tuple[tuple[int, int], ...]] = set()
    for row in product(*(range(len(values)) for values in model.values)):
        if model.allows(row, range(len(row))):
            found.update(combinations([(axis, row[axis]) for axis in model.free], model.strength(t)))
    return found


def random_model(seed: int) -> Model:
    rng = random.Random(seed)
    axes = {f"a{i}": range(rng.randint(1, 4)) for i in range(rng.randint(2, 6))}
    constraints = []
    for _ in range(rng.randint(0, 4)):
        names = tuple(rng.sample(sorted(axes), min(len(axes), rng.randint(1, 3))))
        banned = {tuple(rng.choice(axes[name]) for name in names) for _ in range(rng.randint(1, 4))}
        constraints.append(
            Constraint(frozenset(names), lambda v, n=names, b=banned: tuple(v[name] for name in n) not in b)
        )
    return Model(axes, constraints)


@pytest.mark.parametrize("t", [2, 3])
@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_brute_force(seed: int, t: int) -> None:
    model = random_model(seed)
    expected = feasible_tuples(model, t)
    rows = cover(model, t, seed=seed)
    report = check(model, rows, t)
    assert report.missing == ()
    assert report.covered == report.feasible == len(expected)
    assert set(report.impossible) == set(model.tuples(t)) - expected


def large_model() -> Model:
    sizes = [4, 3, 3, 4, 5, 2, 3, 4, 2, 4, 3, 5, 6]
    return Model(
        {f"a{i}": range(size) for i, size in enumerate(sizes)},
        [
            Constraint(frozenset({"a0", "a1"}), lambda v: v["a0"] != 0 or v["a1"] == 1),
            Constraint(frozenset({"a4", "a1"}), lambda v: v["a4"] != 3 or v["a1"] != 1),
            Constraint(frozenset({"a12", "a7", "a8"}), lambda v: v["a12"] < 4 or v["a7"] < 2 or v["a8"] > 0),
            Constraint(frozenset({"a12", "a0"}), lambda v: (v["a12"] + v["a0"]) % 5 != 0),
        ],
    )


@pytest.mark.parametrize(("t", "at_most"), [(2, 60), (3, 300)])
def test_thirteen_axes_are_covered_in_few_rows(t: int, at_most: int) -> None:
    model = large_model()
    rows = cover(model, t)
    report = check(large_model(), rows, t)
    assert report.missing == ()
    assert report.impossible != ()
    assert len(rows) <= at_most


def test_the_same_seed_gives_the_same_rows() -> None:
    assert cover(large_model(), 2, seed=3) == cover(large_model(), 2, seed=3)
    assert cover(large_model(), 2, seed=3) != cover(large_model(), 2, seed=4)


def test_check_finds_a_row_taken_away_and_a_row_that_is_not_allowed() -> None:
    model = large_model()
    rows = cover(model, 2)
    assert check(model, rows[1:], 2).missing != (), "every row was added for a pair that no earlier row had"
    with pytest.raises(ValueError, match="violates a constraint"):
        check(model, [*rows, (0,) * 13], 2)


def test_an_indirect_impossibility_is_proved() -> None:
    """a=0 forces b=0, b=0 forces c=0: the pair (a=0, c=1) breaks no constraint by itself."""
    implies = [
        Constraint(frozenset({"a", "b"}), lambda v: v["a"] or not v["b"]),
        Constraint(frozenset({"b", "c"}), lambda v: v["b"] or not v["c"]),
    ]
    model = Model({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, implies)
    report = check(model, cover(model, 2), 2)
    assert ((0, 0), (2, 1)) in report.impossible
    assert report.missing == ()


def test_nothing_possible_gives_no_row() -> None:
    model = Model({"a": (0, 1), "b": (0, 1)}, [Constraint(frozenset({"a"}), lambda v: False)])
    assert cover(model, 2) == []
    assert Model({"a": (0,)}, []).possible() == (0,)
    assert cover(Model({"a": (0,)}, []), 2) == [(0,)]


def test_what_cannot_be_decided_is_an_error_and_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cover_module, "_QUICK", 5)
    monkeypatch.setattr(cover_module, "_LIMIT", 50)
    names = frozenset(f"a{i}" for i in range(8))
    model = Model(dict.fromkeys(sorted(names), (0, 1)), [Constraint(names, lambda v: False)])
    with pytest.raises(CoverError, match="too entangled"):
        cover(model, 2)


@pytest.mark.parametrize("axes", [frozenset(), frozenset({"another"})])
@pytest.mark.parametrize("holds", [True, False])
def test_a_constraint_on_none_of_the_axes_counts(axes: frozenset[str], holds: bool) -> None:
    model = Model({"a": [0, 1], "b": [0, 1]}, [Constraint(axes, lambda row: holds)])
    assert len(cover(model, 2)) == (4 if holds else 0)
    assert (model.possible() is not None) is holds
