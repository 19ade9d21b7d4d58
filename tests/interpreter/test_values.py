"""Values: what the stock interpreter computes wrongly is shown wrong first, then right under the strict one."""

# ruff: noqa: ANN001, ANN201 - arguments of kernels get their types at the launch.
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from harness.interpreter.strict import strict_interpreter

NAN = float("nan")


def strictly(launch: Callable[[], None]) -> None:
    with strict_interpreter() as session:
        launch()
    assert session.violations == []
    assert len(session.launches) == 1


@triton.jit
def convert_kernel(x, out, N: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def converted(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=dtype)
    convert_kernel[(1,)](x, out, N=x.numel(), ROUNDING=rounding)
    return out


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_floats_decode(dtype: torch.dtype, to: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    x = bits.view(dtype) if dtype.itemsize == 1 else torch.randn(256).to(dtype)
    with strict_interpreter():
        got = converted(x, to)
    torch.testing.assert_close(got, x.float().to(to), rtol=0, atol=0, equal_nan=True)


def test_stock_decodes_fp8_nan_to_a_number() -> None:
    x = torch.full((16,), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    stock = converted(x, torch.float32)
    assert (stock == 480).all()
    with strict_interpreter():
        assert converted(x, torch.float32).isnan().all()


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_encode_rounds_to_even_and_saturates(source: torch.dtype) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)).to(source) * 20
    x[:4] = torch.tensor([17.0, 19.0, 15.9, 440.0])  # ties at 17 and 19; carries into the exponent at 15.9
    want = x.float().to(torch.float8_e4m3fn).float()
    assert not torch.equal(converted(x, torch.float8_e4m3fn).float(), want)  # stock
    with strict_interpreter():
        assert torch.equal(converted(x, torch.float8_e4m3fn).float(), want)
        special = torch.tensor([1000.0, -1000.0, NAN, float("inf")] * 4).to(source)
        got = converted(special, torch.float8_e4m3fn).float()[:4]
    torch.testing.assert_close(got, torch.tensor([448.0, -448.0, NAN, 448.0]), equal_nan=True)


def test_rounding_toward_zero() -> None:
    x = torch.tensor([1.0 + 0.9 * 2**-3, -(1.0 + 0.9 * 2**-3)] * 8)
    with strict_interpreter():
        assert converted(x, torch.float8_e4m3fn, "rtz").float().abs().max() == 1.0
        assert converted(x, torch.float8_e4m3fn, "rtne").float().abs().max() == 1.125
        assert converted(x + x * 2**-11, torch.float16, "rtz").float().abs().max() < (x + x * 2**-11).abs().max()
        assert converted(x, torch.bfloat16, "rtz").float().abs().max() <= x.abs().max()


def test_float32_to_bfloat16_rounds() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(converted(x, torch.bfloat16), x.bfloat16())  # stock truncates
    with strict_interpreter():
        assert torch.equal(converted(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("source", [torch.int32, torch.int64, torch.float64])
def test_other_numbers_to_bfloat16(source: torch.dtype) -> None:
    x = torch.arange(-8, 8).to(source)
    with strict_interpreter():
        assert torch.equal(converted(x, torch.bfloat16).float(), x.float())


# ---- types of scalar arguments ----


@triton.jit
def offset_kernel(out, page, annotated: tl.int64, plain, FLAG: tl.constexpr):
    tl.store(out, page * annotated)
    tl.store(out + 1, (page * plain).to(tl.int64))
    if FLAG:
        tl.store(out + 2, scaled(page, plain))


@triton.jit
def scaled(page, stride: tl.int64):
    return (page * stride).to(tl.int64)


def test_annotated_argument_has_its_type_and_others_wrap() -> None:
    out = torch.zeros(3, dtype=torch.int64)
    offset_kernel[(1,)](out, 70_000, 70_000, 70_000, FLAG=True)
    assert out[0] == 4_900_000_000 - 2**32  # stock wraps although the argument is annotated
    strictly(lambda: offset_kernel[(1,)](out, 70_000, 70_000, 70_000, FLAG=True))
    assert out[0] == 4_900_000_000
    assert out[1] == 4_900_000_000 - 2**32
    # A device function takes its arguments as they are, compiled too: its annotation does not widen.
    assert out[2] == 4_900_000_000 - 2**32


@triton.jit
def typed_kernel(out, a: tl.int64, b: tl.uint64, c: tl.float32, d: tl.int8, e, flag, big):
    tl.store(out, (a * 3_000_000_000).to(tl.float64))
    tl.store(out + 1, (b + 1).to(tl.float64))
    tl.store(out + 2, c.to(tl.float64))
    tl.store(out + 3, (d + d).to(tl.float64))
    tl.store(out + 4, e.to(tl.float64))
    tl.store(out + 5, tl.where(flag, 1.0, 0.0))
    tl.store(out + 6, big.to(tl.float64))


def test_types_of_arguments() -> None:
    out = torch.zeros(7, dtype=torch.float64)
    strictly(lambda: typed_kernel[(1,)](out, 3, 2**40, 3, 100, 0.1, True, 2**40))
    tenth = torch.tensor(0.1, dtype=torch.float32).double().item()  # float arguments are float32
    assert out.tolist() == [9e9, 2.0**40 + 1, 3.0, -56.0, tenth, 1.0, 2.0**40]


@triton.jit
def scale_kernel(x, out, scale):
    i = tl.arange(0, 16)
    tl.store(out + i, (tl.load(x + i) * scale).to(tl.float32))


def test_float_argument_promotes_float16() -> None:
    x = torch.full((16,), 60000.0, dtype=torch.float16)
    out = torch.zeros(16)
    strictly(lambda: scale_kernel[(1,)](x, out, 2.0))
    assert (out == 120000.0).all()


# ---- masked lanes ----


@triton.jit
def masked_kernel(x, out, n):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(x + i, mask=i < n))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_masked_lanes_without_other_are_nan(dtype: torch.dtype) -> None:
    x, out = torch.ones(16).to(dtype), torch.ones(16).to(dtype)
    masked_kernel[(1,)](x, out, 10)
    assert (out.float()[10:] == 0).all()  # stock
    strictly(lambda: masked_kernel[(1,)](x, out, 10))
    assert (out.float()[:10] == 1).all()
    assert out.float()[10:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_masked_integer_lanes_are_loud(dtype: torch.dtype) -> None:
    x, out = torch.ones(16, dtype=dtype), torch.ones(16, dtype=dtype)
    strictly(lambda: masked_kernel[(1,)](x, out, 10))
    assert (out[:10] == 1).all()
    assert (out[10:].view(torch.uint8) == 0xAA).all()


# ---- bfloat16 arithmetic ----


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b + a - b)
    tl.store(out + N + i, tl.where((a < b) & (a != 0.0), a, b))
    tl.store(out + 2 * N + i, tl.maximum(a, b).to(out.dtype.element_ty))
    tl.store(out + 3 * N + i, (a / b).to(out.dtype.element_ty))
    tl.store(out + 4 * N + i, -a + tl.full([N], 1.5, a.dtype))
    tl.store(out + 5 * N + i, tl.abs(a) * 2.5)
    tl.store(out + 6 * N + i, tl.exp(a.to(tl.float32)).to(out.dtype.element_ty))


def test_bfloat16_arithmetic() -> None:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(64, generator=g).bfloat16(), torch.randn(64, generator=g).bfloat16()
    out = torch.zeros(7, 64, dtype=torch.bfloat16)
    strictly(lambda: arithmetic_kernel[(1,)](x, y, out, N=64))
    want = [x * y + x - y, x.minimum(y), x.maximum(y), x / y, 1.5 - x, x.abs() * 2.5, x.float().exp().bfloat16()]
    for got, wanted in zip(out, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)
    assert torch.equal(out[0], want[0])


@triton.jit
def add_kernel(x, out):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))


