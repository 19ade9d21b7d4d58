"""What a matrix states of dispatch: wrong names and refuted statements have a place, a silent fallback is a failure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Case, Rows
from harness.dispatch.stated import check_statements
from harness.kernel.registry import find_kernels
from harness.matrix import Matrix, MatrixError, load
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT
from harness.run.run_case import Options, run_case

KERNELS = find_kernels()
TEXT = """\
matrix: demo
about: A demonstration.
kernels: [unified_paged, torch_sdpa_paged]
fixed: {num_q_heads: 2, head_size: 16}
axes: {num_splits: [none, 2], rows: [{name: mix, query_lens: [5, 1], context_lens: [20, 33]}]}
must_run:
  - {where: num_splits != none and kernel == 'unified_paged', kernel: split_kv_combine_kernel}
unreached:
  - {kernel: unified_paged, branch: splits, because: why, tiers: [ci, nightly]}
tiers: {smoke: {cover: 2}}
"""
MISTAKES = {
    "unknown device kernel": (
        "kernel: split_kv_combine_kernel",
        "kernel: split_kv_kernel",
        "7:71: unknown device kernel of unified_paged, torch_sdpa_paged 'split_kv_kernel'. "
        "Did you mean 'split_kv_combine_kernel'?",
    ),
    "a kernel that does not launch it": (
        "num_splits != none and kernel == 'unified_paged'",
        "kernel == 'torch_sdpa_paged'",
        "torch_sdpa_paged never launches split_kv_combine_kernel, which the matrix states (line 7)",
    ),
    "refuted by the dispatch": (
        "num_splits != none and",
        "num_splits == none and",
        "7:71: demo-unified_paged-h2-d16-mix: the dispatch of unified_paged leads to unified_paged_kernel "
        "(splits: no num_splits is given), and the matrix states split_kv_combine_kernel (line 7)",
    ),
    "no case": (
        "num_splits != none and",
        "num_splits == 7 and",
        "7:68: this meets no case of any tier: 'num_splits == 7 and kernel == 'unified_paged''",
    ),
    "unknown kernel": (
        "{kernel: unified_paged, branch",
        "{kernel: unified, branch",
        "9:14: unknown kernel with a dispatch 'unified'. Did you mean 'unified_paged'?",
    ),
    "kernel without a dispatch": (
        "{kernel: unified_paged, branch",
        "{kernel: torch_sdpa_paged, branch",
        "9:14: unknown kernel with a dispatch 'torch_sdpa_paged'. Known: unified_paged",
    ),
    "unknown branch": (
        "branch: splits",
        "branch: split",
        "9:37: unknown branch of unified_paged 'split'. Did you mean 'splits'?",
    ),
    "unknown tier": ("tiers: [ci, nightly]", "tiers: [ci, weekly]", "9:71: unknown tier 'weekly'. Known: "),
    "no reason": (", because: why", "", "9:5: the element of unreached has no because"),
    "unknown key": ("{where: num", "{when: num", "7:6: unknown must_run key 'when'. Did you mean 'where'?"),
}


def read(folder: Path, text: str) -> Matrix:
    path = folder / "demo.yaml"
    path.write_text(text)
    matrix = load(path, kernel_names=KERNELS)
    check_statements(
        matrix, KERNELS, matrix.expand("smoke", supported=lambda c: KERNELS[c.kernel].unsupported(c)).cases
    )
    return matrix


def test_statements_are_read(tmp_path: Path) -> None:
    matrix = read(tmp_path, TEXT)
    assert [(one.where.text, one.kernel) for one in matrix.must_run] == [
        ("num_splits != none and kernel == 'unified_paged'", "split_kv_combine_kernel")
    ]
    (left_out,) = matrix.unreached
    assert (left_out.branch, left_out.because, left_out.tiers) == ("splits", "why", ("ci", "nightly"))


def test_other_tiers_are_asked_only_about_a_statement_that_no_case_of_this_one_meets(tmp_path: Path) -> None:
    matrix = read(tmp_path, TEXT)
    cases = matrix.expand("smoke", supported=lambda c: KERNELS[c.kernel].unsupported(c)).cases
    asked: list[str] = []

    def everywhere() -> tuple[Case, ...]:
        asked.append("other tiers")  # to expand them takes seconds
        return cases

    check_statements(matrix, KERNELS, cases, everywhere)
    assert not asked
    check_statements(matrix, KERNELS, [case for case in cases if case.num_splits is None], everywhere)
    assert asked == ["other tiers"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_statement_that_cannot_hold_is_a_mistake_with_its_place(tmp_path: Path, mistake: str) -> None:
    right, wrong, told = MISTAKES[mistake]
    assert TEXT.count(right) == 1
    with pytest.raises(MatrixError) as error:
        read(tmp_path, TEXT.replace(right, wrong))
    assert told in "\n".join(error.value.headlines)


def run(tmp_path: Path, num_splits: int | None, *, launched_with: int | None = None, where: str = "true") -> Verdict:
    """One case of unified_paged, whose matrix states the combine; `launched_with` falls back behind its back."""
    text = TEXT.replace("num_splits != none and kernel == 'unified_paged'", where)
    (tmp_path / "demo.yaml").write_text(text)
    stated = load(tmp_path / "demo.yaml").must_run
    plant = NO_PLANT
    if launched_with is not None:
        plant = replace(plant, arguments=lambda args: replace(args, num_splits=launched_with))
    case = Case("demo", "unified_paged", Rows("mix", (5, 1), (20, 33)), num_q_heads=2, head_size=16)
    options = Options(device="cpu", contract_checks=False, plant=plant, must_run=stated, access_trace=False)
    return run_case(replace(case, num_splits=num_splits), KERNELS["unified_paged"], options)


def test_a_silent_fallback_fails_though_every_number_is_right(tmp_path: Path) -> None:
    verdict = run(tmp_path, 2)
    assert (verdict.outcome, verdict.branch) == (Outcome.PASS, "all_hold")
    verdict = run(tmp_path, 2, launched_with=0)
    assert verdict.outcome is Outcome.FAIL
    assert (
        "silent fallback: unified_paged_kernel ran instead of split_kv_combine_kernel, stated on line 7, "
        "although its dispatch leads there (all_hold: every condition holds)"
    ) in verdict.reason


def test_a_case_whose_dispatch_says_otherwise_is_not_launched(tmp_path: Path) -> None:
    verdict = run(tmp_path, None)
    assert (verdict.outcome, verdict.ran, verdict.branch) == (Outcome.TEST_BUG, (), "")
    assert "the dispatch of unified_paged leads to unified_paged_kernel (splits: no num_splits" in verdict.reason
    assert run(tmp_path, None, where="num_splits == 2").outcome is Outcome.PASS
