"""Plain text, for JUnit files, logs and pipes. Invariant: no colour codes, and the same content as the terminal's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.report.failure import failure_lines
from harness.report.lines import WIDTH, to_text
from harness.report.summary import MAX_BLOCKS, CoverageLine, failures_lines, summary_lines
from harness.store.record import Header, Record


def plain_summary(
    records: Sequence[Record],
    header: Header,
    coverage: Mapping[str, CoverageLine],
    log_path: str = "reports/latest.jsonl",
    width: int = WIDTH,
) -> str:
    return to_text(summary_lines(records, header, coverage, log_path, width))


def plain_failure(record: Record, width: int = WIDTH) -> str:
    return to_text(failure_lines(record, width))


def plain_failures(records: Sequence[Record], max_blocks: int = MAX_BLOCKS, width: int = WIDTH) -> str:
    return to_text(failures_lines(records, max_blocks, width))
