"""Formats numpy lacks, against torch's own conversions and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.interpreter import narrow

TORCH = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
LARGEST = {"fp8e4nv": 448.0, "fp8e5": 57344.0, "fp8e4b8": 240.0, "fp8e5b16": 57344.0}


@pytest.mark.parametrize("name", TORCH)
def test_every_code_decodes_as_torch_does(name: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(codes).view(TORCH[name]).float().numpy()
    np.testing.assert_array_equal(narrow.decode(codes, name), want)


def test_nan_codes_decode_to_nan() -> None:
    assert np.isnan(narrow.decode(np.array([0x7F, 0xFF], dtype=np.uint8), "fp8e4nv")).all()
    assert np.isnan(narrow.decode(np.array([0x7D, 0x7E, 0x7F, 0xFD], dtype=np.uint8), "fp8e5")).all()
    assert np.isinf(narrow.decode(np.array([0x7C, 0xFC], dtype=np.uint8), "fp8e5")).all()


def test_format_without_specials_is_finite() -> None:
    values = narrow.decode(np.arange(256, dtype=np.uint8), "fp8e4b15")
    assert np.isfinite(values).all()
    assert values[0x7F] == 1.875


@pytest.mark.parametrize("name", TORCH)
def test_encode_rounds_as_torch_does_within_range(name: str) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(20000) * 2.0 ** rng.integers(-20, 9, 20000)).astype(np.float32)
    values = values[np.abs(values) <= LARGEST[name]]
    finite = narrow.decode(np.arange(256, dtype=np.uint8), name)
    finite = np.sort(finite[np.isfinite(finite)])
    midpoints = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    values = np.concatenate([values, midpoints, finite])
    want = torch.from_numpy(values).to(TORCH[name]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(narrow.encode(values, name), want)


@pytest.mark.parametrize("name", TORCH)
def test_encode_saturates_and_keeps_nan(name: str) -> None:
    codes = narrow.encode(np.array([1e6, -1e6, np.inf, -np.inf, np.nan], dtype=np.float32), name)
    got = narrow.decode(codes, name)
    largest = LARGEST[name]
    np.testing.assert_array_equal(got, np.array([largest, -largest, largest, -largest, np.nan], dtype=np.float32))


def test_encode_toward_zero_never_grows() -> None:
    values = np.linspace(-500, 500, 4001, dtype=np.float32)
    got = narrow.decode(narrow.encode(values, "fp8e4nv", toward_zero=True), "fp8e4nv")
    nearest = narrow.decode(narrow.encode(values, "fp8e4nv"), "fp8e4nv")
    assert (np.abs(got) <= np.abs(values)).all()
    assert (np.abs(nearest) > np.abs(values)).any()


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 50000, dtype=np.uint32)
    ties = (np.arange(2000, dtype=np.uint32) << 16) | np.uint32(0x8000)
    values = np.concatenate([bits, ties]).view(np.float32)
    want = torch.from_numpy(values).bfloat16()
    got = narrow.encode(values, "bf16")
    number = ~np.isnan(values)
    np.testing.assert_array_equal(got[number], want.view(torch.int16).numpy().view(np.uint16)[number])
    assert np.isnan(narrow.decode(got[~number], "bf16")).all()


def test_float16_toward_zero() -> None:
    values = np.array([1.0009, -1.0009, 65519.0, 70000.0, np.nan, 0.0], dtype=np.float32)
    got = narrow.narrow_float16_toward_zero(values)
    np.testing.assert_array_equal(got, np.array([1.0, -1.0, 65504.0, 65504.0, np.nan, 0.0], dtype=np.float16))


def test_tf32_keeps_ten_bits() -> None:
    values = np.array([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, np.nan, np.inf], dtype=np.float32)
    want = np.array([1 + 2**-10, 1 + 2**-10, 1.0, np.nan, np.inf], dtype=np.float32)
    np.testing.assert_array_equal(narrow.round_to_tf32(values), want)
