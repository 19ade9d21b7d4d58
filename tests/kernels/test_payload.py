"""Payloads taken apart and put together in kernels: every code, and every rounding, as torch has them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.cache.content import Content
from harness.dtypes import element_type
from harness.interpreter import prepare
from harness.kernel.contract import Contract
from harness.kernel.registry import IN_TREE, load_entry
from harness.problem.payload import rounded

prepare("cpu")

from harness.interpreter.strict import strict_interpreter  # noqa: E402 it needs triton prepared

Load = Callable[[str], Callable[..., None]]
FP8 = ("fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(IN_TREE / "_shared", folder / "_shared", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "payload").mkdir()
    shutil.copy(Path(__file__).with_name("payload_kernel.py"), folder / "payload")

    def entry(name: str) -> Callable[..., None]:
        contract = Contract("p", "", f"payload_kernel.py:{name}", Content.ALL, frozenset(), folder=folder / "payload")
        return load_entry(contract)

    return entry


def run(kernel: Callable[..., None], given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    with strict_interpreter({"given": given, "out": out}, outputs={"out"}) as session:
        kernel(given, out)
    assert session.violations == []
    return out


@pytest.mark.parametrize("name", [*FP8, "int8"])
def test_every_code_decodes_exactly(load: Load, name: str) -> None:
    payload = torch.arange(256).to(torch.uint8).view(element_type(name).torch)
    want = payload.float()
    for entry in ("decode", "decode_natively"):
        got = run(load(entry), payload, torch.zeros(256))
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("name", FP8)
def test_every_rounding_is_to_nearest_even_and_saturates(load: Load, name: str) -> None:
    stored = element_type(name)
    numbers = torch.arange(256).to(torch.uint8).view(stored.torch).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middle = (numbers[1:] + numbers[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4096, generator=generator) * 2.0 ** torch.randint(-20, 10, (4096,), generator=generator)
    special = torch.tensor([0.0, -0.0, 1e6, -1e6, float("inf"), float("-inf"), float("nan"), 2.0**-40, -(2.0**-40)])
    values = torch.cat([numbers, middle, middle * (1 + 2.0**-20), middle * (1 - 2.0**-20), drawn, special])
    values = torch.nn.functional.pad(values, (0, -len(values) % 1024))
    got = run(load("encode"), values, torch.zeros(len(values), dtype=stored.torch))
    want = rounded(values, stored)
    assert torch.equal(got.float().isnan(), values.isnan())
    same = got.view(torch.uint8) == want.view(torch.uint8)
    assert bool((same | values.isnan()).all())
