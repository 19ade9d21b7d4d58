"""A whole session: outcomes, run log, selection, what the terminal says, and one record per case whatever happens."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

import harness.run.run_case  # noqa: F401  an inner session forgets what it imports, and torch is imported once only
from harness.run.outcome import Outcome
from harness.session import PROJECT
from harness.store.record import Record
from harness.store.run_log import read_run

KERNELS = Path(__file__).parent / "kernels"

MATRIX = """
matrix: toys
about: A kernel and its faulty twins.
kernels: [{kernels}]
fixed: {{dtype: fp32, num_q_heads: 4, gqa_ratio: 2, head_size: 8}}
axes:
  rows: [{{name: mix, query_lens: [3, 1], context_lens: [5, 20]}}]
  data_seed: [0, 1]
  {axes}
tiers:
  smoke: {tier}
{expect}
"""

FEW = """
constraints:
  - {require: "data_seed == 0 or kernel == 'toy_honest'", because: one of each kind will do}
"""


class Toys:
    """Runs matrices over the toy kernels in a session of their own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester

    def run(
        self,
        kernels: str,
        *options: str,
        axes: str = "",
        expect: str = "",
        tier: str = "full",
        isolated: bool = False,
    ) -> pytest.RunResult:
        path = self.pytester.path / "toys.yaml"
        path.write_text(MATRIX.format(kernels=kernels, axes=axes, expect=expect, tier=tier))
        arguments = [
            "-p",
            "harness.plugin",
            "--device=cpu",
            str(path),
            f"--kernels={KERNELS}",
            f"--reports={self.pytester.path / 'reports'}",
            *options,
        ]
        if isolated:
            return self.pytester.runpytest_subprocess(*arguments)
        return self.pytester.runpytest_inprocess(*arguments, "-n0")  # workers cost seconds

    @property
    def records(self) -> list[Record]:
        return read_run(self.pytester.path / "reports" / "latest.jsonl")[1]

    @property
    def outcomes(self) -> dict[str, set[Outcome]]:
        found: dict[str, set[Outcome]] = {}
        for record in self.records:
            found.setdefault(record.kernel, set()).add(record.outcome)
        return found


@pytest.fixture
def toys(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Toys:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return Toys(pytester)


def test_an_honest_kernel_is_green_and_quiet(toys: Toys) -> None:
    result = toys.run("toy_honest")
    assert result.ret == 0
    assert toys.outcomes == {"toy_honest": {Outcome.PASS}}
    result.stdout.fnmatch_lines(
        ["toys*2 cases*1 kernel*worst*of tolerance*", "2 passed, 0 blind.  reports/latest.jsonl"]
    )
    result.stdout.no_fnmatch_line("*Reproduce*")
    header, records = read_run(toys.pytester.path / "reports" / "latest.jsonl")
    assert header.environment["torch"]
    assert {r.seeds["data"] for r in records} == {0, 1}
    assert all(r.ran == ("toy_honest",) and 0 < (r.err_over_tol or 0) < 1 for r in records)
    assert all({"problem", "cache", "launch", "reference", "judge"} <= r.seconds.keys() for r in records)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("toy_zeros", "*128 of 128 elements = 4 tokens x 4 heads x 8 dims*"),
        ("toy_silent", "*unwritten*"),
        ("toy_forgetful", "*worst * tolerance*"),
        ("toy_greedy", "*q was written by the kernel"),
        ("toy_overrun", "*1 elements behind or between the rows of out were written*"),
        ("toy_careless", "*the kernel changed torch's default dtype (was torch.float32*"),
        ("toy_rude", "*importing 'rude.py:honest' changed torch's deterministic mode*"),
        ("toy_raising", "*the kernel raised RuntimeError: no such instruction*"),
        ("toy_skipping", "*the kernel raised Skipped*"),
        ("toy_quitting", "*the kernel raised SystemExit*"),
        ("toy_broken", "*'no_such_file.py:launch' cannot be imported*"),
    ],
)
def test_a_faulty_kernel_is_red_and_says_why(toys: Toys, kernel: str, words: str) -> None:
    result = toys.run(f"toy_honest, {kernel}")
    assert result.ret == 1
    assert toys.outcomes == {"toy_honest": {Outcome.PASS}, kernel: {Outcome.FAIL}}
    result.stdout.fnmatch_lines(["FAIL*", words])
    result.stdout.fnmatch_lines([f"Reproduce: pytest *'toys.yaml::toys-{kernel}-*"])
    assert "Traceback" not in result.stdout.str()


