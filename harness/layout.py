"""The one table of layouts: how (page, slot, head, dim) maps to the dimensions of K and V.

Invariant: every view, address, grid and shape of a cache is derived from this table. A dimension is all of an index,
or its quotient ("/x") or remainder ("%x") by x; x is 16 bytes of elements, or the largest power of two below that
divides the length of the index that is split (fp8 of vllm_classic with head size 24: 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VECTOR_BYTES = 16
_ORDER = ("page", "slot", "head", "dim")
LAYOUTS: Mapping[str, tuple[str, str]] = {  # dimensions of K and of V
    "linear_nhd": ("page slot head dim", "page slot head dim"),
    "linear_3d": ("page head dim", "page head dim"),  # pages of one token
    "hnd": ("page head slot dim", "page head slot dim"),
    "vllm_classic": ("page head dim/x slot dim%x", "page head dim slot"),
    "vectorized": ("page head dim/x slot dim%x", "page head slot/x dim slot%x"),
}
WHOLE_VECTORS = frozenset({"vectorized"})  # x is 16 bytes, no less; and what a head has of a page is one block


@dataclass(frozen=True)
class Part:
    """One dimension of a cache tensor: a step in it adds `step` to the index `of`."""

    of: str  # page | slot | head | dim
    step: int
    size: int


def dims_of(layout: str, which: str) -> tuple[str, ...]:
    """Names of the dimensions of K (`which` "k") or V ("v"), e.g. ("page", "head", "dim/x", "slot", "dim%x")."""
    return tuple(LAYOUTS[layout][which == "v"].split())


def cache_shape(
    layout: str, which: str, pages: int, page_size: int, heads: int, dim: int, size: int
) -> tuple[int, ...]:
    """Shape of K or V with elements of `size` bytes."""
    lengths = {"page": pages, "slot": page_size, "head": heads, "dim": dim}

    def length(name: str) -> int:
        whole = lengths[_index_of(name)]
        x = vector_size(whole, size)
        return x if name.endswith("%x") else whole // x if name.endswith("/x") else whole

    return tuple(length(name) for name in dims_of(layout, which))


def vector_size(length: int, size: int) -> int:
    """x of an index of `length` values in elements of `size` bytes."""
    return math.gcd(VECTOR_BYTES // size, length)


def parts(layout: str, which: str, shape: Sequence[int]) -> tuple[Part, ...]:
    """The dimensions of a K or V of `shape`, as steps of page, slot, head and dim."""
    named = tuple(zip(dims_of(layout, which), shape, strict=True))
    x = {_index_of(name): n for name, n in named if name.endswith("%x")}
    return tuple(Part(_index_of(name), x[_index_of(name)] if name.endswith("/x") else 1, n) for name, n in named)


def by_meaning(layout: str, which: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a K or V of `shape` in the order page, slot, head, dim, quotients before remainders."""
    found = parts(layout, which, shape)
    return tuple(sorted(range(len(found)), key=lambda i: (_ORDER.index(found[i].of), -found[i].step)))


def _index_of(name: str) -> str:
    return name.removesuffix("/x").removesuffix("%x")
