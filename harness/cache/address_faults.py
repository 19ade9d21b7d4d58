"""Address arithmetic gone wrong: which element each typical fault reads, or writes, instead of the right one.

Invariant: pure functions of offsets; where a fault changes nothing, the offset comes back as it went in. `page` faults
change the page id before it is multiplied, the others the offset from the start of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_2_32 = 1 << 32
Change = Callable[[torch.Tensor], torch.Tensor]  # int64 of any shape


@dataclass(frozen=True)
class Addressing:
    """How offsets of one tensor become addresses."""

    stride: int  # elements from page to page
    itemsize: int
    low_bits: int  # the low 32 bits of the address of the pool


@dataclass(frozen=True)
class AddressFault:
    """`for_boundaries`: the boundaries (harness.problem.boundary) at which it begins to show."""

    name: str
    words: str
    for_boundaries: tuple[str, ...]
    page: Change | None = None
    offset: Callable[[torch.Tensor, Addressing], torch.Tensor] | None = None

    def moved(self, page: torch.Tensor, inner: torch.Tensor, at: Addressing) -> torch.Tensor:
        """Element offsets that are touched instead of page * stride + inner; `page` [n, 1], `inner` [n, m] int64."""
        offset = (page if self.page is None else self.page(page)) * at.stride + inner
        return offset if self.offset is None else self.offset(offset, at)


def _signed(bits: int) -> Change:
    half = 1 << (bits - 1)
    return lambda x: ((x + half) & (2 * half - 1)) - half


def _unsigned(bits: int) -> Change:
    return lambda x: x & ((1 << bits) - 1)


def _in_elements(wrap: Change) -> Callable[[torch.Tensor, Addressing], torch.Tensor]:
    return lambda offset, at: wrap(offset)


def _in_bytes(wrap: Change) -> Callable[[torch.Tensor, Addressing], torch.Tensor]:
    return lambda offset, at: wrap(offset * at.itemsize) // at.itemsize


def _carry_lost(offset: torch.Tensor, at: Addressing) -> torch.Tensor:
    """The sum of the low halves of base and offset; the upper half stays that of the base."""
    return ((at.low_bits + offset * at.itemsize) % _2_32 - at.low_bits) // at.itemsize


FAULTS: tuple[AddressFault, ...] = (
    AddressFault("int32_elements", "a signed 32-bit offset in elements wraps", ("elements31",),
                 offset=_in_elements(_signed(32))),
    AddressFault("uint32_elements", "an unsigned 32-bit offset in elements wraps", ("elements32",),
                 offset=_in_elements(_unsigned(32))),
    AddressFault("int32_bytes", "a signed 32-bit offset in bytes wraps", ("bytes31",), offset=_in_bytes(_signed(32))),
    AddressFault("uint32_bytes", "an unsigned 32-bit offset in bytes wraps", ("bytes32",),
                 offset=_in_bytes(_unsigned(32))),
    AddressFault("carry_lost", "the low 32 bits of base + offset carry, and the carry is lost", ("carry",),
                 offset=_carry_lost),
    AddressFault("int16_page", "the page id is cut to 16 bits, with sign", ("page15", "page16"), page=_signed(16)),
    AddressFault("uint16_page", "the page id is cut to 16 bits", ("page16",), page=_unsigned(16)),
    AddressFault("int24_page", "the page id is cut to 24 bits, with sign", ("page23", "page24"), page=_signed(24)),
    AddressFault("uint24_page", "the page id is cut to 24 bits", ("page24",), page=_unsigned(24)),
)  # fmt: skip


def tell_move(what: str, done: str, right: int, wrong: int, faults: Sequence[AddressFault]) -> str:
    """One line: element `right` of `what`, counted from the start of the pool, was `done` at element `wrong`, as any of
    `faults` would have it.
    """
    by = wrong - right
    how = f"2^32 x {by >> 32:+d}" if by % _2_32 == 0 else f"{by:+,}"
    why = " or ".join(fault.words for fault in faults)
    return f"{what} at element {right:,} was {done} at element {wrong:,} ({how}): {why}"
