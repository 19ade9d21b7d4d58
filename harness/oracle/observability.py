"""Observability: whether a case could see a fault at all, decided from what is about to be handed over.

Invariant: a case that cannot see a fault is never reported as PASS; it is BLIND, with the fault and the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Blindness:
    fault: str
    because: str


def blind_to(*, kv_dtype: str, k_scale: float, v_scale: float, pages: Sequence[Sequence[int]]) -> tuple[Blindness, ...]:
    """Faults that no output of this set-up can show.

    `pages` are the physical pages of each sequence, in order.
    """
    found: list[Blindness] = []
    if kv_dtype != "auto":
        for name, scale in (("k_descale", k_scale), ("v_descale", v_scale)):
            if scale == 1.0:
                found.append(Blindness(name, f"the {name[0].upper()} descale is 1: a kernel that ignores it passes"))
        if k_scale == v_scale != 1.0:
            found.append(Blindness("descales_exchanged", f"K and V descale are both {k_scale:g}"))
    in_order = [page for sequence in pages for page in sequence]
    if in_order and in_order == list(range(len(in_order))):
        found.append(
            Blindness(
                "page_mapping", "every page lies where a kernel that ignores the page table looks for it (0, 1, 2, ...)"
            )
        )
    return tuple(found)
