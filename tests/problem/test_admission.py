import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from harness.case import Case, Placement, Rows
from harness.problem.admission import (
    LAWS,
    law_refusal,
    layout_refusal,
    pages_needed,
    placement_refusal,
    shared_prefix_len,
)

CASE = Case("m", "k", Rows("r", (4, 1, 1, 3), (60, 99, -1, 0)))


def test_deciding_needs_no_torch() -> None:
    code = "import sys, harness.problem.admission; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_plain_cases_are_let_through() -> None:
    for data in LAWS:
        assert law_refusal(replace(CASE, data=data)) is None
    for kind in ("shuffled", "sequential", "reversed", "shared_prefix"):
        assert placement_refusal(replace(CASE, placement=Placement(kind, kind))) is None


def test_a_wide_soft_cap_leaves_negative_scores_low() -> None:
    assert law_refusal(replace(CASE, data="negative", logits_soft_cap=500.0)) is None
    assert law_refusal(replace(CASE, data="negative", logits_soft_cap=100.0)) is not None


def test_layouts_that_fit_and_those_that_do_not() -> None:
    for layout, axes, words in (
        ("linear_3d", {"page_size": 1}, None),
        ("linear_3d", {"page_size": 16}, "a page is one token, not 16"),
        ("vectorized", {"page_size": 24, "head_size": 40}, None),
        ("vectorized", {"page_size": 4, "head_size": 4, "dtype": "fp32"}, None),
        ("vectorized", {"page_size": 4}, "page_size 4 is no multiple of 8, a vector of fp16"),
        ("vectorized", {"kv_dtype": "fp8_e4m3", "head_size": 40}, "head_size 40 is no multiple of 16, a vector of fp8"),
        ("vllm_classic", {"page_size": 4, "head_size": 4}, None),
        ("hnd", {"page_size": 1}, None),
    ):
        said = layout_refusal(replace(CASE, layout=layout, **axes))  # type: ignore[arg-type]
        assert (said is None) is (words is None)
        assert said is None or f"{layout}: {words}" in said


def test_pages_and_prefix() -> None:
    assert pages_needed(CASE) == (4, 7, 0, 1)
    assert shared_prefix_len(CASE) == 0
    shared = replace(CASE, placement=Placement("shared_prefix", "shared"))
    assert shared_prefix_len(shared) == 48
    assert shared_prefix_len(replace(shared, page_size=24)) == 48
    assert placement_refusal(replace(shared, page_size=64)) is not None
