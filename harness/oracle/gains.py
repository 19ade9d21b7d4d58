"""What matched filters and the hull found, as plain numbers.

Invariant: no tensors, and no words beyond the names of kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MAX_GAINS = 16  # listed

# Kinds of gain. A weight is a share of the softmax: -1 where it is missing, 1 where it counts twice.
K_DESCALE, V_DESCALE = "K descale", "V descale"
K_STALE, V_STALE = "stale K descale", "stale V descale"  # keys beside a page transition, scaled as the neighbour's
PAGE_WEIGHT = "page weight"
TOKEN_WEIGHT = "token weight"
TOKEN_ZERO = "token read as zero"
TOKEN_VALUE = "values of token"
OLDEST_WEIGHT = "oldest key"  # of what each row sees: the left edge of a window
NEWEST_WEIGHT = "newest key"  # of what each row sees: the causal edge
BEYOND_OLDEST, BEYOND_NEWEST = "key left of the window", "key behind the query"
SINK_TOKENS, BEYOND_SINKS = "sink tokens", "key behind the sink tokens"
HEAD_MODULO, HEAD_SHIFT = "kv head modulo", "kv head shifted"
SPLIT_WEIGHT, SPLIT_AVERAGE = "split weight", "splits averaged"
ROW_GAIN = "row gain"


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
    position: int | None = None  # of a token within its sequence
    other_head: int | None = None  # the KV head that was read instead
    split: int | None = None
    step: int | None = None  # to the page whose descale is taken, 1: the next one; None in slot: at every transition
    num_keys: int | None = None  # of a page that have it
    other_page: int | None = None  # physical, whose descale it is
    share: float | None = None  # of the squared error of the rows looked at, as far as it was asked


@dataclass(frozen=True)
class GainFindings:
    """`gains` are those above the limit, strongest first, those of transitions apart, at most MAX_GAINS.

    `source` is the simplest single fault that explains an error, where one explains most of it.
    """

    z: float = 0.0  # largest |z| of all statistics
    num_statistics: int = 0  # 0: the filter does not apply to this case
    gains: tuple[Gain, ...] = ()
    num_gains: int = 0  # before the list was cut
    least_k: float = math.inf  # smallest detectable gain on the K of one page, median over pages
    least_v: float = math.inf
    source: Gain | None = None

    @property
    def best(self) -> Gain | None:
        return self.source or (self.gains[0] if self.gains else None)


def like_stale(gain: Gain) -> bool:
    """Whether a statistic of a transition found about what it looks for; else it found another fault."""
    return 0.5 < gain.estimate < 2


def together(pages: GainFindings, transitions: GainFindings) -> GainFindings:
    """The findings of pages, and those of their transitions, which come first where they say most."""
    strongest = max((abs(gain.z) for gain in pages.gains), default=0.0)
    lead = next((gain for gain in transitions.gains if like_stale(gain) and abs(gain.z) > strongest), None)
    first, second = (transitions, pages) if lead else (pages, transitions)
    return replace(
        pages,
        z=max(pages.z, transitions.z),
        num_statistics=pages.num_statistics + transitions.num_statistics,
        gains=(*first.gains, *second.gains)[:MAX_GAINS],
        num_gains=pages.num_gains + transitions.num_gains,
    )


@dataclass(frozen=True)
class HullFindings:
    """How many elements lie outside the range of what their row attends to, and the one that does by most."""

    num_outside: int = 0
    num_elements: int = 0
    token: int = -1
    head: int = -1
    dim: int = -1
    got: float = 0.0
    low: float = 0.0
    high: float = 0.0