def test_stock_adds_bfloat16_bits() -> None:
    x, out = torch.full((16,), 1.5).bfloat16(), torch.zeros(16).bfloat16()
    add_kernel[(1,)](x, out)
    assert not (out == 3).any()
    strictly(lambda: add_kernel[(1,)](x, out))
    assert (out == 3).all()


@triton.jit
def sum_kernel(x, out):
    i = tl.arange(0, 16)
    a = tl.load(x + i)
    tl.store(out, tl.sum(a, 0))
    tl.store(out + 1, tl.max(a, 0).to(out.dtype.element_ty))
    tl.store(out + 2, tl.min(a, 0).to(out.dtype.element_ty))
    tl.store(out + 3 + i, tl.cumsum(a, 0))


def test_bfloat16_reductions() -> None:
    x, out = torch.arange(-4, 12).bfloat16(), torch.zeros(19).bfloat16()
    strictly(lambda: sum_kernel[(1,)](x, out))
    assert out[:3].tolist() == [56, 11, -4]
    assert torch.equal(out[3:], x.float().cumsum(0).bfloat16())


# ---- dot ----


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a + i * N + j), tl.trans(tl.load(b + i * N + j)), input_precision=PRECISION)
    tl.store(out + i * N + j, product)


def dot(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    strictly(lambda: dot_kernel[(1,)](a, b, out, N=32, PRECISION=precision))
    return out


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(32, 32, generator=g).to(dtype), torch.randn(32, 32, generator=g).to(dtype)
    got = dot(a, b, torch.zeros(32, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    torch.testing.assert_close(got.double(), a.double() @ b.double().T, rtol=0, atol=2e-5)


def test_int8_dot() -> None:
    a = torch.full((32, 32), 127, dtype=torch.int8)
    assert (dot(a, a, torch.zeros(32, 32, dtype=torch.int32)) == 127 * 127 * 32).all()


def test_stock_multiplies_bfloat16_bits() -> None:
    a, out = torch.ones(32, 32).bfloat16(), torch.zeros(32, 32)
    dot_kernel[(1,)](a, a, out, N=32, PRECISION="ieee")
    assert (out > 1e9).all()
    assert (dot(a, a, out) == 32).all()


def test_tf32_is_what_was_asked_for() -> None:
    a, out = torch.full((32, 32), 1 + 2**-12), torch.zeros(32, 32)
    assert (dot(a, torch.eye(32), out, "ieee").diagonal() == 1 + 2**-12).all()
    assert (dot(a, torch.eye(32), out, "tf32").diagonal() == 1).all()


def test_dot_too_small_to_compile_is_refused() -> None:
    a, out = torch.ones(8, 8).half(), torch.zeros(8, 8)
    dot_kernel[(1,)](a, a, out, N=8, PRECISION="ieee")  # stock takes it
    with pytest.raises(triton.runtime.errors.InterpreterError, match="K >= 16"), strict_interpreter():
        dot_kernel[(1,)](a, a, out, N=8, PRECISION="ieee")


# ---- NaN ----


@triton.jit
def nan_kernel(x, out, ALL: tl.constexpr):
    i, j = tl.arange(0, 2)[:, None], tl.arange(0, 16)[None, :]
    a = tl.load(x + i * 16 + j)
    tl.store(out + tl.arange(0, 2), tl.max(a, 1))
    tl.store(out + 2 + tl.arange(0, 2), tl.min(a, 1))
    one = tl.load(x)
    tl.store(out + 4, tl.maximum(one, 1.0))
    tl.store(out + 5, tl.maximum(one, 1.0, propagate_nan=ALL))
    tl.store(out + 6, tl.minimum(1.0, one))
    value, index = tl.max(a, 1, return_indices=True)
    tl.store(out + 8 + tl.arange(0, 2), value)
    tl.store(out + 10 + tl.arange(0, 2), index.to(tl.float32))


def test_nan_does_not_vanish_from_a_maximum() -> None:
    x, out = torch.arange(32.0), torch.zeros(12)
    x[0] = NAN
    nan_kernel[(1,)](x, out, ALL=tl.PropagateNan.ALL)
    assert out[:2].tolist() == [15, 31]  # stock drops it
    strictly(lambda: nan_kernel[(1,)](x, out, ALL=tl.PropagateNan.ALL))
    want = torch.tensor([NAN, 31, NAN, 16, 1, NAN, 1, 0, NAN, 31, 0, 15])
    torch.testing.assert_close(out, want, equal_nan=True)
