"""A device while cases run on it: the time they take, whether its context still lives, memory that others want.

Invariant: asks, waits and gives back; launches nothing of a kernel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from harness.errors import first_line
from harness.kernel.failures import memory_shortage

MOST_HELD = 2 << 30  # bytes of a device that a worker keeps between cases


@dataclass
class Stopwatch:
    """Seconds by phase; the device is waited for at the end of each."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def context_error(device: torch.device) -> str | None:
    """What is wrong with the context of a device, or None: a fault of a kernel may show in what follows it only, and
    then for good."""
    if device.type == "cpu":
        return None
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        return None if memory_shortage(error) else first_line(error)
    return None


def release_memory(device: torch.device) -> None:
    """Give freed memory of the device back where much of it is held: other workers share the device."""
    if device.type == "cuda" and torch.cuda.memory_reserved(device) > MOST_HELD:
        torch.cuda.empty_cache()
