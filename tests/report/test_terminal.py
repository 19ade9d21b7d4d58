"""What people read, to the letter."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from harness.case import Case, Rows
from harness.errors import SetupBug
from harness.oracle.findings import Findings, TensorFindings, Worst
from harness.report.plain import failure_text, failures_text, summary_text
from harness.report.summary import CoverageLine
from harness.report.terminal import render_failure, render_failures, render_run, render_summary
from harness.run.outcome import Outcome
from harness.store.record import Header, Record
from harness.triage.explain import explain_blind, explain_error, explain_mismatch, explain_setup_bug, with_row
from harness.triage.reproduce import reproduce_line

HEADER = Header("run-1", "2026-11-07T12:00:00+00:00")
CASE = Case("contexted_kv", "chunked", Rows("mixed3", (5, 64, 1), (0, 100, 500)), num_q_heads=64)


def record(
    name: str = "paged_decode-d128", outcome: Outcome = Outcome.FAIL, reason: str = "", **more: object
) -> Record:
    values = {"matrix": name.partition("-")[0], "line": 7, "tier": "smoke", "kernel": "chunked"} | more
    path = f"cases/{values['matrix']}.yaml"
    return Record(
        name, matrix_path=path, outcome=outcome, reason=reason, reproduce=reproduce_line(path, name), **values
    )


def newest_token_missing(name: str = "contexted_kv-gqa1-d128-mixed3", **more: object) -> Record:
    mask = torch.zeros(70, 64, 128, dtype=torch.bool)
    mask[69] = True
    out = TensorFindings("out", 25.0, mask, 8192, mask.numel(), 0, 0, 0, Worst(69, 0, 7, 0.031, 0.412, 0.0031, 25.0))
    explanation = explain_mismatch(CASE, Findings((out,)))
    ran = ("prefix_prefill", "paged_decode")
    return record(name, ran=ran, err_over_tol=25.0, reason=explanation["summary"], explanation=explanation, **more)


NEWEST_TOKEN_MISSING = """\
FAIL  contexted_kv-gqa1-d128-mixed3                    cases/contexted_kv.yaml:7
  ran          prefix_prefill, paged_decode (asked: chunked)
  wrong        8,192 of 573,440 elements = 1 token x 64 heads x 128 dims
               sequence 2, decode row, position 500 (query_len 1, context 500)
  how much     worst 25x tolerance: got 0.031 want 0.412 +- 0.0031
               at token 69, head 0, dim 7
               (sequence 2, decode row, position 500 = page slot 31, offset 4)
  not          NaN, Inf, unwritten
  seen         only decode rows are wrong: 1 of 1
               only sequence 2 is wrong
  heat         tokens ..................................# (2 per cell)
Reproduce: pytest 'cases/contexted_kv.yaml::contexted_kv-gqa1-d128-mixed3'"""


def test_a_failure_to_the_letter() -> None:
    assert failure_text(newest_token_missing()) == NEWEST_TOKEN_MISSING


def test_rows_of_others_stand_between_what_is_wrong_and_what_is_seen() -> None:
    one = newest_token_missing()
    one = replace(one, explanation=with_row(one.explanation, "looks like", "the newest token is not read"))
    one = replace(one, explanation=with_row(one.explanation, "expired", "the expectation expired on 2026-01-01"))
    labels = re.findall(r"(?m)^  (\S.{0,11}?)  ", failure_text(one))
    assert labels == ["ran", "wrong", "how much", "not", "looks like", "expired", "seen", "heat"]


LONG = "paged_decode-chunked-gqa8-d128-sw16-kvfp8_e4m3-p16-decode_first-normal-explicit-strides"


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (
            record(
                outcome=Outcome.TEST_BUG,
                explanation=explain_setup_bug(
                    SetupBug(
                        "query_start_loc", "int32", "int64", "torch.cumsum of an int32 tensor returns int64: cast it"
                    )
                ),
            ),
            """\
TEST_BUG  paged_decode-d128                              cases/paged_decode.yaml:7
  before launch  query_start_loc: got int64, expected int32
                 (torch.cumsum of an int32 tensor returns int64: cast it)
