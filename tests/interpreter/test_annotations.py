"""Annotations of a module that evaluates them (no future import): types and Triton's short names are both honoured."""

# ruff: noqa: ANN001, ANN201 - arguments of kernels get their types at the launch.
import pytest
import torch
import triton
import triton.language as language

from harness.interpreter.strict import strict_interpreter


@triton.jit
def short_name_kernel(out, page, stride: "i64", BLOCK: "tl.constexpr"):  # noqa: F821
    language.store(out, page * stride)


@triton.jit
def type_kernel(out, page, stride: language.int64, BLOCK: language.constexpr):
    language.store(out, page * stride)


@triton.jit
def plain_kernel(out, page, stride, BLOCK: language.constexpr):
    language.store(out, (page * stride).to(language.int64))


@pytest.mark.parametrize(
    ("kernel", "want"), [(short_name_kernel, 2**32), (type_kernel, 2**32), (plain_kernel, 0)]
)  # fmt: skip
def test_annotated_scalar_widens_the_product(kernel: object, want: int) -> None:
    out = torch.full((1,), -1, dtype=torch.int64)
    with strict_interpreter():
        kernel[(1,)](out, 2**16, 2**16, BLOCK=1)  # type: ignore[index]
    assert out.item() == want