@pytest.mark.parametrize("kernel", ["toy_hungry", "toy_gorging"])
def test_memory_that_is_not_to_be_had_is_a_failure_of_its_own(toys: Toys, kernel: str) -> None:
    result = toys.run(kernel)
    assert result.ret == 1
    assert toys.outcomes == {kernel: {Outcome.OUT_OF_MEMORY}}
    result.stdout.fnmatch_lines(["2 out of memory, 0 passed, 0 blind.*"])


def test_the_reproduce_line_reproduces(toys: Toys) -> None:
    toys.run("toy_zeros", "--data-seed", "7")
    command = toys.records[0].reproduce
    assert "--data-seed 7" in command
    result = toys.pytester.runpytest_inprocess(
        "-p", "harness.plugin", *shlex.split(command)[1:], f"--reports={toys.pytester.path / 'reports'}"
    )
    assert result.ret == 1
    assert f"toys.yaml::{toys.records[0].id}" in shlex.split(command)
    assert len(toys.records) == 1


@pytest.mark.parametrize("installed", [True, False])
def test_the_reproduce_line_names_the_plugin_where_it_is_not_installed(
    toys: Toys, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr("harness.session.entry_points", lambda **which: ("harness.plugin",) if installed else ())
    toys.run("toy_zeros")
    named = "" if installed else "-p harness.plugin "
    assert toys.records[0].reproduce.startswith(f"pytest {named}'toys.yaml::toys-toy_zeros-")


def test_runs_are_logged_under_the_root_folder_unless_told_otherwise(toys: Toys) -> None:
    toys.run("toy_honest")
    shutil.rmtree(toys.pytester.path / "reports")
    toys.pytester.runpytest_inprocess("-p", "harness.plugin", "toys.yaml", f"--kernels={KERNELS}")
    assert len(toys.records) == 2


def test_unsupported_is_neither_a_pass_nor_a_skip(toys: Toys) -> None:
    result = toys.run("toy_honest", axes="causal: [true, false]")
    assert result.ret == 0
    outcomes = [r.outcome for r in toys.records]
    assert sorted(outcomes) == [Outcome.PASS] * 2 + [Outcome.UNSUPPORTED] * 2
    result.stdout.fnmatch_lines(["2 passed, 2 unsupported (toy_honest: noncausal), 0 blind.*"])
    result.stdout.no_fnmatch_line("*skipped*")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "toys*4 cases*pairs 100 %*"),
        (("-k", "s1"), "toys*2 of 4 cases*pairs 50 %*"),
        (("--where", "data_seed == 1"), "toys*2 of 4 cases*pairs 50 %*"),
        (("-n", "1", "-k", "s1"), "toys*2 of 4 cases*pairs 50 %*"),
    ],
)
def test_a_run_of_some_cases_claims_no_more_than_they_cover(toys: Toys, options: tuple[str, ...], words: str) -> None:
    result = toys.run("toy_honest", *options, axes="page_size: [16, 32]", tier="{cover: 2}", isolated="-n" in options)
    assert result.ret == 0
    result.stdout.fnmatch_lines([words])


def test_a_run_that_stops_at_the_first_failure_claims_no_more_than_it_ran(toys: Toys) -> None:
    result = toys.run("toy_zeros", "-x", axes="page_size: [16, 32]", tier="{cover: 2}")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["toys*1 of 4 cases*pairs 25 %*"])


