"""Reach of a dispatch: a full run is wrong where a branch was neither reached nor explained, any where it was both."""

from __future__ import annotations

from harness.run.outcome import Outcome
from harness.store.branches import Reach, reach
from harness.store.record import Record

BRANCHES = {"k": {"all_hold": "every condition holds", "window": "a window is given", "sinks": "sinks are given"}}


def record(kernel: str, branch: str) -> Record:
    return Record("id", "m", "m.yaml", 1, "smoke", kernel, Outcome.PASS, "", branch=branch)


def of(*branches: str, explained: tuple[tuple[str, str, str], ...] = (), complete: bool = True) -> Reach:
    records = [record("k", branch) for branch in branches] + [record("plain", "")]
    (found,) = reach(records, BRANCHES, explained, complete=complete)
    return found


def test_every_branch_reached_is_right() -> None:
    found = of("all_hold", "window", "window", "sinks")
    assert not found.wrong
    assert found.taken == {"all_hold": 1, "window": 2, "sinks": 1}
    assert found.text == "3 of 3 branches reached"


def test_a_branch_that_nobody_took_is_wrong_in_a_full_run_and_named_in_any() -> None:
    assert of("all_hold", "window").wrong
    partial = of("all_hold", "window", complete=False)
    assert not partial.wrong
    assert partial.text == "2 of 3 branches reached by what ran; never: sinks (sinks are given)"


def test_an_explained_branch_is_right_until_it_is_reached_after_all() -> None:
    why = (("k", "sinks", "no model has them"), ("other", "sinks", "elsewhere"))
    left_out = of("all_hold", "window", explained=why)
    assert not left_out.wrong
    assert left_out.text == "2 of 3 branches reached; never: sinks (explained: no model has them)"
    for complete in (True, False):
        assert of("all_hold", "window", "sinks", explained=why, complete=complete).wrong


def test_a_kernel_none_of_whose_cases_was_launched_has_no_reach() -> None:
    assert reach([record("k", "")], BRANCHES, (), complete=True) == []
