"""Gains: what matched filters found, as plain numbers. Invariant: no tensors, no words beyond the names of kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass

K_DESCALE, V_DESCALE = "K descale", "V descale"


@dataclass(frozen=True)
class Gain:
    """One signature with its strength. Fields that do not apply are None; all None but kv_head: the whole batch."""

    kind: str
    estimate: float  # relative: 0.017 is x1.017, -1 is missing
    z: float
    kv_head: int | None = None
    sequence: int | None = None
    slot: int | None = None  # of the page within its sequence
    page: int | None = None  # physical


@dataclass(frozen=True)
class GainFindings:
    """`gains` are those above the limit, strongest first, at most MAX_GAINS of them."""

    z: float = 0.0  # largest |z| of all statistics
    num_statistics: int = 0  # 0: the filter does not apply to this case
    gains: tuple[Gain, ...] = ()
    num_gains: int = 0  # before the list was cut
    least_k: float = math.inf  # smallest detectable gain on the K of one page, median over pages
    least_v: float = math.inf

    @property
    def best(self) -> Gain | None:
        return self.gains[0] if self.gains else None