def test_one_case_by_its_id_claims_no_more_than_it_covers(toys: Toys) -> None:
    toys.run("toy_honest", axes="page_size: [16, 32]", tier="{cover: 2}")
    one = f"toys.yaml::{toys.records[0].id}"
    reports = f"--reports={toys.pytester.path / 'reports'}"
    result = toys.pytester.runpytest_inprocess("-p", "harness.plugin", one, f"--kernels={KERNELS}", reports)
    result.stdout.fnmatch_lines(["toys*1 of 4 cases*pairs 25 %*"])


def test_a_value_that_no_kernel_takes_is_said_beside_the_coverage(toys: Toys) -> None:
    result = toys.run("toy_honest", axes="causal: [true, false]", tier="{cover: 2}")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["toys*2 cases*pairs 100 %, unsupported: causal false*"])


EXPECT = """
expect:
  - where: kernel == '{kernel}'
    outcome: FAIL
    because: a known fault
    issue: https://example.org/1
    until: {until}
"""


@pytest.mark.parametrize(
    ("kernel", "until", "outcome", "ret"),
    [
        ("toy_zeros", "2999-01-01", Outcome.XFAIL, 0),
        ("toy_zeros", "2020-01-01", Outcome.FAIL, 1),  # expired
        ("toy_honest", "2999-01-01", Outcome.XPASS, 1),  # no longer true
    ],
)
def test_expectations_hide_nothing(toys: Toys, kernel: str, until: str, outcome: Outcome, ret: int) -> None:
    result = toys.run(kernel, expect=EXPECT.format(kernel=kernel, until=until))
    assert result.ret == ret
    assert toys.outcomes == {kernel: {outcome}}


def test_selection_by_id_k_where_and_last_failed(toys: Toys) -> None:
    result = toys.run("toy_honest, toy_zeros", "-k", "toy_honest and s1")
    result.assert_outcomes(passed=1, deselected=3)
    result = toys.run("toy_honest, toy_zeros", "--where", "kernel == 'toy_honest' and data_seed == 1")
    assert [r.case["data_seed"] for r in toys.records] == [1]
    result = toys.run("toy_honest, toy_zeros", "--where", "num_q_heads > 99")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*--where 'num_q_heads > 99' leaves none of 4 cases of tier smoke*"])
    result = toys.run("toy_honest, toy_zeros", "--where", "num_q_heads > 99", "-n", "1", isolated=True)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*--where 'num_q_heads > 99' leaves none of 4 cases of tier smoke*"])
    result = toys.run("toy_honest, toy_zeros", "--where", "num_heads > 99")
    result.stderr.fnmatch_lines(["*num_heads*num_q_heads*"])
    toys.run("toy_honest, toy_zeros")
    toys.run("toy_honest, toy_zeros", "--lf")
    assert toys.outcomes == {"toy_zeros": {Outcome.FAIL}}


def test_collect_only_and_junit(toys: Toys) -> None:
    result = toys.run("toy_honest", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["toys.yaml::toys-toy_honest-fp32-*"])
    toys.run("toy_honest, toy_zeros", "--junitxml", "junit.xml")
    cases = ElementTree.parse(toys.pytester.path / "junit.xml").iter("testcase")
    found = {case.get("name", ""): case for case in cases}
    assert len(found) == 4
    failures = {name: case.find("failure") for name, case in found.items()}
    for name, failure in failures.items():
        assert (failure is not None) == ("toy_zeros" in name)
        if failure is not None:
            assert "Reproduce:" in (failure.text or "")


def test_a_malformed_matrix_is_one_message_without_a_traceback(toys: Toys) -> None:
    result = toys.run("toy_honest", axes="slidding_window: [none]")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*toys.yaml:9:3: *slidding_window*Did you mean 'sliding_window'?", "*^^^*"])
    assert "Traceback" not in result.stdout.str()


def test_a_tier_that_no_matrix_has_is_an_error(toys: Toys) -> None:
    result = toys.run("toy_honest", "--tier", "probe")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*no matrix has a case in tier probe: toys*"])


def test_a_run_in_which_everything_is_unsupported_is_not_green(toys: Toys) -> None:
    result = toys.run("toy_honest", axes="causal: [false]")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*nothing was tested: all 2 cases are outside the contracts of their kernels*"])


