"""The block of one record that is not a plain PASS: what is wrong, where, how much, how to run it again.

Invariant: every row of the explanation is printed, none is computed here; the Reproduce line is never wrapped, so
that it can be copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.report.lines import INDENT, LABEL_WIDTH, WIDTH, Line, Span, labelled, line
from harness.run.outcome import Outcome
from harness.store.record import Record

STYLES: dict[Outcome, str] = {
    Outcome.PASS: "green",
    Outcome.TEST_BUG: "bold magenta",
    Outcome.BLIND: "bold yellow",
    Outcome.ELEVATED: "bold yellow",
    Outcome.UNSUPPORTED: "cyan",
    Outcome.XFAIL: "cyan",
}
FAILURE_STYLE = "bold red"

# What the reason is called where the explanation has no rows that say more.
REASON_LABELS: dict[Outcome, str] = {
    Outcome.TEST_BUG: "before launch",
    Outcome.UNSUPPORTED: "not admitted",
    Outcome.XFAIL: "expected",
    Outcome.ERROR: "harness",
}

FIRST_ROWS = (
    "before launch",
    "raised",
    "message",
    "at",
    "violates",
    "wrong",
    "how much",
    "lse",
    "of these",
    "not",
    "token/page",
    "looks like",
)
LAST_ROWS = ("seen",)
EMPHASISED = ("before launch", "raised", "violates", "wrong")
SHADES = ".-+*#"  # none, up to a third, up to two thirds, more, all


def failure_lines(record: Record, width: int = WIDTH) -> list[Line]:
    """The whole block. Rows have a fixed order; rows that are not known here keep theirs, before the last ones."""
    explanation = record.explanation or {}
    rows: Mapping[str, Sequence[str]] = explanation.get("rows") or {_reason_label(record.outcome): [record.reason]}
    lines = [*_title(record, width), *_ran(record, width)]
    for label in _ordered(rows):
        emphasis = "bold" if label in EMPHASISED else ""
        lines += labelled(label, rows[label], width, emphasis)
    lines += _heat(explanation.get("heat") or [])
    lines += [line(INDENT, Span(text, "dim")) for text in explanation.get("traceback") or []]
    if record.reproduce:
        lines.append(line(Span("Reproduce: ", "bold"), record.reproduce))
    return lines


def one_line(record: Record) -> Line:
    """The record on one line that is enough to act on."""
    summary = (record.explanation or {}).get("summary") or record.reason
    return line(_outcome(record.outcome), f"  {record.id}  {summary}")


def outcome_style(outcome: Outcome) -> str:
    return STYLES.get(outcome, FAILURE_STYLE)


def _outcome(outcome: Outcome) -> Span:
    return Span(outcome.value, outcome_style(outcome))


def _reason_label(outcome: Outcome) -> str:
    return REASON_LABELS.get(outcome, "why")


def _ordered(rows: Mapping[str, Sequence[str]]) -> list[str]:
    first = [label for label in FIRST_ROWS if label in rows]
    last = [label for label in LAST_ROWS if label in rows]
    return first + [label for label in rows if label not in FIRST_ROWS + LAST_ROWS] + last


def _title(record: Record, width: int) -> list[Line]:
    """Outcome, id and place in the matrix file; the place goes to the right, or below where the id leaves no room."""
    place = f"{record.matrix_path}:{record.line}"
    title = f"{record.outcome.value}  {record.id}"
    spans = (_outcome(record.outcome), Span("  "), Span(record.id, "bold"))
    room = width - len(title) - len(place)
    if room >= 2:
        return [Line((*spans, Span(" " * room), Span(place, "dim")))]
    return [Line(spans), *labelled("case", [place], width)]


def _ran(record: Record, width: int) -> list[Line]:
    """Which device kernels ran, with the one asked for where that is another name."""
    if not record.ran:
        return []
    asked = "" if record.ran == (record.kernel,) else f" (asked: {record.kernel})"
    return labelled("ran", [", ".join(record.ran) + asked], width)


def _heat(strips: Sequence[Mapping[str, Any]]) -> list[Line]:
    """One strip per axis on which the pattern is not uniform: a cell is as dark as its worst index is wrong."""
    lines = []
    for i, strip in enumerate(strips):
        cells = "".join(_shade(fraction) for fraction in strip["fractions"])
        scale = "" if strip["per_cell"] == 1 else f" ({strip['per_cell']} per cell)"
        margin = INDENT + ("heat" if i == 0 else "").ljust(LABEL_WIDTH)
        lines.append(line(Span(margin, "dim"), f"{strip['axis'] + 's':<7}", Span(cells, "red"), Span(scale, "dim")))
    return lines


def _shade(fraction: float) -> str:
    if fraction <= 0:
        return SHADES[0]
    if fraction >= 1:
        return SHADES[-1]
    return SHADES[1 + int(fraction * 3)]
