"""Payloads of every format against a table written from the formats' definitions, and the poison of each."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cache.poison import LOUD, is_poison, poison_bits, poisoned, tail_bits
from harness.cache.quantise import bits_of, dequantise, quantise
from harness.dtypes import ELEMENT_TYPES, ElementType, element_type

QUANTISED = ("fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz", "int8")


def numbers(name: str) -> list[Fraction | None]:
    """What each code of a format means, exactly; None for NaN, infinities and the integer that is no payload."""
    if name == "int8":
        return [None if code == 0x80 else Fraction(code - 256 if code > 127 else code) for code in range(256)]
    mantissa, bias = {"fp8_e4m3": (3, 7), "fp8_e4m3fnuz": (3, 8), "fp8_e5m2": (2, 15), "fp8_e5m2fnuz": (2, 16)}[name]
    found: list[Fraction | None] = []
    for code in range(256):
        exponent, fraction = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
        scaled = Fraction(fraction + ((1 << mantissa) if exponent else 0), 1 << mantissa)
        value = scaled * Fraction(2) ** (max(exponent, 1) - bias) * (-1 if code & 0x80 else 1)
        special = (
            code == 0x80
            if name.endswith("fnuz")
            else code & 0x7F == 0x7F
            if name == "fp8_e4m3"
            else exponent == 31  # infinities and NaN of IEEE
        )
        found.append(None if special else value)
    return found


def nearest(value: float, name: str) -> Fraction:
    """The number of a format nearest to `value`, ties to the even code, the largest one beyond the range."""
    table = [(number, code) for code, number in enumerate(numbers(name)) if number is not None]
    if math.isinf(value):
        return (max if value > 0 else min)(table)[0]
    return min(table, key=lambda entry: (abs(entry[0] - Fraction(value)), entry[1] & 1))[0]


@pytest.mark.parametrize("stored", QUANTISED)
def test_every_code_means_what_the_format_says(stored: str) -> None:
    element = element_type(stored)
    codes = torch.arange(256).to(torch.uint8).view(element.torch)
    for got, want in zip(codes.double().tolist(), numbers(stored), strict=True):
        assert not math.isfinite(got) or got == -128 if want is None else got == want
    assert max(n for n in numbers(stored) if n is not None) == element.largest
    assert numbers(stored)[element.poison & 0xFF] is None


@pytest.mark.parametrize("stored", QUANTISED)
def test_every_payload_survives_the_round_trip(stored: str) -> None:
    element = element_type(stored)
    payload = torch.arange(-128, 128).to(torch.int8).view(element.torch)
    payload = payload[payload.float().isfinite() & ~is_poison(payload)]
    for scale in (1.0, 0.0737, 3.1):
        assert torch.equal(bits_of(quantise(dequantise(payload, scale), scale, element)), bits_of(payload))


@settings(max_examples=40, deadline=None)
@given(
    stored=st.sampled_from(QUANTISED),
    values=st.lists(st.floats(width=32, allow_nan=False) | st.floats(-300, 300, width=32), min_size=1, max_size=8),
    scale=st.sampled_from([1.0, 0.03125, 0.0737]),
)
def test_rounding_is_to_nearest(stored: str, values: list[float], scale: float) -> None:
    drawn = torch.tensor(values, dtype=torch.float32)
    payload = quantise(drawn, scale, element_type(stored))
    quotients = (drawn / torch.full_like(drawn, scale)).tolist()  # of float32, as payloads are defined
    assert payload.double().tolist() == [float(nearest(quotient, stored)) for quotient in quotients]
    assert not bool(is_poison(payload).any())


@pytest.mark.parametrize("stored", QUANTISED)
def test_ties_go_to_even_and_what_lies_beyond_saturates(stored: str) -> None:
    element = element_type(stored)
    codes = torch.arange(0, 128).to(torch.int8).view(element.torch).float()
    codes = codes[codes.isfinite()]  # ascending, neighbours one bit apart
    middle = (codes[1:] + codes[:-1]) / 2
    even = torch.arange(len(middle)) % 2 == 0
    expected = torch.where(even, codes[:-1], codes[1:])
    assert torch.equal(quantise(middle, 1.0, element).float(), expected)
    assert torch.equal(quantise(middle * (1 + 2.0**-12), 1.0, element).float(), codes[1:])
    huge = torch.tensor([1e6, -1e6, math.inf, -math.inf])
    assert quantise(huge, 1.0, element).float().tolist() == [element.largest, -element.largest] * 2


def test_no_quantisation_keeps_the_bits() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).half()
    assert quantise(values, 1.0, element_type("fp16")) is values


def test_misread_encodings_are_the_gross_errors_they_are_known_for() -> None:
    """The same bytes as e4m3fn and as e4m3fnuz differ by two; those of e5m2 mean something else altogether."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    payload = quantise(values, 0.02, element_type("fp8_e4m3fnuz"))
    assert torch.equal(payload.view(torch.float8_e4m3fn).float(), payload.float() * 2)
    other = payload.view(torch.float8_e5m2).float()
    assert float(((other - payload.float()).abs() > payload.float().abs()).float().mean()) > 0.5


@pytest.mark.parametrize("stored", ELEMENT_TYPES.values(), ids=ELEMENT_TYPES)
def test_poison_is_nan_or_no_payload_and_loud_is_finite_and_loud(stored: ElementType) -> None:
    dead = poisoned((3, 5), stored, "cpu")
    assert dead.dtype == stored.torch
    assert bool(dead.float().isnan().all()) == (stored.name != "int8")
    assert bool(is_poison(dead).all())
    assert poison_bits(stored) == tail_bits(stored, "nan") == stored.poison
    assert poison_bits(stored, 0.0) == tail_bits(stored, "loud", 0.0) == 0
    loud = torch.full((1,), tail_bits(stored, "loud")).to(bits_of(dead).dtype).view(stored.torch).float()
    assert min(LOUD, stored.largest) * 0.9 <= float(loud.abs()) <= 65504 / 2