def test_a_run_that_cannot_read_its_matrix_does_not_leave_an_older_run_as_the_latest(toys: Toys) -> None:
    toys.run("toy_honest")
    assert len(toys.records) == 2
    toys.run("toy_honest", axes="slidding_window: [none]")
    assert toys.records == []


def test_a_matrix_whose_first_key_is_misspelt_does_not_vanish(toys: Toys) -> None:
    folder = toys.pytester.path / "sweeps"
    folder.mkdir()
    text = MATRIX.format(kernels="toy_honest", axes="", expect="", tier="full")
    (folder / "good.yaml").write_text(text)
    (folder / "bad.yaml").write_text(text.replace("matrix: toys", "matirx: toys2"))
    result = toys.pytester.runpytest_inprocess("-p", "harness.plugin", str(folder), f"--kernels={KERNELS}")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*bad.yaml*matirx*Did you mean 'matrix'?"])


@pytest.mark.parametrize(
    ("where", "until", "words"),
    [
        ("kernel == 'toy_honest' and num_q_heads == 3", "2999-01-01", "*meets no case of any tier*"),
        ("kernel == 'toy_honest' and num_q_heads == 3", "2020-01-01", "*expired on 2020-01-01*"),
    ],
)
def test_an_expectation_that_meets_nothing_is_an_error(toys: Toys, where: str, until: str, words: str) -> None:
    expect = EXPECT.format(kernel="toy_honest", until=until).replace("kernel == 'toy_honest'", where)
    result = toys.run("toy_honest", expect=expect)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([words])


def test_a_case_that_takes_its_worker_down_costs_no_other_case(toys: Toys) -> None:
    result = toys.run("toy_honest, toy_exiting", "-n", "2", "--dist=worksteal", expect=FEW, isolated=True)
    assert result.ret == 1
    assert toys.outcomes == {"toy_honest": {Outcome.PASS}, "toy_exiting": {Outcome.CRASH}}
    assert len(toys.records) == 3
    result.stdout.fnmatch_lines(["CRASH*toys-toy_exiting-*"])


def test_a_device_that_is_not_there_is_one_message(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = toys.run("toy_honest", "--device=cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--device cuda: torch finds no CUDA or ROCm device here*"])


def test_a_run_without_contract_checks_says_so(toys: Toys) -> None:
    toys.run("toy_honest").stdout.no_fnmatch_line("*contract checks were off*")
    toys.run("toy_honest", "--no-contract-checks").stdout.fnmatch_lines(["*unchecked*contract checks were off*"])


def test_a_kernel_that_changes_its_input_is_not_called_wrong_for_it(toys: Toys) -> None:
    toys.run("toy_greedy")
    assert {record.reason for record in toys.records} == {"q was written by the kernel"}


def test_a_run_that_dies_in_its_first_case_is_the_latest_run_all_the_same(toys: Toys) -> None:
    toys.run("toy_honest")
    assert len(toys.records) == 2
    toys.run("toy_exiting", "-n", "0", isolated=True)
    assert toys.records == []


def test_reports_that_cannot_be_written_are_one_message(toys: Toys) -> None:
    (toys.pytester.path / "reports").write_text("a file")
    result = toys.run("toy_honest")
    assert result.ret == 4
    result.stdout.fnmatch_lines(["*--reports: cannot write to *reports*"])
    assert "INTERNALERROR" not in result.stdout.str()


def test_the_log_says_whether_accesses_were_traced(toys: Toys) -> None:
    log = toys.pytester.path / "reports" / "latest.jsonl"
    toys.run("toy_honest").assert_outcomes(passed=2)
    assert {record.access for record in toys.records} == {"not traced: no Triton program ran"}
    assert read_run(log)[0].options["no_access_trace"] is False
    result = toys.run("toy_honest", "--no-access-trace")
    assert {record.access for record in toys.records} == {"not traced: turned off"}
    assert read_run(log)[0].options["no_access_trace"] is True
    result.stdout.fnmatch_lines(["*untraced*what kernels read was not held against their contracts*"])
