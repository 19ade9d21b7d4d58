"""The run log: reports/<run>.jsonl, a header and then one record per line, in the order in which cases ended.

Invariant: after write() returns, the record survives the death of this process; two runs never share a file; and
reports/latest.jsonl always names a whole file, the run that started last.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from harness.store.record import Header, Line, MalformedRecord, Record

LATEST = "latest.jsonl"


def new_run_id() -> str:
    """UTC time to the second, process and a random part: readable, sorts by time, unique among concurrent runs."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}-{secrets.token_hex(4)}"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunLog:
    """Writer of one run. Use as a context manager, or call close()."""

    def __init__(self, folder: Path, header: Header) -> None:
        """Creates the file, writes the header and points latest.jsonl at it.

        Where a file of that run id exists already, the header gets another id: `self.header` is the one written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.header, self._file = _create(folder, header)
        self.path = folder / f"{self.header.run}.jsonl"
        self.latest = folder / LATEST
        self._write_line(self.header.to_json())
        self._linked = _link(self.path, self.latest)

    def write(self, record: Record) -> None:
        """Appends one record and hands it to the operating system."""
        self._write_line(record.to_json())

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.close()
        if not self._linked:
            staged = self.latest.with_name(f".{LATEST}.{self.header.run}")
            shutil.copyfile(self.path, staged)
            staged.replace(self.latest)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self, text: str) -> None:
        self._file.write(text + "\n")  # one write per line: a crash tears at most the last line
        self._file.flush()


def read_run(path: Path) -> tuple[Header, list[Record]]:
    """Header and records of a run log.

    A last line without its line break was torn by a crash: it is left out unless it is whole. Every other line that
    cannot be read raises MalformedRecord, with file and line.
    """
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()  # what follows the last line break: nothing, in a log that was not torn
    if not lines:
        raise MalformedRecord(f"{path}:1: no header; the run ended before it began")
    header = _parse(Header, lines[0], path, 1)
    records = [_parse(Record, line, path, number) for number, line in enumerate(lines[1:], start=2)]
    if torn:
        with suppress(MalformedRecord):
            records.append(_parse(Record, torn, path, len(lines) + 1))
    return header, records


def _parse(kind: type[Line], line: bytes, path: Path, number: int) -> Line:
    try:
        return kind.from_json(line.decode("ascii"))
    except (UnicodeDecodeError, MalformedRecord) as error:
        raise MalformedRecord(f"{path}:{number}: {error}") from None


def _create(folder: Path, header: Header) -> tuple[Header, IO[str]]:
    while True:
        try:
            return header, (folder / f"{header.run}.jsonl").open("x", encoding="ascii", newline="\n")
        except FileExistsError:
            header = replace(header, run=new_run_id())


def _link(path: Path, latest: Path) -> bool:
    """Points `latest` at `path` in one step; False where this file system knows no symbolic links."""
    staged = latest.with_name(f".{LATEST}.{path.stem}")
    try:
        staged.symlink_to(path.name)
    except (OSError, NotImplementedError):
        return False
    staged.replace(latest)
    return True
