"""What laws are for: a fault of the online softmax fails under the law made for it and passes under others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Case, Rows
from harness.interpreter import prepare
from harness.kernel.registry import find_kernels
from harness.run.outcome import Outcome
from harness.run.run_case import Options, run_case
from tests.kernels.paged_problem import with_fault

prepare("cpu")

CONTRACT = find_kernels()["unified_paged"]
CASE = Case("m", "k", Rows("r", (5, 1), (120, 200)), dtype="bf16", num_q_heads=4, gqa_ratio=2, head_size=32)
NOT_RESCALED = ("acc = acc * alpha[:, None] + tl.dot", "acc = acc + tl.dot")
NO_MAXIMUM = ("new_max = tl.maximum(row_max, tl.max(scores, 1))", "new_max = tl.maximum(row_max, 0.0)")


@pytest.mark.parametrize(
    ("old", "new", "shown_by", "hidden_by"),
    [(*NOT_RESCALED, "rising", "falling"), (*NO_MAXIMUM, "large", "normal"), (*NO_MAXIMUM, "large", "rising")],
)
def test_one_law_shows_what_another_hides(tmp_path: Path, old: str, new: str, shown_by: str, hidden_by: str) -> None:
    assert CONTRACT.folder is not None
    with_fault(CONTRACT, tmp_path, old, new)
    faulty = replace(CONTRACT, folder=tmp_path / CONTRACT.folder.name)
    for data, expected in ((shown_by, Outcome.FAIL), (hidden_by, Outcome.PASS)):
        case = replace(CASE, data=data)
        assert run_case(case, CONTRACT, Options(device="cpu")).outcome is Outcome.PASS
        assert run_case(case, faulty, Options(device="cpu", access_trace=False)).outcome is expected


def test_tiny_hides_scores_that_are_not_looked_at(tmp_path: Path) -> None:
    """P is all but equal anyway: a kernel that ignores q gets the same means, within half a unit of bfloat16."""
    assert CONTRACT.folder is not None
    with_fault(CONTRACT, tmp_path, 'input_precision="ieee") * softmax_scale', 'input_precision="ieee") * 0.0')
    faulty = replace(CONTRACT, folder=tmp_path / CONTRACT.folder.name, returns_lse=False)
    for data, expected in (("normal", Outcome.FAIL), ("tiny", Outcome.PASS)):
        assert run_case(replace(CASE, data=data), faulty, Options(device="cpu", access_trace=False)).outcome is expected
