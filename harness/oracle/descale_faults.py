"""Faults of descales: off by some per cent, left out, or those of another page, head or slot.

Invariant: as for all fault models (harness.oracle.faults).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from harness.oracle.payload_faults import Change, stored
from harness.oracle.scene import PLACES, Rows, Scene, per_head
from harness.oracle.stale import NEIGHBOUR, STEPS, Stale

GAIN = 1.02  # of the faults that scale: about what the descales of two neighbouring pages differ by
STALE_TILE = 64  # keys per tile that has the descale of a neighbouring page


def _under_one_descale(scene: Scene, place: Callable[[Sequence[int]], int]) -> slice | None:
    """Cached tokens whose descale is wrong where one is: a page, but all tokens where a head has one descale."""
    if not scene.cached_pages:
        return None
    return slice(0, scene.cached_len) if scene.case.descales_per == "head" else scene.slots(place(scene.cached_pages))


def _scaled(scene: Scene, which: str, keys: slice, by: torch.Tensor | float) -> Rows:
    """K or V of `keys` times `by`, a number or [heads, keys, 1]."""
    if which == "k":
        dots = scene.rows.dots.clone()
        dots[..., keys] *= by.transpose(1, 2) if isinstance(by, torch.Tensor) else by
        return replace(scene.rows, dots=dots)
    v = scene.rows.v.clone()
    v[:, keys] *= by
    return replace(scene.rows, v=v)


def _descale(which: str, place: Callable[[Sequence[int]], int]) -> Change:
    def change(scene: Scene) -> Rows | None:
        slots = _under_one_descale(scene, place)
        return None if slots is None else _scaled(scene, which, slots, GAIN)

    return change


def _k_scale_dropped(scene: Scene) -> Rows | None:
    if not scene.cached_pages:
        return None
    dots = scene.rows.dots.clone()
    cached = scene.dots(scene.key_payload[: scene.cached_len], scene.kv_heads)
    dots[..., : scene.cached_len] = cached
    return replace(scene.rows, dots=dots)


def _v_scale_dropped(scene: Scene) -> Rows | None:
    if not scene.cached_pages:
        return None
    v = scene.rows.v.clone()
    v[:, : scene.cached_len] = per_head(scene.value_payload[: scene.cached_len], scene.kv_heads)
    return replace(scene.rows, v=v)


def _stale_descale(tensors: str, step: int) -> Change:
    """A tile beside each page transition is scaled as the page on the other side."""

    def change(scene: Scene) -> Rows | None:
        if scene.cached_len <= scene.case.page_size:
            return None
        size = scene.case.page_size
        own = torch.cat((scene.k_descale, scene.v_descale), dim=2)[: scene.cached_len]  # [cached_len, num_kv_heads, 2]
        used = Stale(tensors, NEIGHBOUR, step, min(STALE_TILE, size)).used(own[::size], size, len(own))
        gains = (used.double() / own.double())[:, scene.kv_heads]  # [cached_len, heads, 2]
        dots, v = scene.rows.dots.clone(), scene.rows.v.clone()
        dots[..., : len(own)] *= gains[..., 0].T[:, None]
        v[:, : len(own)] *= gains[..., 1].T[..., None]
        return replace(scene.rows, dots=dots, v=v)

    return change


def _with_descale(scene: Scene, which: str, keys: slice, descale: torch.Tensor) -> Rows:
    """`descale` [keys of the slice, num_kv_heads, 1] in place of the right one."""
    ratio = per_head(descale.double() / stored(scene, which)[1][keys], scene.kv_heads)  # [heads, keys, 1]
    return _scaled(scene, which, keys, ratio)


def _other_head(which: str) -> Change:
    def change(scene: Scene) -> Rows | None:
        if not scene.cached_pages:
            return None
        cached = slice(0, scene.cached_len)
        return _with_descale(scene, which, cached, stored(scene, which)[1][cached].roll(-1, 1))

    return change


def _other_slot(which: str, place: Callable[[Sequence[int]], int] | None) -> Change:
    """On one page, or on all where `place` is None."""

    def change(scene: Scene) -> Rows | None:
        if not scene.cached_pages:
            return None
        slots = slice(0, scene.cached_len) if place is None else scene.slots(place(scene.cached_pages))
        keys = slice(max(slots.start, 1), slots.stop)
        if keys.start >= keys.stop:
            return None
        return _with_descale(scene, which, keys, stored(scene, which)[1][keys.start - 1 : keys.stop - 1])

    return change


def stale_label(tensors: str, step: int) -> str:
    """The variant of stale_descale in which tiles have the descale of the page `step` away."""
    return f"of {tensors}, one tile {'early' if step > 0 else 'late'}"


K_DESCALES: Mapping[str, Change] = {label: _descale("k", place) for label, place in PLACES.items()}
V_DESCALES: Mapping[str, Change] = {label: _descale("v", place) for label, place in PLACES.items()}
DROPPED: Mapping[str, Change] = {"of K": _k_scale_dropped, "of V": _v_scale_dropped}
STALE: Mapping[str, Change] = {
    stale_label(tensors, step): _stale_descale(tensors, step) for tensors in ("K", "V") for step in STEPS
}
OTHER_HEADS: Mapping[str, Change] = {f"of {which.upper()}": _other_head(which) for which in "kv"}
OTHER_SLOTS: Mapping[str, Change] = {
    f"of {which.upper()}, {label}": _other_slot(which, place) for which in "kv" for label, place in PLACES.items()
}
EVERY_OTHER_SLOT: Mapping[str, Change] = {f"of {which.upper()}": _other_slot(which, None) for which in "kv"}
