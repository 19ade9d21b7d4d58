"""Hints to the compiler are checked against the values they are given."""

# ruff: noqa: ANN001, ANN201 - arguments of kernels get their types at the launch.
from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from harness.interpreter.hints import broken_hint
from harness.interpreter.strict import strict_interpreter


@pytest.mark.parametrize(
    ("name", "data", "values"),
    [
        ("multiple_of", [32], [16]),
        ("multiple_of", [0, 16, 48], [16]),
        ("multiple_of", [16, 17, 18, 19], [16]),  # a contiguous run is known by its first value
        ("multiple_of", [14, 15, 0, 1, 2], [2]),
        ("max_contiguous", [4, 5, 6, 7, 0, 1, 2, 3], [4]),
        ("max_contiguous", [4, 5, 6, 7], [16]),
        ("max_constancy", [3, 3, 3, 3, 5, 5, 5, 5], [4]),
        ("multiple_of", [[0, 8], [1, 9]], [8, 1]),  # contiguous along dimension 0
    ],
)
def test_true_hints_are_silent(name: str, data: list[int], values: list[int]) -> None:
    assert broken_hint(name, np.array(data), values) is None


@pytest.mark.parametrize(
    ("name", "data", "values"),
    [
        ("multiple_of", [24], [16]),
        ("multiple_of", [0, 8, 16], [16]),
        ("multiple_of", [4, 5, 6, 7], [8]),
        ("max_contiguous", [4, 5, 6, 7, 0, 1, 2, 3], [8]),
        ("max_contiguous", [0, 2, 4, 6], [2]),
        ("max_constancy", [3, 3, 3, 5], [4]),
        ("multiple_of", [[0, 1], [4, 5]], [8, 1]),
    ],
)
def test_false_hints_are_named(name: str, data: list[int], values: list[int]) -> None:
    message = broken_hint(name, np.array(data), values)
    assert message is not None
    assert name in message


@triton.jit
def hinted_kernel(x, stride):
    stride = tl.multiple_of(stride, 16)
    i = tl.max_contiguous(tl.multiple_of(tl.arange(0, 16), 16), 16)
    tl.store(x + stride + i, 1.0)


def test_wrong_hint_is_recorded_once_with_its_line() -> None:
    x = torch.zeros(64)
    with strict_interpreter({"x": x}) as session:
        hinted_kernel[(1,)](x, 32)
        assert session.violations == []
        hinted_kernel[(3,)](x, 24)
    (violation,) = [v for v in session.violations if v.kind == "wrong_hint"]
    assert (violation.kernel, violation.launch) == ("hinted_kernel", 1)
    assert "multiple_of([16])" in violation.message
    line = hinted_kernel.fn.__code__.co_firstlineno + 2
    assert violation.where == f"test_hints.py:{line} in hinted_kernel"
