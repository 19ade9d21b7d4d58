"""Which device kernels ran is observed: a path not taken, a foreign kernel, none at all and a second store are seen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from harness.case import Case, Rows
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, find_kernels
from harness.run.outcome import Outcome, Verdict
from harness.run.plant import NO_PLANT, Plant
from harness.run.run_case import Options, run_case

KERNELS = find_kernels([Path(__file__).parents[1] / "plugin" / "kernels"])
MIXED = Rows("mixed", (5, 1), (20, 33))


def run(contract: Contract, case: Case, plant: Plant = NO_PLANT) -> Verdict:
    return run_case(case, contract, Options(device="cpu", contract_checks=False, plant=plant))


def case(kernel: str, **axes: object) -> Case:
    return Case("paths", kernel, MIXED, num_q_heads=2, head_size=16, **axes)  # type: ignore[arg-type]


def test_a_split_that_was_not_taken_fails_though_every_number_is_right() -> None:
    unified = KERNELS["unified_paged"]
    assert run(unified, case("unified_paged", num_splits=2)).outcome is Outcome.PASS
    dropped = replace(NO_PLANT, arguments=lambda args: replace(args, num_splits=0))
    verdict = run(unified, case("unified_paged", num_splits=2), dropped)
    assert verdict.outcome is Outcome.FAIL
    assert "did not launch split_kv_combine_kernel" in verdict.reason
    assert "against its dispatch 'split_kv': every condition holds" in verdict.reason
    assert verdict.ran == ("unified_paged_kernel",)


def test_a_kernel_that_the_dispatch_does_not_lead_to_fails_beside_the_one_that_it_does() -> None:
    unified = KERNELS["unified_paged"]
    forced = replace(NO_PLANT, arguments=lambda args: replace(args, num_splits=2))
    verdict = run(unified, case("unified_paged"), forced)
    assert verdict.outcome is Outcome.FAIL
    assert "launched split_kv_combine_kernel, against its dispatch 'split_kv': no num_splits is given" in verdict.reason


def test_a_kernel_that_the_contract_does_not_name_fails() -> None:
    unified = replace(KERNELS["unified_paged"], launches=("other_kernel",), dispatch=None)
    verdict = run(unified, case("unified_paged"))
    assert verdict.outcome is Outcome.FAIL
    assert "launched unified_paged_kernel, which the contract of unified_paged does not name" in verdict.reason


def test_a_kernel_that_launched_nothing_fails_and_is_not_said_to_have_run() -> None:
    honest = KERNELS["toy_honest"]
    assert run(honest, case("toy_honest", dtype="fp32")).ran == ("toy_honest",)
    verdict = run(replace(honest, launches=("fast_kernel",)), case("toy_honest", dtype="fp32"))
    assert verdict.outcome is Outcome.FAIL
    assert "no device kernel was launched" in verdict.reason
    assert verdict.ran == ()


def test_an_output_that_a_later_launch_stores_again_fails(tmp_path: Path) -> None:
    chunked = KERNELS["chunked_prefill_paged_decode"]
    assert run(chunked, case(chunked.name)).outcome is Outcome.PASS
    assert chunked.folder is not None
    for name in ("_shared", chunked.folder.name):
        shutil.copytree(IN_TREE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / chunked.folder.name / "chunked_prefill_paged_decode.py"
    text = source.read_text()
    assert text.count("skip_decode=True") == 1
    source.write_text(text.replace("skip_decode=True", "skip_decode=False"))
    verdict = run(replace(chunked, folder=source.parent), case(chunked.name))
    assert verdict.outcome is Outcome.FAIL
    assert "stored by one launch and again by a later one" in verdict.reason
