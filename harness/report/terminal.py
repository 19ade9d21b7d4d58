"""The coloured terminal: styled lines as rich text. Invariant: its characters are those that plain.py returns."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from harness.report.failure import failure_lines
from harness.report.lines import WIDTH, Line, to_text
from harness.report.summary import LATEST, MAX_BLOCKS, CoverageLine, failures_lines, summary_lines
from harness.store.branches import Reach
from harness.store.record import Header, Record


def render_failure(record: Record, width: int = WIDTH) -> Text:
    """The block of one record."""
    return _rich(failure_lines(record, width))


def render_failures(records: Sequence[Record], max_blocks: int = MAX_BLOCKS, width: int = WIDTH) -> Text:
    """All failures among `records`, those that look alike together."""
    return _rich(failures_lines(records, max_blocks, width))


def render_summary(
    records: Sequence[Record],
    header: Header,
    coverage: Mapping[str, CoverageLine],
    log_path: str = LATEST,
    width: int = WIDTH,
) -> Text:
    """The table per matrix and the totals. coverage: by matrix name."""
    return _rich(summary_lines(records, header, coverage, log_path, width))


def render_run(
    records: Sequence[Record],
    header: Header,
    coverage: Mapping[str, CoverageLine],
    log_path: str = LATEST,
    *,
    width: int = WIDTH,
    color: bool = False,
    reach: Sequence[Reach] = (),
) -> str:
    """Failures, then the summary, ending with a line break; `color` adds ANSI colours and nothing else."""
    lines = [*failures_lines(records, width=width), *summary_lines(records, header, coverage, log_path, width, reach)]
    if not color:
        return to_text(lines) + "\n"
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, color_system="standard", width=width)
    console.print(_rich(lines), soft_wrap=True, highlight=False)  # wrapped already, but for what is there to be copied
    return written.getvalue()


def _rich(lines: Iterable[Line]) -> Text:
    text = Text(overflow="fold")
    for i, one in enumerate(lines):
        if i:
            text.append("\n")
        for span in one.spans:
            text.append(span.text, style=span.style or None)
    return text
