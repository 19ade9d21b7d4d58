"""Where the buffers of a launch lie, kept in a file, so that an address can be told by name when the process is gone.

Invariant: what is said of an address is true of the map alone: inside a buffer, or so many bytes before or behind one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Span:
        """The bytes that a tensor of any shape and strides reaches over."""
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(name, tensor.data_ptr(), elements * tensor.element_size() if tensor.numel() else 0)


def write_buffer_map(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    spans = [vars(Span.of(name, tensor)) for name, tensor in tensors.items()]
    path.write_text(json.dumps(spans), encoding="ascii")


def read_buffer_map(path: Path) -> list[Span]:
    """What was written; nothing where the process did not get so far."""
    return [Span(**fields) for fields in json.loads(path.read_text(encoding="ascii"))] if path.exists() else []


def describe_address(address: int, spans: Iterable[Span]) -> str | None:
    """Where `address` lies, e.g. "4 bytes behind v_cache (of 4,096 bytes)"; None where it is near no buffer."""
    distances = []
    for span in spans:
        offset = address - span.start
        distance = -offset if offset < 0 else max(0, offset - span.size + 1)
        distances.append((distance, span.name, offset, span))
    if not distances:
        return None
    distance, name, offset, span = min(distances, key=lambda found: found[:2])
    if distance > NEAR:
        return None
    if not distance:
        return f"byte {offset:,} of {name} ({span.size:,} bytes)"
    if offset < 0:
        return f"{distance:,} bytes before {name}"
    return f"{offset - span.size:,} bytes behind {name} (of {span.size:,} bytes)"
