"""The audit in words: per matrix what each fault's effect is at least, then every blind case with advice.

Invariant: nothing is computed here but minima and medians of what the audit measured.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from statistics import median

from harness.run.audit import AuditRow

MOST_BLIND = 20  # blind cases told one by one
_WIDTH = 80


def render_matrix(rows: Sequence[AuditRow], tier: str, *, every_case: bool = False) -> str:
    """The cases of one matrix; `every_case` adds a table of case x fault."""
    blind = sum(row.blind for row in rows)
    counts = f"{_cases_of(len(rows))} of tier {tier}, {blind} blind"
    lines = [f"{rows[0].matrix}  {counts}  (effects in units of the tolerance)"]
    lines += [*_faults(rows), *_descale_errors(rows), *(_cases(rows) if every_case else ())]
    return "\n".join(lines) + "\n\n"


def render_total(rows: Sequence[AuditRow]) -> str:
    """What is blind among the cases of all matrices, and how many effects were looked at."""
    lines: list[str] = []
    blind_rows = [row for row in rows if row.blind]
    for row in blind_rows[:MOST_BLIND]:
        lines += _blind(row)
    if len(blind_rows) > MOST_BLIND:
        lines.append(f"... and {len(blind_rows) - MOST_BLIND} more blind cases")
    effects = sum(size is not None for row in rows for size in row.margins.values())
    unseen = sum(len(row.unseen) for row in rows)
    total = f"{_cases_of(len(rows))}, {len(blind_rows)} blind"
    lines.append(f"{total}: {unseen} of {effects:,} effects below what is wanted")
    return "\n".join(lines) + "\n"


def _cases_of(count: int) -> str:
    return f"{count:,} case" + ("s" if count != 1 else "")


def _faults(rows: Sequence[AuditRow]) -> Iterator[str]:
    """One line per fault: cases that can have it, blind ones, effects wanted, least and median, laws that show it."""
    yield f"  {'fault':<14}{'cases':>6}{'blind':>6}{'wanted':>8}{'least':>9}{'median':>9}  cheapest law for the blind"
    for fault in rows[0].margins:
        sizes = [size for row in rows if (size := row.margins[fault]) is not None]
        blind = [row for row in rows if fault in row.unseen]
        if not sizes:
            yield f"  {fault:<14}{'none':>6}"
            continue
        laws = ", ".join(dict.fromkeys(row.laws.get(fault, "none") for row in blind))
        numbers = f"{len(sizes):>6}{len(blind):>6}{rows[0].wanted[fault]:>8.3g}{min(sizes):>9.3g}{median(sizes):>9.3g}"
        yield f"  {fault:<14}{numbers}  {laws}".rstrip()


def _descale_errors(rows: Sequence[AuditRow]) -> Iterator[str]:
    found = [row.least_descale_error for row in rows if row.least_descale_error is not None]
    if found:
        typical = ", ".join(f"{name} {median(error[name] for error in found):.2%}" for name in found[0])
        yield f"  descale error of one page that tier 2 sees: {typical} (median of {len(found)} cases)"


def _cases(rows: Sequence[AuditRow]) -> Iterator[str]:
    """Case x fault: the effect; where it is not seen, the cheapest law that shows it; - where it cannot happen."""
    cells = [[_cell(row, fault) for fault in row.margins] for row in rows]
    faults = list(rows[0].margins)
    widths = [max(len(fault), *(len(line[i]) for line in cells)) + 2 for i, fault in enumerate(faults)]
    names = max(len(row.id) for row in rows)
    yield " " * (names + 2) + "".join(f"{fault:>{width}}" for fault, width in zip(faults, widths, strict=True))
    for row, line in zip(rows, cells, strict=True):
        yield f"  {row.id:<{names}}" + "".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))


def _cell(row: AuditRow, fault: str) -> str:
    size = row.margins[fault]
    if size is None:
        return "-"
    return f"{size:.3g}" + (f" BLIND ({row.laws.get(fault, 'no law')})" if fault in row.unseen else "")


def _blind(row: AuditRow) -> Iterator[str]:
    faults = ", ".join(f"{fault} ({size:.2g})" for fault, size in row.unseen.items())
    because = "; ".join(row.facts)
    yield from _wrapped(f"BLIND  {row.id}", "")
    yield from _wrapped(f"cannot see, effect in units of tolerance: {faults}", " " * 7)
    yield from _wrapped(because, " " * 7)
    yield from _wrapped(f"try {row.advice}" if row.advice else "", " " * 7)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False)
