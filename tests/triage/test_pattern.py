"""Faults planted in masks, and what triage says about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.case import Case, Rows
from harness.errors import SetupBug
from harness.oracle.findings import Findings, TensorFindings, Worst
from harness.triage.explain import explain_blind, explain_error, explain_mismatch, explain_setup_bug
from harness.triage.pattern import find_pattern
from harness.triage.wording import compact, percent

Region = Callable[[torch.Tensor], torch.Tensor]  # picks a region of a tensor by indexing it

# decode at position 500, prefill 100..163, prefill 0..49, decode at 7, decode at 30
ROWS = Rows("mixed", (1, 64, 50, 1, 1), (500, 100, 0, 7, 30))
CASE = Case("planted", "some_kernel", ROWS, num_q_heads=16, gqa_ratio=4, head_size=96)


def blank(case: Case = CASE) -> torch.Tensor:
    return torch.zeros(case.rows.num_tokens, case.num_q_heads, case.value_size, dtype=torch.bool)


def found(mask: torch.Tensor, name: str = "out", nan: int = 0, unwritten: int = 0) -> TensorFindings:
    wrong = int(mask.sum())
    worst = None
    if wrong:
        token, head, *dim = mask.nonzero()[0].tolist()
        worst = Worst(token, head, dim[0] if dim else -1, 0.031, 0.412, 0.0031, 25.25)
    err = 25.25 if wrong else 0.4
    return TensorFindings(name, err, mask, wrong, mask.numel(), nan, 0, unwritten, worst)


def explain(mask: torch.Tensor, case: Case = CASE, lse: torch.Tensor | None = None, **counts: int) -> dict[str, Any]:
    tensors = (found(mask, **counts),) + (() if lse is None else (found(lse, "lse"),))
    explanation = explain_mismatch(case, Findings(tensors))
    json.dumps(explanation, allow_nan=False)  # plain data
    return explanation


def planted(region: Region) -> torch.Tensor:
    """The mask of a region given by indexing, views and copies alike: elements are told by their numbers."""
    numbers = torch.arange(blank().numel()).view(blank().shape)
    return torch.isin(numbers, region(numbers))


def test_one_token_is_named_by_sequence_phase_and_position() -> None:
    mask = blank()
    mask[0] = True
    explanation = explain(mask, lse=torch.zeros(mask.shape[:2], dtype=torch.bool))
    assert explanation["rows"] == {
        "wrong": [
            "1,536 of 179,712 elements = 1 token x 16 heads x 96 dims",
            "sequence 0, decode row, position 500 (query_len 1, context 500)",
        ],
        "how much": [
            "worst 25.2x tolerance: got 0.031 want 0.412 +- 0.0031",
            "at token 0, head 0 (kv head 0), dim 0",
            "(sequence 0, decode row, position 500 = page slot 31, offset 4)",
        ],
        "not": ["NaN, Inf, unwritten"],
        "seen": [
            "only decode rows are wrong: 1 of 3",
            "only sequence 0 is wrong",
            "the LSE is within its tolerance everywhere",
        ],
    }
    assert explanation["summary"] == ("1,536 of 179,712 elements = 1 token x 16 heads x 96 dims, worst 25.2x tolerance")
    out, lse = explanation["tensors"]
    assert out["exact"]
    assert out["sizes"] == [1, 16, 96]
    assert out["worst"]["page_slot"] == 31
    assert lse["wrong"] == 0
    assert "sizes" not in lse


@pytest.mark.parametrize(
    ("plant", "product", "hint"),
    [
        (lambda m: m[:, 4:8], "= 117 tokens x 4 heads x 96 dims", "only kv head 1 is wrong, 4 of its 4 heads"),
        (lambda m: m[:, 5], "= 117 tokens x 1 head x 96 dims", "only kv head 1 is wrong, 1 of its 4 heads"),
        (lambda m: m[:, ::4], "= 117 tokens x 4 heads x 96 dims", "only the first head of each kv head"),
        (lambda m: m[:, :, 64:], "= 117 tokens x 16 heads x 32 dims", "only dims from 64 on: behind the largest"),
        (lambda m: m[:, :, 1::2], "= 117 tokens x 16 heads x 48 dims", "only odd dims are wrong: every 2nd, 1-95"),
        (lambda m: m[1:115], "= 114 tokens x 16 heads x 96 dims", "only prefill rows are wrong: 2 of 2"),
        (lambda m: m[[64, 114]], "= 2 tokens x 16 heads x 96 dims", "only the last query of each wrong sequence"),
        (lambda m: m[65 + 32 : 65 + 50], "= 18 tokens x 16 heads x 96 dims", "partial tile of 32 queries"),
        (lambda m: m[[0, *range(1 + 12, 65)]], "= 53 tokens", "from position 112 (page slot 7, offset 0) on"),
        (lambda m: m, "= 117 tokens x 16 heads x 96 dims", "every element is wrong"),
    ],
)
def test_unmistakable_patterns(plant: Region, product: str, hint: str) -> None:
    explanation = explain(planted(plant))
    assert product in explanation["rows"]["wrong"][0]
    assert any(hint in text for text in explanation["rows"]["seen"])


def test_scattered_elements_raise_no_hint_and_are_not_called_a_product() -> None:
    mask = torch.rand(blank().shape, generator=torch.Generator().manual_seed(0)) < 0.001
    explanation = explain(mask)
    assert "seen" not in explanation["rows"]
    assert (
        explanation["rows"]["wrong"][0]
        == "192 of 179,712 elements within 97 tokens x 16 heads x 78 dims (< 1 % filled)"
    )
    assert all(f > 0 for strip in explanation["heat"] if strip["axis"] == "head" for f in strip["fractions"])


def test_token_head_pairs_factorise_without_being_a_full_product() -> None:
    mask = blank()
    for token, head in ((10, 3), (50, 9), (115, 1)):
        mask[token, head] = True
    pattern = find_pattern(CASE, found(mask))
    assert pattern is not None
    assert not pattern.exact
    assert pattern.describe() == "= 3 (token, head) pairs x 96 dims"
    mask[10, 3, 5] = False  # one element accidentally right: now only the bounding product is true
    pattern = find_pattern(CASE, found(mask))
    assert pattern is not None
    assert pattern.describe() == "within 3 tokens x 3 heads x 96 dims (33 % filled)"


def test_a_page_of_queries_is_a_range_of_positions() -> None:
    mask = blank()
    mask[1 + 12 : 1 + 28] = True  # positions 112..127 of sequence 1: page slot 7
    explanation = explain(mask)
    assert explanation["rows"]["wrong"][1] == (
        "sequence 1, prefill row, positions 112-127 (query_len 64, context 100), 16 of 64 tokens"
    )
    (strip,) = explanation["heat"]
    assert strip["axis"] == "token"
    assert strip["per_cell"] == 3
    assert len(strip["fractions"]) == 39
    assert [i for i, f in enumerate(strip["fractions"]) if f] == list(range(13 // 3, 28 // 3 + 1))


def test_hints_need_a_case_that_could_show_the_opposite() -> None:
    one = Case("planted", "k", Rows("one", (1,), (9,)), num_q_heads=2, head_size=64)
    mask = blank(one)
    mask[0, :, :32] = True
    assert "seen" not in explain(mask, one)["rows"]
    two = Case("planted", "k", Rows("two", (1, 1), (9, 9)), num_q_heads=2, gqa_ratio=2, head_size=64)
    mask = blank(two)
    mask[0, 1] = True  # no prefill rows, one kv head, a head size that is a power of two
    assert explain(mask, two)["rows"]["seen"] == ["only sequence 0 is wrong"]


def test_a_short_row_is_not_called_the_partial_tile_of_a_long_one() -> None:
    case = Case("planted", "k", Rows("short", (1, 9, 1), (40, 20, 7)), num_q_heads=2, head_size=8)
    mask = blank(case)
    mask[1:10] = True  # all of it: nothing is behind a full tile
    assert explain(mask, case)["rows"]["seen"] == ["only prefill rows are wrong: 1 of 1", "only sequence 1 is wrong"]


def test_every_wrong_element_zero_is_said() -> None:
    mask = blank()
    mask[:, 1:] = True  # heads of which only the first is computed
    wrong = found(mask)
    for num_zero, said in ((wrong.num_mismatched, True), (wrong.num_mismatched - 1, False)):
        rows = explain_mismatch(CASE, Findings((replace(wrong, num_zero=num_zero),)))["rows"]
        assert ("every wrong element is exactly 0" in rows.get("seen", [])) is said


def test_every_wrong_element_unwritten_or_nan_is_said() -> None:
    mask = blank()
    mask[3] = True
    rows = explain(mask, nan=1536, unwritten=1536)["rows"]
    assert "every wrong element was never written" in rows["seen"]
    assert rows["of these"] == ["1,536 NaN, 1,536 unwritten"]
    assert rows["not"] == ["Inf"]
    rows = explain(mask, nan=2)["rows"]
    assert rows["of these"] == ["2 NaN"]
    assert not any("every wrong element" in text for text in rows["seen"])


def test_hints_of_out_and_lse_are_not_mixed() -> None:
    mask = blank()
    mask[:, 8:12] = True  # kv head 2
    lse = torch.zeros(ROWS.num_tokens, 16, dtype=torch.bool)
    lse[:, 4:8] = True  # kv head 1
    seen = explain(mask, lse=lse)["rows"]["seen"]
    assert seen == ["out: only kv head 2 is wrong, 4 of its 4 heads", "lse: only kv head 1 is wrong, 4 of its 4 heads"]
    same = explain(mask, lse=mask.any(dim=2))["rows"]["seen"]
    assert same == ["only kv head 2 is wrong, 4 of its 4 heads"]
    right = explain(mask, lse=torch.zeros_like(lse))["rows"]["seen"]
    assert right == ["only kv head 2 is wrong, 4 of its 4 heads", "the LSE is within its tolerance everywhere"]


def test_kinds_of_fault_name_the_tensor_they_are_in() -> None:
    mask, lse = blank(), torch.zeros(ROWS.num_tokens, 16, dtype=torch.bool)
    mask[0], lse[0, :3] = True, True
    wrong = found(mask), found(lse, "lse", nan=3)
    rows = explain_mismatch(CASE, Findings(wrong))["rows"]
    assert rows["of these"] == ["3 NaN in lse"]
    assert rows["not"] == ["Inf, unwritten"]
    assert "lse: every wrong element is NaN" in rows["seen"]
    assert not any(line.endswith("every wrong element is NaN") and not line.startswith("lse") for line in rows["seen"])


def test_lse_alone_is_described_in_tokens_and_heads() -> None:
    lse = torch.zeros(ROWS.num_tokens, 16, dtype=torch.bool)
    lse[:, 8:12] = True
    explanation = explain(blank(), lse=lse)
    assert explanation["rows"]["lse"][0] == "468 of 1,872 elements = 117 tokens x 4 heads"
    assert explanation["rows"]["lse"][-2] == "at token 0, head 8 (kv head 2)"
    assert "only the LSE is wrong, the output is within its tolerance everywhere" in explanation["rows"]["seen"]
    assert explanation["summary"].startswith("lse: 468 of")
    assert "wrong" not in explanation["rows"]


def test_queries_before_the_first_key_have_negative_positions() -> None:
    case = Case("planted", "k", Rows("early", (4, 1), (-2, 3)), num_q_heads=2, head_size=8)
    mask = blank(case)
    mask[1] = True
    rows = explain(mask, case)["rows"]
    assert rows["wrong"][1] == "sequence 0, prefill row, position -1 (query_len 4, context -2), 1 of 4 tokens"
    assert rows["how much"][-1] == "(sequence 0, prefill row, position -1)"


def test_violations_come_without_wrong_elements_too() -> None:
    explanation = explain_mismatch(CASE, Findings((found(blank()),), ("the kernel changed k_cache",)))
    assert explanation["rows"]["violates"] == ["the kernel changed k_cache"]
    assert explanation["summary"] == "the kernel changed k_cache"
    assert explanation["shape"] == "violates: the kernel changed k_cache"
    other = explain_mismatch(CASE, Findings((found(blank()),), violations=("the kernel changed 3 elements",)))
    assert other["shape"] == "violates: the kernel changed # elements"


def test_infinite_errors_are_plain_data() -> None:
    mask = blank()
    mask[0, 0, 0] = True
    nan = float("nan")
    worst = Worst(0, 0, 0, nan, 0.4, 0.003, float("inf"))
    tensor = TensorFindings("out", float("inf"), mask, 1, mask.numel(), 1, 0, 0, worst)
    explanation = explain_mismatch(CASE, Findings((tensor,)))
    assert explanation["tensors"][0]["worst"]["got"] == "nan"
    assert explanation["rows"]["how much"][0] == "worst beyond any tolerance: got nan want 0.4 +- 0.003"


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of out has shape \(3, 16, 96\), the case implies \(117, 16, 96\)"):
        find_pattern(CASE, found(torch.ones(3, 16, 96, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("indices", "total", "text"),
    [
        ([], 4, "none"),
        (range(64), 64, "all 64"),
        ([0], 1, "0"),
        (range(64), 128, "0-63"),
        (range(1, 128, 2), 128, "every 2nd, 1-127"),
        (range(0, 90, 3), 90, "every 3rd, 0-87"),
        ([i for i in range(80) if i % 32 < 16], 80, "16 of every 32, 0-79"),
        ([i for i in range(72) if i % 32 < 16], 72, "16 of every 32, 0-71"),
        ([i for i in range(72) if i % 32 < 16], None, "0-15, 32-47, 64-71"),
        ([1, 2, 5, 9], 10, "1-2, 5, 9"),
        ([0, 2, 5, 6, 9, 11, 12], 20, "0, 2, 5-6, 9 and 2 more"),
    ],
)
def test_compact(indices: Sequence[int], total: int | None, text: str) -> None:
    assert compact(list(indices), total) == text


def test_percent_is_never_rounded_to_all_or_nothing() -> None:
    assert [percent(f) for f in (0.0, 1e-6, 0.334, 0.9999, 1.0)] == ["0 %", "< 1 %", "33 %", "> 99 %", "100 %"]


def test_other_outcomes() -> None:
    bug = explain_setup_bug(SetupBug("query_start_loc", "int32", "int64", "torch.cumsum of int32 returns int64"))
    assert bug["rows"]["before launch"] == [
        "query_start_loc: got int64, expected int32",
        "(torch.cumsum of int32 returns int64)",
    ]
    blind = explain_blind({"zero output": 0.11, "K descale": 0.0}, advice="data: probe")
    assert blind["rows"] == {
        "cannot see": ["zero output (0.11 of tolerance), K descale (0 of tolerance)"],
        "try": ["data: probe"],
    }
    try:
        raise KeyError("boom")
    except KeyError as error:
        explanation = explain_error(error)
    assert explanation["rows"]["harness"] == ["KeyError: 'boom'"]
    assert explanation["traceback"][0].startswith("Traceback")
    assert "raise KeyError" in "\n".join(explanation["traceback"])
