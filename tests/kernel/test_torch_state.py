"""What a kernel leaves changed in torch is put back and told, whatever it is; what it draws is put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from harness.kernel.torch_state import SETTINGS, kept_torch_state

BACKENDS = torch.backends
CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "default device": (lambda: torch.set_default_device("meta"), "default device (was cpu, left at meta)"),
    "default dtype": (
        lambda: torch.set_default_dtype(torch.float64),
        "default dtype (was torch.float32, left at torch.float64)",
    ),
    "grad mode": (lambda: torch.set_grad_enabled(False), "grad mode (was True, left at False)"),
    "autocast": (lambda: torch.autocast("cpu").__enter__(), "autocast on cpu (was False, left at True)"),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), "deterministic mode (was 0, left at 2)"),
    "cudnn": (lambda: setattr(BACKENDS.cudnn, "benchmark", True), "backends.cudnn.benchmark (was False, left at True)"),
    "sdpa": (lambda: BACKENDS.cuda.enable_math_sdp(False), "math SDPA (was True, left at False)"),
    "precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        "float32 matmul precision (was highest, left at medium)",
    ),
    "tf32": (
        lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
        "float32 matmul precision (was highest, left at high)",
    ),
    "tf32 by the newer names": (
        lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
        "backends.cuda.matmul.fp32_precision",
    ),
    "precision of everything": (lambda: setattr(BACKENDS, "fp32_precision", "tf32"), "backends.fp32_precision"),
}


def settings() -> list[object]:
    return [setting.read() for setting in SETTINGS]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_put_back_and_told(name: str) -> None:
    change, told = CHANGES[name]
    before = settings()
    with kept_torch_state() as changed:
        change()
    assert settings() == before
    assert any(line.startswith(told) for line in changed), changed


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with kept_torch_state() as changed:
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)
    assert changed == ["number of threads (was 3, left at 1)"]


def test_what_is_drawn_is_put_back_without_a_word() -> None:
    before = torch.get_rng_state()
    with kept_torch_state() as changed:
        torch.manual_seed(5)
        torch.rand(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert changed == []


def test_choosing_what_holds_already_is_no_change() -> None:
    before = settings()
    with kept_torch_state() as changed:
        torch.set_float32_matmul_precision("highest")
        torch.set_grad_enabled(True)
    assert settings() == before
    assert changed == []


def test_an_exception_leaves_nothing_changed() -> None:
    before = settings()

    def fail() -> None:
        with kept_torch_state():
            torch.set_default_dtype(torch.float64)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert settings() == before


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_the_random_state_of_the_device_is_put_back(device: str) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3, device=device)
    torch.manual_seed(11)
    with kept_torch_state(device):
        torch.rand(5, device=device)
    assert torch.equal(torch.rand(3, device=device), expected)
