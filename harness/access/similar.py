"""Findings that say the same, told once. Invariant: none is lost; each counts in exactly one of those that remain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from harness.oracle.findings import AccessFinding

TWINS = {"v_cache": "k_cache", "v": "k", "v_token_descale": "k_token_descale", "v_scale": "k_scale"}


def similar(found: Iterable[AccessFinding]) -> tuple[AccessFinding, ...]:
    """One finding per kind, buffer, kernel and line; those of K and V in one where they agree place by place."""
    lines: dict[tuple[object, ...], list[AccessFinding]] = {}
    for one in found:
        lines.setdefault((one.kind, one.buffers, one.kernel, one.where), []).append(one)
    told: list[AccessFinding] = []
    places: dict[object, int] = {}  # what a group says but for buffer and line -> index into `told`
    for group in lines.values():
        (buffer,) = group[0].buffers
        said = tuple(replace(one, buffers=(), where="") for one in group)
        twin = places.get((TWINS.get(buffer), said))
        if twin is not None:
            told[twin] = replace(told[twin], buffers=(*told[twin].buffers, buffer))
            continue
        places[buffer, said] = len(told)
        told.append(replace(group[0], others=len(group) - 1))
    return tuple(told)
