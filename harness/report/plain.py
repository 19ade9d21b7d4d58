"""Plain text, for JUnit files, logs and pipes. Invariant: no colour codes, and the same content as the terminal's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.report.failure import failure_lines
from harness.report.lines import WIDTH, to_text
from harness.report.summary import LATEST, MAX_BLOCKS, CoverageLine, failures_lines, summary_lines
from harness.store.record import Header, Record


def failure_text(record: Record, width: int = WIDTH) -> str:
    """The block of one record."""
    return to_text(failure_lines(record, width))


def failures_text(records: Sequence[Record], max_blocks: int = MAX_BLOCKS, width: int = WIDTH) -> str:
    """All failures among `records`, those that look alike together."""
    return to_text(failures_lines(records, max_blocks, width))


def summary_text(
    records: Sequence[Record],
    header: Header,
    coverage: Mapping[str, CoverageLine],
    log_path: str = LATEST,
    width: int = WIDTH,
) -> str:
    """The table per matrix and the totals. coverage: by matrix name."""
    return to_text(summary_lines(records, header, coverage, log_path, width))
