from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.run.outcome import Outcome
from harness.store import run_log
from harness.store.record import Header, MalformedRecord, Record
from harness.store.run_log import RunLog, new_run_id, read_run, utc_now

Spoiler = Callable[[list[bytes]], list[bytes]]  # spoils the lines of a log


def header(run: str = "run-1") -> Header:
    return Header(run, utc_now(), ("pytest", "cases"), plants=("drop_newest",))


def record(name: str, outcome: Outcome = Outcome.PASS) -> Record:
    return Record(name, "m", "cases/m.yaml", 3, "smoke", "k", outcome, "", err_over_tol=0.5)


def written(folder: Path, names: str = "abc") -> Path:
    with RunLog(folder, header()) as log:
        for name in names:
            log.write(record(name))
    return log.path


def test_what_is_written_is_read_and_latest_leads_to_it(tmp_path: Path) -> None:
    path = written(tmp_path / "reports")
    assert path == tmp_path / "reports" / "run-1.jsonl"
    read_header, records = read_run(tmp_path / "reports" / "latest.jsonl")
    assert read_header.run == "run-1"
    assert read_header.plants == ("drop_newest",)
    assert [r.id for r in records] == ["a", "b", "c"]
    assert (tmp_path / "reports" / "latest.jsonl").readlink() == Path("run-1.jsonl")  # relative: the folder can move


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RunLog(tmp_path, header()) as log:
        assert read_run(log.path)[1] == []
        log.write(record("a"))
        assert [r.id for r in read_run(log.latest)[1]] == ["a"]


def test_a_torn_last_line_is_left_out_wherever_it_tore(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(whole) - 1, 7):
        path.write_bytes(whole[:end])
        assert [r.id for r in read_run(path)[1]] == ["a", "b"]
    path.write_bytes(whole[:-1])  # only the line break is missing
    assert [r.id for r in read_run(path)[1]] == ["a", "b", "c"]
    path.write_bytes(whole + b"\xff\x00")
    assert len(read_run(path)[1]) == 3


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (lambda lines: [lines[0], b'{"torn', *lines[2:]], ":2: not JSON"),
        (lambda lines: [*lines[:3], b"", lines[3]], ":4: not JSON"),
        (lambda lines: [*lines[:3], b"\xff", lines[3]], ":4: 'ascii' codec"),
        (lambda lines: [lines[0], lines[0], *lines[1:]], ":2: not a record"),
        (lambda lines: lines[1:], ":1: not a header"),
    ],
)
def test_any_other_malformed_line_is_told_with_file_and_line(tmp_path: Path, spoil: Spoiler, place: str) -> None:
    path = written(tmp_path)
    path.write_bytes(b"\n".join(spoil(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(MalformedRecord) as caught:
        read_run(path)
    assert str(caught.value).startswith(f"{path}{place}")


def test_a_run_that_died_in_its_header_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for content in (b"", b'{"kind": "head'):
        path.write_bytes(content)
        with pytest.raises(MalformedRecord, match="no header; the run ended before it began"):
            read_run(path)


def test_without_symbolic_links_latest_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: str) -> None:
        raise OSError("no symbolic links here")

    monkeypatch.setattr(run_log.Path, "symlink_to", refused)
    path = written(tmp_path)
    latest = tmp_path / "latest.jsonl"
    assert not latest.is_symlink()
    assert latest.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.jsonl", "run-1.jsonl"]


def test_the_latest_run_takes_over_from_the_one_before(tmp_path: Path) -> None:
    for run in ("run-1", "run-2"):
        with RunLog(tmp_path, header(run)) as log:
            log.write(record(run))
    assert read_run(tmp_path / "latest.jsonl")[0].run == "run-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.jsonl", "run-1.jsonl", "run-2.jsonl"]


def test_a_run_id_that_is_taken_is_replaced_not_overwritten(tmp_path: Path) -> None:
    first = written(tmp_path, "ab")
    with RunLog(tmp_path, header()) as log:
        log.write(record("c"))
    assert log.header.run != "run-1"
    assert log.path != first
    assert read_run(log.path)[0].run == log.header.run
    assert [r.id for r in read_run(first)[1]] == ["a", "b"]


def _one_run(folder: Path) -> str:
    with RunLog(folder, header(new_run_id())) as log:
        log.write(record(log.header.run))
    return log.header.run


def test_concurrent_runs_never_share_a_file(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        runs = pool.map(_one_run, [tmp_path] * 40)
        pool.close()
        pool.join()
    assert len(set(runs)) == 40
    for run in runs:
        assert [r.id for r in read_run(tmp_path / f"{run}.jsonl")[1]] == [run]
    assert len(list(tmp_path.iterdir())) == 41  # and latest.jsonl, with nothing staged left behind
    assert read_run(tmp_path / "latest.jsonl")[0].run in runs
