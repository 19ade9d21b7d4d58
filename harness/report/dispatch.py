"""How a sweep spreads over the branches of dispatches, as lines of text. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from harness.dispatch.sweep import Sweep
from harness.report.lines import WIDTH, Line, labelled, line, to_text


def render_sweeps(sweeps: Sequence[Sweep], *, every_case: bool, width: int = WIDTH) -> str:
    """A block per kernel: what each branch leads to and how many cases take it, an example or all of them."""
    return to_text([one for sweep in sweeps for one in _block(sweep, every_case, width)]) + "\n"


def _block(sweep: Sweep, every_case: bool, width: int) -> list[Line]:
    branches = sweep.predicate.branches
    where = f" on {sweep.platform}" if sweep.platform else ""
    reached = f"{sum(branch in sweep.taken for branch in branches)} of {len(branches)} branches reached"
    if sweep.decided_by_machine:
        reached = "no case has a choice"
    lines = [line(f"{sweep.kernel}{where}, dispatch {sweep.predicate.name}: {reached}")]
    order = [*branches, *(branch for branch in sweep.taken if branch not in branches)]
    for branch in (branch for branch in order if branch in sweep.taken):
        ids, decided = sweep.taken[branch], sweep.decisions[branch]
        shown = ids if every_case else [f"e.g. {ids[0]}"]
        lines += labelled(
            branch, [f"{decided.because}: {', '.join(decided.kernels)}, {_cases(len(ids))}", *shown], width
        )
    for branch, because in sweep.explained.items():
        lines += labelled(branch, [f"{because}: left out, as stated"], width)
    for branch, words in sweep.unreached.items():
        lines += labelled(branch, [f"{words}: never"], width, "yellow")
    if sweep.not_asked:
        lines += labelled("not asked", [_cases(len(sweep.not_asked)), *(sweep.not_asked if every_case else ())], width)
    return lines


def _cases(amount: int) -> str:
    return f"{amount:,} case{'' if amount == 1 else 's'}"
