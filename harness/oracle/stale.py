"""Descales of other pages and heads: what kernels scale keys by instead of their own descale, and what comes of it.

Invariant: a hypothesis is plain data; it fixes every descale that is used, so that the change of an output is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from references.rows import Rows

NEIGHBOUR, OTHER_HEAD, FIRST_HEAD = "neighbour", "other head", "first head"
DROPPED, EXCHANGED = "dropped", "exchanged"
TENSORS = ("K", "V", "K and V")
STEPS = (1, -1)
MOST_EXPONENT = 600.0  # of a weight that a wrong descale makes; more would overflow


@dataclass(frozen=True)
class Stale:
    """Which keys have whose descale. A field that is None stands for all there are."""

    tensors: str  # one of TENSORS
    source: str
    step: int = 0  # pages (NEIGHBOUR) or KV heads (OTHER_HEAD) from their own to the one whose descale they have
    num_keys: int | None = None  # of a page, next to the neighbour but for `gap`; None: the whole page
    gap: int = 0  # keys between them and the neighbour, which have their own descale
    slot: int | None = None  # of the page that they lie on
    sequence: int | None = None
    heads: tuple[int, ...] | None = None  # KV heads

    def used(self, descales: torch.Tensor, page_size: int, cached_len: int) -> torch.Tensor:
        """What the cached keys of one sequence are scaled by: [cached_len, num_kv_heads, 2 (K, V)].

        `descales` [pages, num_kv_heads, 2] of the pages of the sequence, in order.
        """
        key = torch.arange(cached_len, device=descales.device)
        slot, offset = key // page_size, key % page_size
        own = by_key(descales, page_size, cached_len)
        struck = torch.ones_like(key, dtype=torch.bool) if self.slot is None else slot == self.slot
        if self.source == NEIGHBOUR:
            last, width = max(cached_len - 1, 0) // page_size, self.num_keys or page_size
            struck &= (slot + self.step >= 0) & (slot + self.step <= last)
            away = page_size - 1 - offset if self.step > 0 else offset  # keys between each and the neighbour
            struck &= (away >= self.gap) & (away < self.gap + width)
            other = descales[(slot + self.step).clamp(0, last)]
        else:
            other = {
                OTHER_HEAD: own.roll(-self.step, 1),
                FIRST_HEAD: own[:, :1].expand_as(own),
                DROPPED: torch.ones_like(own),
                EXCHANGED: own.flip(2),
            }[self.source]
        of_tensor = torch.tensor([name in self.tensors for name in ("K", "V")], device=own.device)  # [2]
        of_head = torch.ones_like(own[0, :, 0], dtype=torch.bool)  # [num_kv_heads]
        if self.heads is not None:
            of_head.zero_()[list(self.heads)] = True
        return torch.where(struck[:, None, None] & of_head[:, None] & of_tensor, other, own)


def by_key(descales: torch.Tensor, page_size: int, cached_len: int) -> torch.Tensor:
    """The descales that the cached keys of one sequence should be scaled by, as Stale.used."""
    return descales[torch.arange(cached_len, device=descales.device) // page_size]


def at_transitions(num_pages: int, widths: Sequence[int], page_size: int, most: int) -> list[Stale]:
    """A tile of each page that has its neighbour's K, or V descale: at all transitions together, at `most` single ones.

    Of a sequence of `num_pages` pages; where it has two, their transition is named.
    """
    found = []
    for step in STEPS if num_pages > 1 else ():
        slots = range(num_pages - 1) if step > 0 else range(1, num_pages)  # pages that have a neighbour on that side
        places: list[int | None] = [*slots] if len(slots) == 1 else [None, *spread(slots, most)]
        found += [
            Stale(tensors, NEIGHBOUR, step, width, slot=place)
            for width in sorted({min(width, page_size) for width in widths})
            for place in places
            for tensors in TENSORS[:2]
        ]
    return found


def struck(own: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Which keys are not scaled by their own descales, both as Stale.used: int64 [m]."""
    return (own != used).any(2).any(1).nonzero()[:, 0]


def scaled(rows: Rows, own: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """As `change`, where cached keys are scaled by `used` instead of `own`, both as Stale.used."""
    keys = struck(own, used)
    k_gain, v_gain = (used[keys].double() / own[keys].double()).permute(2, 1, 0)[
        :, :, None
    ]  # [num_kv_heads, 1, m] each
    raw = rows.raw[0][..., keys] * k_gain if bool((k_gain != 1).any()) else None
    return change(rows, keys, raw, rows.v[0][:, keys] * v_gain.transpose(1, 2))


def change(rows: Rows, keys: torch.Tensor, raw: torch.Tensor | None, v: torch.Tensor) -> torch.Tensor:
    """What the outputs of `rows`, of one sequence, change by, exactly, where `keys` [m] have other products and values.

    raw [num_kv_heads, R * group, m], None where they have not; v [num_kv_heads, m, head_size_v]; all float64. Result
    [num_kv_heads, R * group, head_size_v].
    """
    p = rows.p[0][..., keys]  # [num_kv_heads, R * group, m]
    changed = p
    if raw is not None:
        shift = _capped(raw, rows.soft_cap) - _capped(rows.raw[0][..., keys], rows.soft_cap)
        exponent = (rows.scores[0][..., keys] + shift - rows.lse[0]).clamp_(max=MOST_EXPONENT)
        changed = exponent.exp_() * rows.visible[0][..., keys]
    mass = (changed - p).sum(-1, keepdim=True)  # [num_kv_heads, R * group, 1]
    result: torch.Tensor = (changed @ v - p @ rows.v[0][:, keys] - mass * rows.out[0]) / (1 + mass)
    return result


def across(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`x` [..., L, T, dv] without its part along `out` [..., L, dv].

    That is where a mean relative error of P shows, which 8-bit types have: as a bias it would hide a V descale.
    """
    out = out[..., None, :]
    along = (x * out).sum(-1, keepdim=True) / out.square().sum(-1, keepdim=True).clamp(min=1e-300)
    return x - along * out


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of `items`, evenly spread, the first and the last among them."""
    count = min(len(items), most)
    return sorted({items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)})


def _capped(raw: torch.Tensor, cap: float) -> torch.Tensor:
    return (raw / cap).tanh_().mul_(cap) if cap else raw
