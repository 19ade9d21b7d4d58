"""Where expressions: what they mean on cases, what they refuse, and where they say so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.case import Case, Placement, Rows
from harness.matrix.expression import ExpressionError
from harness.matrix.where import DERIVED, Where

CASE = Case(
    matrix="demo",
    kernel="alpha",
    rows=Rows("mix", (1, 5), (-1, 20)),
    num_q_heads=12,
    gqa_ratio=3,
    kv_dtype="fp8_e4m3",
    sinks=True,
    logits_soft_cap=30.0,
    placement=Placement("explicit", "mine", ((1,), (2, 3))),
    data_seed=7,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kernel == 'alpha'", True),
        ("kernel != 'alpha'", False),
        ("num_kv_heads == 4 and gqa_ratio * num_kv_heads == num_q_heads", True),
        ("not sinks or alibi", False),
        ("(sinks or alibi) and not alibi", True),
        ("kv_dtype in ('auto', 'fp8_e4m3')", True),
        ("page_size not in [1, 32]", True),
        ("16 <= page_size < 17", True),
        ("-page_size + 2 * 3 - 10 // 3 % 2 == -11", True),
        ("logits_soft_cap / 4 == 7.5", True),
        ("sliding_window == none", True),
        ("sliding_window is none", True),
        ("sliding_window is not none", False),
        ("logits_soft_cap == none", False),
        ("sliding_window < 16 or sliding_window >= 16", False),  # none is ordered nowhere
        ("sliding_window + 1 > 0", False),
        ("sliding_window != 16", True),
        ("rows == 'mix' and placement == 'mine'", True),
        ("seed == 7 and data_seed == 7", True),
        ("num_seqs == 2 and max_query_len == 5 and min_query_len == 1", True),
        ("max_seq_len == 25 and max_context_len == 20 and min_context_len == -1", True),
        ("has_prefill and has_decode", True),
        ("sinks == true and alibi == false and causal", True),
    ],
)
def test_value_on_a_case(text: str, expected: bool) -> None:
    assert Where.parse(text).evaluate(CASE) is expected


def test_none_is_ordered_once_it_has_a_value() -> None:
    where = Where.parse("sliding_window < 16")
    assert not where.evaluate(CASE)
    assert where.evaluate(replace(CASE, sliding_window=15))
    assert not where.evaluate(replace(CASE, sliding_window=16))


def test_axes_are_those_the_condition_depends_on() -> None:
    assert Where.parse("num_kv_heads > 1 and seed == 0").axes == {"num_q_heads", "gqa_ratio", "data_seed"}
    assert Where.parse("has_decode").axes == {"rows", "page_size", "sliding_window", "geometry_seed"}
    assert Where.parse("rows == 'mix'").axes == {"rows"}


@pytest.mark.parametrize(
    ("text", "what", "offset", "width"),
    [
        ("sinks and head_sise == 3", "unknown name 'head_sise'. Did you mean 'head_size'?", 10, 9),
        ("dtype == 'fp61'", "unknown dtype 'fp61'. Did you mean 'fp16'?", 9, 6),
        ("'fp61' == dtype", "unknown dtype 'fp61'. Did you mean 'fp16'?", 0, 6),
        ("data in ('normal', 'nedle')", "unknown data 'nedle'. Did you mean 'needle'?", 19, 7),
        ("sinks and page_size", "'page_size' is a number, not true or false: compare it with something", 10, 9),
        ("not kernel", "'kernel' is a text, not true or false: compare it with something", 4, 6),
        ("kernel < 3", "'kernel' is a text, not a number", 0, 6),
        ("page_size == 'big'", "page_size is a number, 'big' a text: they are never equal", 13, 5),
        ("page_size in 16", "'in' needs a list such as (1, 16) or ['fp16', 'bf16']", 13, 2),
        ("page_size ** 2 == 4", "only + - * / // and % are allowed here", 0, 14),
        (
            "__import__('os') == 1",
            "'__import__('os')' is not allowed here: only comparisons, logic and arithmetic",
            0,
            16,
        ),
        ("kernel.name == 'x'", "'kernel.name' is not allowed here: only comparisons, logic and arithmetic", 0, 11),
        ("page_size", "this is a number, not a condition: compare it with something", 0, 9),
        ("page_size == b'x'", "b'x' is neither a number nor a text", 13, 4),
        ("page_size ==", "this is no expression; for example: page_size == 16", 12, 1),
    ],
)
def test_refusals_say_where(text: str, what: str, offset: int, width: int) -> None:
    with pytest.raises(ExpressionError) as caught:
        Where.parse(text)
    assert (caught.value.what, caught.value.offset, caught.value.width) == (what, offset, width)


def test_the_message_underlines_the_place() -> None:
    with pytest.raises(ExpressionError) as caught:
        Where.parse("sinks and head_sise == 3")
    assert str(caught.value) == (
        "unknown name 'head_sise'. Did you mean 'head_size'?\n    sinks and head_sise == 3\n              ^^^^^^^^^"
    )


def test_known_words_can_be_added() -> None:
    with pytest.raises(ExpressionError, match=r"unknown kernel 'alfa'\. Did you mean 'alpha'\?"):
        Where.parse("kernel == 'alfa'", {"kernel": ("alpha", "beta")})
    assert Where.parse("kernel == 'alfa'").evaluate(CASE) is False  # nothing known: nothing to refuse


def test_dividing_by_zero_is_told_and_not_raised_raw() -> None:
    where = Where.parse("8 % geometry_seed == 0")
    with pytest.raises(ExpressionError, match="'8 % geometry_seed' divides by zero"):
        where.evaluate(CASE)


def test_every_derived_name_evaluates() -> None:
    assert {name: derived.value(CASE) for name, derived in DERIVED.items()}["num_kv_heads"] == 4
