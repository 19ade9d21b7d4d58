"""Memory of K and V in any layout (harness.layout): allocated, and stored to token by token.

Invariant: `by_slot` is a view, so whatever is written through it lies in the storage handed to the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.cache.quantise import bits_of
from harness.dtypes import ElementType
from harness.layout import VECTOR_BYTES, WHOLE_VECTORS, Part, by_meaning, dims_of, parts


def allocate(
    layout: str,
    which: str,
    shape: tuple[int, ...],
    stored: ElementType,
    fill: int,
    strided: bool,
    device: torch.device | str,
) -> torch.Tensor:
    """A cache of `shape` (see cache_shape) whose storage, gaps included, holds the bits `fill`: `stored` dtype.

    `strided` puts gaps behind every page, slot and head (of `vectorized` behind pages and heads only, where kernels
    take any stride), of other sizes for V than for K; rows stay 16-byte aligned.
    """
    whole = storage_shape(layout, which, shape, stored, strided)
    storage = bits_of(torch.empty(whole, dtype=stored.torch, device=device))
    storage.fill_(fill)
    return storage[tuple(slice(n) for n in shape)].view(stored.torch)


def storage_shape(
    layout: str, which: str, shape: tuple[int, ...], stored: ElementType, strided: bool
) -> tuple[int, ...]:
    """Shape of the compact storage that a cache of `shape` is cut from the beginning of."""
    if not strided:
        return shape
    return tuple(n + gap for n, gap in zip(shape, _gaps(layout, which, stored), strict=True))


@dataclass(frozen=True)
class Slots:
    """A cache by token: `view` [page, *parts of the slot, head, *parts of the dim]."""

    view: torch.Tensor
    parts: tuple[Part, ...]  # of the slot; none where a page is one token

    def index(self, page: torch.Tensor, slot: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the tokens at `page`, `slot` [n] are in `view`."""
        return (page, *(slot // part.step % part.size for part in self.parts))

    def store(self, page: torch.Tensor, slot: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put `tokens` [n, heads, dim] at `page`, `slot` [n]."""
        inner = self.view.shape[1 + len(self.parts) :]
        self.view[self.index(page, slot)] = tokens.reshape(len(tokens), *inner)

    def load(self, page: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """The tokens at `page`, `slot` [n]: [n, heads, dim]"""
        found = self.view[self.index(page, slot)]
        return found.reshape(len(found), found.shape[1], -1)


def by_slot(cache: torch.Tensor, layout: str, which: str) -> Slots:
    """K (`which` "k") or V ("v") by token, whatever its element type and strides."""
    order, dims = by_meaning(layout, which, cache.shape), parts(layout, which, cache.shape)
    return Slots(cache.permute(order), tuple(dims[i] for i in order if dims[i].of == "slot"))


def _gaps(layout: str, which: str, stored: ElementType) -> tuple[int, ...]:
    """By how much each dimension is longer in storage: a gap behind every step of the dimension before it."""
    step = 1 if which == "k" else 2
    names = dims_of(layout, which)
    behind_head = names.index("head") + 1

    def gap(i: int) -> int:
        name = names[i]
        if i == 0 or name.endswith("%x") or (layout in WHOLE_VECTORS and i > behind_head):
            return 0
        if i == len(names) - 1:
            return step * (VECTOR_BYTES // stored.size)
        return step if name == "slot" or (layout in WHOLE_VECTORS and i == behind_head) else 1

    return tuple(map(gap, range(len(names))))
