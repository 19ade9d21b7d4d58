"""A run of everything fails where it left out a branch of a dispatch without a reason; a part of one does not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import triton  # noqa: F401  an inner session forgets what it imports, and triton and torch are imported once only

import harness.run.run_case  # noqa: F401
from harness import plugin
from harness.cli import main
from harness.reporting import Reporting
from harness.session import PROJECT, SESSION, Session
from harness.store.run_log import read_run

MATRIX = """
matrix: {name}
about: A kernel with a dispatch.
kernels: [unified_paged]
fixed: {{num_q_heads: 2, head_size: 16}}
axes: {{num_splits: [{splits}], rows: [{{name: mix, query_lens: [2, 1], context_lens: [3, 20]}}]}}
tiers: {{smoke: full}}
{stated}
"""
LEFT_OUT = "unreached: [{kernel: unified_paged, branch: all_hold, because: no split is asked for}]"


class Sweeps:
    """Runs all matrices of one folder, or one of them."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester

    def write(self, name: str, splits: str, stated: str = "") -> None:
        (self.pytester.path / f"{name}.yaml").write_text(MATRIX.format(name=name, splits=splits, stated=stated))

    def run(self, what: str = ".", *options: str) -> pytest.RunResult:
        reports = f"--reports={self.pytester.path / 'reports'}"
        return self.pytester.runpytest_inprocess(
            "-p", "harness.plugin", "--device=cpu", "-n0", reports, str(self.pytester.path / what), *options
        )


@pytest.fixture
def sweeps(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("COLUMNS", "120")
    return Sweeps(pytester)


def test_a_full_run_takes_every_branch_or_fails(sweeps: Sweeps) -> None:
    sweeps.write("plain", "none")
    result = sweeps.run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*dispatch*unified_paged: 1 of 2 branches reached; never: all_hold*"])
    sweeps.write("split", "2")
    result = sweeps.run()
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*dispatch*unified_paged: 2 of 2 branches reached"])
    _, records = read_run(sweeps.pytester.path / "reports" / "latest.jsonl")
    assert {record.branch for record in records} == {"all_hold", "splits"}


def test_one_matrix_of_a_folder_or_some_of_its_cases_are_no_full_run(sweeps: Sweeps) -> None:
    sweeps.write("plain", "none")
    sweeps.write("split", "none, 2")
    for what, options in (("plain.yaml", ()), (".", ("--where", "num_splits == none"))):
        result = sweeps.run(what, *options)
        assert result.ret == 0
        result.stdout.fnmatch_lines(["*1 of 2 branches reached by what ran; never: all_hold*"])


def test_what_is_explained_may_be_left_out_and_must_be(sweeps: Sweeps) -> None:
    sweeps.write("plain", "none", LEFT_OUT)
    result = sweeps.run()
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*never: all_hold (explained: no split is*"])
    sweeps.write("split", "2")
    result = sweeps.run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*reached though said to be left out: all_hold*"])


def test_workers_tell_the_controller_what_is_explained() -> None:
    config: Any = SimpleNamespace(stash=pytest.Stash(), workerinput={}, workeroutput={})
    config.stash[SESSION] = worker = Session(config, {}, None)
    worker.explained["plain.yaml"] = [("unified_paged", "all_hold", "no split is asked for")]
    plugin.pytest_sessionfinish(SimpleNamespace(config=config))  # type: ignore[arg-type]
    controller = Reporting(Session(config, {}, None))
    controller.pytest_testnodedown(SimpleNamespace(workeroutput=config.workeroutput))
    assert controller.session.explained == worker.explained


def test_a_statement_that_the_dispatch_refutes_is_a_mistake_of_the_matrix(sweeps: Sweeps) -> None:
    sweeps.write("plain", "none", "must_run: [{where: has_decode, kernel: split_kv_combine_kernel}]")
    result = sweeps.run()
    assert result.ret == 2
    result.stdout.fnmatch_lines(
        ["*plain.yaml:8:40: plain-unified_paged-h2-d16-mix: the dispatch of unified_paged leads*"]
    )
    assert main(["check", str(sweeps.pytester.path)]) == 2


def test_the_command_says_which_branch_each_case_takes_here_and_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(kernel: str, *options: str) -> tuple[int, str]:
        path = tmp_path / "plain.yaml"
        path.write_text(MATRIX.format(name="plain", splits="none", stated="").replace("unified_paged", kernel))
        status = main(["dispatch", str(path), *options])
        said = capsys.readouterr()
        return status, said.out + said.err

    status, said = asked("unified_paged")
    assert status == 1
    assert "unified_paged, dispatch split_kv: 1 of 2 branches reached" in said
    status, said = asked("chunked_prefill_paged_decode", "--platform", "gfx942", "--every-case")
    assert status == 1
    assert "chunked_prefill_paged_decode on gfx942, dispatch rocm_paged_attention: 1 of 10 branches" in said
    assert "the head size is neither 64 nor 128: paged_decode_kernel, 1 case" in said
    assert "sinks        sinks are given: never" in said
    status, said = asked("batch_prefill", "--platform", "gfx942")
    assert (status, "never" in said) == (0, False)  # which no sweep could change
    assert "dispatch aiter_batch_prefill: no case has a choice" in said
    assert "V3 is built for gfx950 only: batch_prefill_v2_kernel, 1 case" in said
    assert asked("batch_prefill", "--platform", "gfx950")[0] == 1
    assert asked("unified_paged", "--platform", "gfx942")[0] == 2
    assert asked("unified_paged", "--platform", "gfx94") == (
        2, "--platform: no kernel chooses on 'gfx94'. Did you mean 'gfx942'?\n"
    )  # fmt: skip
    misspelt = MATRIX.format(name="plain", splits="none", stated="").replace("{num", "{writer: nobody, num")
    (tmp_path / "plain.yaml").write_text(misspelt)
    assert main(["dispatch", str(tmp_path)]) == 2
    assert "unknown writer 'nobody'" in capsys.readouterr().err
    (tmp_path / "plain.yaml").unlink()
    (tmp_path / "explained.yaml").write_text(MATRIX.format(name="plain", splits="none", stated=LEFT_OUT))
    assert main(["dispatch", str(tmp_path)]) == 0
    assert "no split is asked for: left out, as stated" in capsys.readouterr().out
