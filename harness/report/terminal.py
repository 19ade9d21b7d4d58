"""The coloured terminal: styled lines as rich text. Invariant: its characters are those that plain.py returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

from harness.report.failure import failure_lines
from harness.report.lines import WIDTH, Line
from harness.report.summary import MAX_BLOCKS, CoverageLine, failures_lines, summary_lines
from harness.store.record import Header, Record


def render_summary(
    records: Sequence[Record],
    header: Header,
    coverage: Mapping[str, CoverageLine],
    log_path: str = "reports/latest.jsonl",
    width: int = WIDTH,
) -> Text:
    """The table per matrix and the totals. coverage: by matrix name."""
    return _text(summary_lines(records, header, coverage, log_path, width))


def render_failure(record: Record, width: int = WIDTH) -> Text:
    """The block of one record."""
    return _text(failure_lines(record, width))


def render_failures(records: Sequence[Record], max_blocks: int = MAX_BLOCKS, width: int = WIDTH) -> Text:
    """All failures among `records`, those that look alike together."""
    return _text(failures_lines(records, max_blocks, width))


def _text(lines: Iterable[Line]) -> Text:
    # Lines are wrapped already, but for those that are there to be copied: the terminal folds these, at any character.
    text = Text(overflow="fold", no_wrap=False)
    for i, one in enumerate(lines):
        if i:
            text.append("\n")
        for span in one.spans:
            text.append(span.text, style=span.style or None)
    return text
