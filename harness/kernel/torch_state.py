"""Torch's process-wide settings, kept as they are around code that is not ours.

Invariant: after the block every setting of SETTINGS and the states of the random generators are what they were before
it, whatever the code inside did or raised; what it had changed is told, random states apart (drawing is no fault).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """One setting, in words and in code."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _flag(name: str, holder: Any, attribute: str) -> Setting:
    return Setting(name, lambda: getattr(holder, attribute), lambda value: setattr(holder, attribute, value))


def _legacy(name: str, read: Callable[[], Any], write: Callable[[Any], object]) -> Setting:
    """A setting of the older precision API, which refuses to be read where the newer one was used: None then.

    Some versions of torch call it deprecated; it is read all the same, as kernels still set it.
    """

    def quietly(act: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return act()

    def value() -> Any:
        try:
            return quietly(read)
        except RuntimeError:
            return None

    return Setting(name, value, lambda known: None if known is None else quietly(lambda: write(known)))


def _precisions() -> Iterator[Setting]:
    """Newer API first: while it disagrees with the older one, that cannot be read."""
    backends: Any = torch.backends
    for name, holder in (
        ("backends", backends),
        ("backends.cuda.matmul", backends.cuda.matmul),
        ("backends.cudnn.conv", getattr(backends.cudnn, "conv", None)),
        ("backends.cudnn.rnn", getattr(backends.cudnn, "rnn", None)),
        ("backends.mkldnn.matmul", getattr(backends.mkldnn, "matmul", None)),
    ):
        if hasattr(holder, "fp32_precision"):
            yield _flag(f"{name}.fp32_precision", holder, "fp32_precision")
    yield _legacy("float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    cudnn = _flag("backends.cudnn.allow_tf32", backends.cudnn, "allow_tf32")
    yield _legacy(cudnn.name, cudnn.read, cudnn.write)


def _autocast(device: str) -> Setting:
    return Setting(
        f"autocast on {device}",
        lambda: torch.is_autocast_enabled(device),
        lambda on: torch.set_autocast_enabled(device, on),
    )


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "default device",
        lambda: str(torch.get_default_device()),
        lambda device: torch.set_default_device(None if device == "cpu" else device),
    ),
    Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    _autocast("cpu"),
    _autocast("cuda"),
    Setting("number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("deterministic mode", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _flag("backends.cudnn.enabled", torch.backends.cudnn, "enabled"),
    _flag("backends.cudnn.benchmark", torch.backends.cudnn, "benchmark"),
    _flag("backends.cudnn.deterministic", torch.backends.cudnn, "deterministic"),
    *(
        _flag(f"backends.cuda.matmul.{name}", torch.backends.cuda.matmul, name)
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    ),
    Setting("flash SDPA", torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    Setting(
        "efficient SDPA", torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp
    ),
    Setting("math SDPA", torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    Setting("cuDNN SDPA", torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    *_precisions(),
)
_CURRENT_DEVICE = Setting("current CUDA device", torch.cuda.current_device, torch.cuda.set_device)
_SAME_AS = {
    "none": "ieee"
}  # a precision that nothing was chosen for; the older API chooses when it is set to what it is


@contextmanager
def kept_torch_state(device: torch.device | str = "cpu") -> Iterator[list[str]]:
    """Put back what the block changes; the list holds, after it, what that was: "default dtype (x, now y)".

    device: the one whose random state is kept beside the CPU's.
    """
    on_cuda = torch.device(device).type == "cuda"
    settings = (*SETTINGS, _CURRENT_DEVICE) if on_cuda else SETTINGS
    before = [setting.read() for setting in settings]
    random, random_cuda = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_cuda else None
    changed: list[str] = []
    try:
        yield changed
    finally:
        left = [setting.read() for setting in settings]
        every = list(zip(settings, before, left, strict=True))
        changed += [
            f"{setting.name} (was {old}, left at {new})"
            for setting, old, new in every
            if new is not None and _told(old) != _told(new)
        ]
        for setting, known, _ in every * 2 if left != before else ():  # writing one precision can move another
            if setting.read() != known:
                setting.write(known)
        torch.set_rng_state(random)
        if random_cuda is not None:
            torch.cuda.set_rng_state(random_cuda, device)


def _told(value: Any) -> Any:
    return _SAME_AS.get(value, value)
