"""Faults of what stored bytes mean: read as another format; of 8-bit queries and outputs, a descale left out.

Invariant: as for all fault models (harness.oracle.faults). Of bytes that another format has no number for, the fault is
taken to make 0: it is shown smaller than it is, never larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from harness.dtypes import element_type
from harness.oracle.scene import Outcome, Rows, Scene, per_head

Change = Callable[[Scene], Rows | Outcome | None]

_OTHER_BIAS = {  # the same bits with the exponent counted from elsewhere: twice, or half, the number
    "fp8_e4m3": "fp8_e4m3fnuz", "fp8_e4m3fnuz": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2fnuz", "fp8_e5m2fnuz": "fp8_e5m2",
}  # fmt: skip
_OTHER_SPLIT = {  # a bit of the exponent taken for one of the mantissa, or the other way
    "fp8_e4m3": "fp8_e5m2", "fp8_e4m3fnuz": "fp8_e5m2fnuz", "fp8_e5m2": "fp8_e4m3", "fp8_e5m2fnuz": "fp8_e4m3fnuz",
}  # fmt: skip


def _misread(payload: torch.Tensor, others: Mapping[str, str], kv_dtype: str) -> torch.Tensor | None:
    """float64 numbers of the bytes of `payload`, read as the format that `others` has for its own; None where none."""
    if kv_dtype not in others:
        return None
    return payload.view(element_type(others[kv_dtype]).torch).double().nan_to_num(0.0, 0.0, 0.0)


def _unsigned(payload: torch.Tensor, kv_dtype: str) -> torch.Tensor | None:
    return payload.view(torch.uint8).double() if kv_dtype == "int8" else None


def stored(scene: Scene, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Payload [keys, num_kv_heads, dim] and descale [keys, num_kv_heads, 1] of K or V."""
    k = which == "k"
    return (scene.key_payload, scene.k_descale) if k else (scene.value_payload, scene.v_descale)


Reading = Callable[[torch.Tensor, str], torch.Tensor | None]
_READINGS: Mapping[str, Reading] = {
    "the exponent off by one": lambda payload, own: _misread(payload, _OTHER_BIAS, own),
    "e5m2 for e4m3 or back": lambda payload, own: _misread(payload, _OTHER_SPLIT, own),
    "the sign lost": _unsigned,
}


def _encoding(which: str, reading: Reading) -> Change:
    def change(scene: Scene) -> Rows | None:
        cached = slice(0, scene.cached_len)
        payload, descale = stored(scene, which)
        read = reading(payload[cached], scene.case.kv_dtype)
        if read is None or not scene.cached_pages:
            return None
        values = read * descale[cached].double()  # [keys, num_kv_heads, dim]
        if which == "k":
            dots = scene.rows.dots.clone()
            dots[..., cached] = scene.dots(values, scene.kv_heads)
            return replace(scene.rows, dots=dots)
        v = scene.rows.v.clone()
        v[:, cached] = per_head(values, scene.kv_heads)
        return replace(scene.rows, v=v)

    return change


def q_descale_dropped(scene: Scene) -> Rows:
    return replace(scene.rows, dots=scene.rows.dots / scene.q_descale)


def output_scale_dropped(scene: Scene) -> Outcome:
    return Outcome(scene.right.out * scene.output_scale, None)


ENCODINGS: Mapping[str, Change] = {
    f"{which.upper()}, {label}": _encoding(which, reading) for which in "kv" for label, reading in _READINGS.items()
}
