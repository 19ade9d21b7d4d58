import math

import pytest
import torch

from harness.cache.poison import LOUD, POISON_BITS, poison_bits, poisoned, tail_bits
from harness.cache.quantise import bits_of, dequantise, quantise
from harness.dtypes import ELEMENT_TYPES, element_type


@pytest.mark.parametrize("stored", ["fp8_e4m3", "fp8_e5m2"])
def test_every_payload_survives_the_round_trip(stored: str) -> None:
    element = element_type(stored)
    payload = torch.arange(-128, 128).to(torch.int8).view(element.torch)
    payload = payload[payload.float().isfinite()]
    for scale in (1.0, 0.0737, 3.1):
        assert torch.equal(bits_of(quantise(dequantise(payload, scale), scale, element)), bits_of(payload))


@pytest.mark.parametrize("stored", ["fp8_e4m3", "fp8_e5m2"])
def test_rounding_is_to_nearest_with_ties_to_even_and_saturates(stored: str) -> None:
    element = element_type(stored)
    numbers = torch.arange(0, 128).to(torch.int8).view(element.torch).float()
    numbers = numbers[numbers.isfinite()]  # ascending, neighbours one bit apart
    middle = (numbers[1:] + numbers[:-1]) / 2
    even = torch.arange(len(middle)) % 2 == 0
    expected = torch.where(even, numbers[:-1], numbers[1:])
    assert torch.equal(quantise(middle, 1.0, element).float(), expected)
    assert torch.equal(quantise(middle * (1 + 2.0**-12), 1.0, element).float(), numbers[1:])
    huge = torch.tensor([1e6, -1e6, math.inf, -math.inf])
    assert quantise(huge, 1.0, element).float().tolist() == [element.largest, -element.largest] * 2


def test_no_quantisation_keeps_the_bits() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).half()
    assert quantise(values, 1.0, element_type("fp16")) is values


@pytest.mark.parametrize("stored", ELEMENT_TYPES)
def test_poison_is_nan_and_loud_is_finite_and_loud(stored: str) -> None:
    element = element_type(stored)
    dead = poisoned((3, 5), element, "cpu")
    assert dead.dtype == element.torch
    assert bool(dead.float().isnan().all())
    assert bool((bits_of(dead) == POISON_BITS).all())
    assert poison_bits(element) == tail_bits(element, "nan") == POISON_BITS
    assert poison_bits(element, 0.0) == tail_bits(element, "loud", 0.0) == 0
    loud = torch.full((1,), tail_bits(element, "loud")).to(bits_of(dead).dtype).view(element.torch).float()
    assert min(LOUD, element.largest) * 0.9 <= float(loud) <= 65504 / 2
