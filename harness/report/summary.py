"""The end of a run: a quiet table per matrix, distinct failures, and one line of totals.

Invariant: every record is in the totals, every failure is named (in a block, beside one like it, or on a line of its
own), and numbers come from harness.store.tally and harness.triage.distinct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.report.failure import failure_lines, one_line, outcome_style
from harness.report.lines import WIDTH, Line, Span, labelled, line, wrap
from harness.run.outcome import Outcome
from harness.store.branches import Reach
from harness.store.record import Header, Record
from harness.store.tally import MatrixTally, Totals, tally_matrices, tally_totals
from harness.store.tightness import not_tight
from harness.triage.distinct import Group, group_failures

LATEST = "reports/latest.jsonl"
MAX_BLOCKS = 10
MAX_ALIKE = 12  # ids named below a block

WORDS: dict[Outcome, tuple[str, str]] = {  # outcome -> (one, many), in the order of the totals
    Outcome.FAIL: ("failed", "failed"),
    Outcome.TEST_BUG: ("test bug", "test bugs"),
    Outcome.CRASH: ("crashed", "crashed"),
    Outcome.TIMEOUT: ("timed out", "timed out"),
    Outcome.OUT_OF_MEMORY: ("out of memory", "out of memory"),
    Outcome.NONDETERMINISTIC: ("nondeterministic", "nondeterministic"),
    Outcome.ERROR: ("harness error", "harness errors"),
    Outcome.XPASS: ("against expectation", "against expectation"),
    Outcome.PASS: ("passed", "passed"),
    Outcome.ELEVATED: ("elevated over its twin", "elevated over their twins"),
    Outcome.XFAIL: ("failed as expected", "failed as expected"),
    Outcome.UNSUPPORTED: ("unsupported", "unsupported"),
    Outcome.BLIND: ("blind", "blind"),
}
ALWAYS_NAMED = (Outcome.PASS, Outcome.BLIND)


@dataclass(frozen=True)
class CoverageLine:
    """What the table says about the coverage of a matrix, e.g. "pairs 100 %"; `total` where only some cases ran."""

    text: str
    complete: bool = True
    total: int | None = None  # cases of the tier


def summary_lines(
    records: Sequence[Record],
    header: Header,
    coverage: Mapping[str, CoverageLine],
    log_path: str = LATEST,
    width: int = WIDTH,
    reach: Sequence[Reach] = (),
) -> list[Line]:
    """The table, branches of dispatches, what was planted, and the totals. coverage: by matrix name."""
    lines = _table(tally_matrices(records), coverage)
    if header.options.get("no_contract_checks"):
        lines += labelled(
            "unchecked", ["contract checks were off: set-up faults reach the kernel"], width, "bold magenta"
        )
    if header.options.get("no_access_trace"):
        lines += labelled("untraced", ["what kernels read was not held against their contracts"], width, "bold magenta")
    if header.plants:
        lines += labelled("planted", [", ".join(header.plants)], width, "bold magenta")
    for one in reach:
        lines += labelled("dispatch", [f"{one.kernel}: {one.text}"], width, "yellow" if one.wrong else "")
    for profile in not_tight(records):
        lines += labelled("numerics", [f"{profile.kernel} {profile.dtype}: {profile.text}"], width, "yellow")
    return lines + _totals(tally_totals(records), log_path, width)


def failures_lines(records: Sequence[Record], max_blocks: int = MAX_BLOCKS, width: int = WIDTH) -> list[Line]:
    """A block per distinct failure, the ids of those like it below; after `max_blocks` blocks a line per failure."""
    groups = group_failures(records)
    lines: list[Line] = []
    for group in groups[:max_blocks]:
        lines += [*failure_lines(group.example, width), *_alike(group, width), line("")]
    left = [record for group in groups[max_blocks:] for record in group.records]
    warnings = [record for record in records if record.outcome is Outcome.ELEVATED]
    for record in warnings[:max_blocks]:
        lines += [*failure_lines(record, width), line("")]
    left += warnings[max_blocks:]
    if left:
        lines += [*(one_line(record) for record in left), line("")]
    return lines


def _table(tallies: Sequence[MatrixTally], coverage: Mapping[str, CoverageLine]) -> list[Line]:
    rows = []
    for tally in tallies:
        covered = coverage.get(tally.matrix, CoverageLine(""))
        worst = "" if tally.worst is None else f"worst {tally.worst:.2f} of tolerance"
        rows.append(
            (
                Span(tally.matrix, "green" if not tally.failures else "red"),
                Span(_cases(tally.cases, covered.total), "" if covered.total is None else "yellow"),
                Span(_plural(tally.kernels, "kernel")),
                Span(covered.text, "" if covered.complete else "yellow"),
                Span(worst, "red" if tally.worst is not None and tally.worst > 1 else ""),
                Span(_seconds(tally.seconds)),
            )
        )
    if not rows:
        return []
    widths = [max(len(row[i].text) for row in rows) for i in range(len(rows[0]))]
    kept = [i for i, column in enumerate(widths) if column]
    return [_aligned(row, widths, kept) for row in rows]


def _aligned(row: Sequence[Span], widths: Sequence[int], kept: Sequence[int]) -> Line:
    """Columns two blanks apart; counts and seconds to the right."""
    spans = []
    for i in kept:
        text = row[i].text
        spans.append(Span(text.rjust(widths[i]) if i in (1, 2, 5) else text.ljust(widths[i]), row[i].style))
        spans.append(Span("  "))
    return Line(tuple(spans[:-1]))


def _totals(totals: Totals, log_path: str, width: int) -> list[Line]:
    parts = []
    for outcome, (one, many) in WORDS.items():
        amount = totals.outcomes[outcome]
        if not amount and outcome not in ALWAYS_NAMED:
            continue
        detail = ""
        if outcome is Outcome.UNSUPPORTED:
            by_kernel = [f"{kernel}: {', '.join(clauses)}" for kernel, clauses in totals.unsupported.items()]
            detail = f" ({'; '.join(by_kernel)})"
        parts.append(f"{amount:,} {one if amount == 1 else many}{detail}")
    style = outcome_style(Outcome.FAIL) if totals.failures else outcome_style(Outcome.PASS)
    text = ", ".join(parts) + "."
    if len(text) + 2 + len(log_path) <= width:
        return [line(Span(text, style), "  ", Span(log_path, "dim"))]
    return [*(line(Span(piece, style)) for piece in wrap(text, width)), line(Span(log_path, "dim"))]


def _alike(group: Group, width: int) -> list[Line]:
    """The ids of the group behind its example, what they share at the start said once."""
    others = [record.id for record in group.records[1:]]
    if not others:
        return []
    shared = _shared_start(others) if len(others) > 1 else ""
    named = ", ".join(one.removeprefix(shared) or "(itself)" for one in others[:MAX_ALIKE])
    left = len(others) - MAX_ALIKE
    listed = (f"{shared}... " if shared else "") + named + (f" and {left} more" if left > 0 else "")
    return [line(Span(f"and {len(others)} more like it:", "bold")), *labelled("", [listed], width)]


def _shared_start(ids: Sequence[str]) -> str:
    """The longest common start that ends at a hyphen."""
    shared = ids[0]
    for one in ids:
        while not one.startswith(shared):
            shared = shared[:-1]
    return shared[: shared.rfind("-") + 1]


def _cases(ran: int, total: int | None) -> str:
    return _plural(ran, "case") if total is None else f"{ran:,} of {_plural(total, 'case')}"


def _plural(amount: int, name: str) -> str:
    return f"{amount:,} {name}{'' if amount == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
