"""Where the buffers of a launch lie, kept in a file, so that an address can be told by name when the process is gone.

Invariant: what is said of an address is true of the map alone: inside a buffer, or so many bytes before or behind one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NEAR = 1 << 20  # bytes from a buffer within which an address is said to be near it


@dataclass(frozen=True)
class Span:
    name: str
    start: int  # address of the first byte
    size: int  # bytes up to the end of the last element
    fence: int = 0  # bytes before and behind it in which no other buffer lies; 0: not fenced

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, fence: int = 0) -> Span:
        """The bytes that a tensor of any shape and strides reaches over."""
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(name, tensor.data_ptr(), elements * tensor.element_size() if tensor.numel() else 0, fence)

    def distance(self, address: int) -> int:
        """Bytes from the buffer to `address`: negative before it, 0 in it, 1 for the first byte behind it."""
        offset = address - self.start
        return min(offset, 0) or max(0, offset - self.size + 1)


def write_buffer_map(path: Path, tensors: Mapping[str, torch.Tensor], fenced: Collection[str] = ()) -> None:
    """fenced: names of the buffers with nothing mapped FENCE bytes before and behind them."""
    path.write_text("", encoding="ascii")
    for name, tensor in tensors.items():
        add_to_buffer_map(path, name, tensor, fenced=name in fenced)


def add_to_buffer_map(path: Path, name: str, tensor: torch.Tensor, *, fenced: bool) -> None:
    """For what a kernel is handed while it runs."""
    from harness.cache.fence import FENCE  # imports torch, which readers of the map do without

    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(vars(Span.of(name, tensor, FENCE if fenced else 0))) + "\n")


def read_buffer_map(path: Path) -> list[Span]:
    """What was written; nothing where the process did not get so far."""
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return [Span(**json.loads(line)) for line in lines]


def describe_address(address: int, spans: Iterable[Span]) -> str | None:
    """Where `address` lies, e.g. "4 bytes behind v_cache (of 4,096 bytes)"; None where it is near no buffer."""
    span = min(spans, key=lambda span: (abs(span.distance(address)), span.name), default=None)
    if span is None or abs(distance := span.distance(address)) > max(NEAR, span.fence):
        return None
    if not distance:
        return f"byte {address - span.start:,} of {span.name} ({span.size:,} bytes)"
    if distance < 0:
        return f"{-distance:,} bytes before {span.name}{' (fence before it)' if span.fence else ''}"
    if not span.fence:
        return f"{distance - 1:,} bytes behind {span.name} (of {span.size:,} bytes)"
    return f"{f'{distance - 1:,} bytes' if distance > 1 else 'right'} behind {span.name} (fence behind it)"


def in_fence(address: int, spans: Iterable[Span]) -> bool:
    """Whether `address` is one that a fence keeps unmapped, before or behind a buffer."""
    return any(0 < abs(span.distance(address)) <= span.fence for span in spans)