Reproduce: pytest 'cases/paged_decode.yaml::paged_decode-d128'""",
        ),
        (
            record(
                outcome=Outcome.BLIND,
                explanation=explain_blind(
                    {"zero output": 0.11, "newest token": 0.003, "ignored Q": 1e-7, "K descale": 0.0},
                    ["values lie within +-1e-3 while the tolerance is 1e-3"],
                    "data: probe",
                ),
            ),
            """\
BLIND  paged_decode-d128                                 cases/paged_decode.yaml:7
  cannot see   zero output (0.11 of tolerance), newest token (0.003 of
               tolerance), ignored Q (1e-07 of tolerance), K descale (0 of
               tolerance)
  because      values lie within +-1e-3 while the tolerance is 1e-3
  try          data: probe
Reproduce: pytest 'cases/paged_decode.yaml::paged_decode-d128'""",
        ),
        (
            record(LONG, Outcome.CRASH, "worker gw1 died with signal 11 (segmentation fault) in launch"),
            f"""\
CRASH  {LONG}
  case         cases/paged_decode.yaml:7
  why          worker gw1 died with signal 11 (segmentation fault) in launch
Reproduce: pytest 'cases/paged_decode.yaml::{LONG}'""",
        ),
        (
            record(outcome=Outcome.XPASS, reason="passes, but FAIL is expected: truncates P (http://bugs/1)"),
            """\
