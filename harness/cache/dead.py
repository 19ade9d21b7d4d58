"""Dead memory: what of a pool must be poison, once everything that must not be is accounted for.

Invariant: every element with memory of its own is looked at, once, in pieces, so that a pool larger than the memory
left beside it can be searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.cache.pool import Pool

_AT_ONCE = 1 << 21  # elements


@dataclass(frozen=True)
class Dead:
    """Elements with memory of their own that are not yet accounted for: stretches of at most _AT_ONCE, in order, by the
    storage offset of the first and their number; a stretch gets a mask [elements] once some of it is.
    """

    stretches: tuple[tuple[int, int], ...]
    firsts: torch.Tensor  # int64 [stretches]
    masks: dict[int, torch.Tensor]  # bool, by number of the stretch

    @classmethod
    def of(cls, pool: Pool, tensor: torch.Tensor) -> Dead:
        size, found = tensor.element_size(), []
        for first, end in pool.own:
            low, high = (pool.base + first) // size, (pool.base + first) // size + (end - first) // size
            found += [(start, min(_AT_ONCE, high - start)) for start in range(low, high, _AT_ONCE)]
        return cls(tuple(found), torch.tensor([first for first, _ in found], device=tensor.device), {})

    def take(self, offsets: torch.Tensor) -> None:
        """Account for the elements at `offsets`, int64 of any shape."""
        flat = offsets.flatten()
        stretch = torch.bucketize(flat, self.firsts, right=True) - 1  # [elements]
        for number in stretch.bincount().nonzero()[:, 0].tolist():
            first, count = self.stretches[number]
            if number not in self.masks:
                self.masks[number] = torch.ones(count, dtype=torch.bool, device=flat.device)
            self.masks[number][flat[stretch == number] - first] = False

    def stray(self, flat: torch.Tensor, poison: int) -> int | None:
        """The first element left that is not `poison`, in `flat` [elements of the storage]."""
        for number, (first, count) in enumerate(self.stretches):
            here = flat[first : first + count]
            if number not in self.masks and _all_are(here, poison):
                continue
            stray = here != poison
            if number in self.masks:
                stray &= self.masks[number]
            if bool(stray.any()):
                return first + int(stray.nonzero()[0])
        return None


def _all_are(bits: torch.Tensor, poison: int) -> bool:
    """Whether `bits` [elements], integers at an address that 8 divides, are all `poison`, a number of equal bytes."""
    whole = bits.numel() * bits.element_size() // 8 * 8 // bits.element_size()
    word = int.from_bytes(bytes([poison & 0xFF] * 8), "little", signed=True)
    return not bool((bits[:whole].view(torch.int64) != word).any()) and not bool((bits[whole:] != poison).any())