XPASS  paged_decode-d128                                 cases/paged_decode.yaml:7
  why          passes, but FAIL is expected: truncates P (http://bugs/1)
Reproduce: pytest 'cases/paged_decode.yaml::paged_decode-d128'""",
        ),
        (
            record(outcome=Outcome.UNSUPPORTED, reason="sinks (attention sinks (one virtual logit per head))"),
            """\
UNSUPPORTED  paged_decode-d128                           cases/paged_decode.yaml:7
  not admitted  sinks (attention sinks (one virtual logit per head))
Reproduce: pytest 'cases/paged_decode.yaml::paged_decode-d128'""",
        ),
    ],
)
def test_other_outcomes_to_the_letter(one: Record, text: str) -> None:
    squeeze = re.compile(r"(?m) +(cases/\S+:7)$")  # how far right the place stands is tested on its own
    assert squeeze.sub(r" \1", failure_text(one)) == squeeze.sub(r" \1", text)


def test_the_place_ends_at_the_right_margin() -> None:
    title = failure_text(record()).splitlines()[0]
    assert len(title) == 80
    assert title.endswith(" cases/paged_decode.yaml:7")


def test_a_harness_error_alone_shows_its_trace() -> None:
    try:
        raise RuntimeError("broken harness")
    except RuntimeError as error:
        text = failure_text(record(outcome=Outcome.ERROR, reason="x", explanation=explain_error(error)))
    assert "  harness      RuntimeError: broken harness\n" in text
    assert "  Traceback (most recent call last):\n" in text


def many(count: int) -> list[Record]:
    return [newest_token_missing(f"contexted_kv-gqa1-d128-{'x' * i}mixed3") for i in range(count)]


def test_failures_that_look_alike_share_one_block() -> None:
    text = failures_text(many(3))
    assert text.count("Reproduce:") == 1
    assert text.endswith("mixed3'\nand 2 more like it:\n               contexted_kv-gqa1-d128-... xmixed3, xxmixed3\n")
    text = failures_text(many(30))
    assert "and 29 more like it:" in text
    assert "and 17 more" in text


def test_behind_the_full_blocks_each_failure_has_a_line_of_its_own() -> None:
    names = "abcdefghijklmnopqrst"
    records = [record(f"m-{name}", reason=f"reason {name}", kernel=name) for name in names]
    text = failures_text(records, max_blocks=10)
    assert text.count("Reproduce:") == 10
    assert [line for line in text.splitlines() if line.startswith("FAIL  m-")][10:] == [
        f"FAIL  m-{name}  reason {name}" for name in names[10:]
    ]
    assert failures_text([record(outcome=Outcome.PASS), record(outcome=Outcome.UNSUPPORTED)]) == ""


def green() -> list[Record]:
    return [
        record("contexted_kv-a", Outcome.PASS, err_over_tol=0.81, seconds={"launch": 12.0, "cache": 6.2}),
        record("contexted_kv-b", Outcome.PASS, err_over_tol=0.2, kernel="other"),
        record("paged_decode-a", Outcome.PASS, err_over_tol=0.77, seconds={"launch": 0.25}),
        record("paged_decode-b", Outcome.UNSUPPORTED, "logits_soft_cap (a soft cap on the logits)"),
    ]


def test_green_is_quiet() -> None:
    coverage = {"contexted_kv": CoverageLine("pairs 100 %"), "paged_decode": CoverageLine("pairs 98 %", complete=False)}
    assert summary_text(green(), HEADER, coverage) == (
        "contexted_kv  2 cases  2 kernels  pairs 100 %  worst 0.81 of tolerance   18 s\n"
        "paged_decode  2 cases   1 kernel  pairs 98 %   worst 0.77 of tolerance  0.2 s\n"
        "3 passed, 1 unsupported (chunked: logits_soft_cap), 0 blind.\n"
        "reports/latest.jsonl"
    )


def test_red_totals_name_every_outcome_and_what_was_planted() -> None:
    records = [*green(), newest_token_missing(), record(outcome=Outcome.BLIND), record(outcome=Outcome.TEST_BUG)]
    lines = summary_text(records, replace(HEADER, plants=("drop_newest",)), {}).splitlines()
    assert lines[0].startswith("contexted_kv  3 cases  2 kernels  worst 25.00 of tolerance")
    assert lines[2] == "  planted      drop_newest"
    assert " ".join(lines[3:]) == (
        "1 failed, 1 test bug, 3 passed, 1 unsupported (chunked: logits_soft_cap), 1 blind. reports/latest.jsonl"
    )


def test_an_empty_run_has_totals_only() -> None:
    assert summary_text([], HEADER, {}) == "0 passed, 0 blind.  reports/latest.jsonl"


def everything() -> list[Record]:
    odd = [record(f"m-{o.value}", o, "some reason " * 12) for o in Outcome]
    return [*green(), *many(20), record(LONG, Outcome.CRASH, "signal 11"), *odd]


def test_nothing_is_wider_than_80_columns_but_what_is_there_to_be_copied() -> None:
    text = render_run(everything(), HEADER, {})
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert all(re.match(r"Reproduce: |[A-Z_]+  \S+  |[A-Z_]+  \S+$", line) for line in wide)
    blocks = failures_text(everything(), max_blocks=99)
    assert max(len(line) for line in blocks.splitlines() if LONG not in line and "Reproduce" not in line) <= 80


def test_colour_adds_colour_and_nothing_else() -> None:
    records = everything()
    plain = render_run(records, HEADER, {})
    assert "\x1b" not in plain
    coloured = render_run(records, HEADER, {}, color=True)
    assert "\x1b[" in coloured
    without = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in without.splitlines()] == plain.splitlines()
    for rich_text, text in (
        (render_failure(records[5]), failure_text(records[5])),
        (render_failures(records), failures_text(records)),
        (render_summary(records, HEADER, {}), summary_text(records, HEADER, {})),
    ):
        assert [line.rstrip() for line in rich_text.plain.splitlines()] == text.splitlines()


def test_heat_shows_the_least_share_and_keeps_the_darkest_for_all() -> None:
    strip = {"axis": "head", "size": 6, "per_cell": 1, "fractions": [0.0, 0.0001, 0.5, 0.7, 0.999, 1.0]}
    text = failure_text(record(reason="wrong", explanation={"heat": [strip, strip | {"per_cell": 4}]}))
    assert "  heat         heads  .-+**#\n               heads  .-+**# (4 per cell)\n" in text
    assert "  why          wrong\n" in text


def test_markup_in_reasons_stays_text() -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as caught:
        console.print(render_failure(record(reason="[red]q[0:3][/red] is wrong")))
    assert "[red]q[0:3][/red] is wrong" in caught.get()
