"""Matrix: one file of `cases/`, read and checked. Plain data; harness.matrix.expand makes cases of it.

Invariant: a Matrix that exists is well formed: every name is known, every value has the type of its axis, and every
tier selects something (contracts of kernels aside, which are not known here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.case import Case
from harness.matrix.expect import Expectation, match
from harness.matrix.source import Source, Span
from harness.matrix.where import Where

if TYPE_CHECKING:
    from harness.matrix.expand import Expansion

TIERS = ("smoke", "ci", "nightly", "probe")
NOISE_FLOORS = ("report", "fail")
Values = Mapping[str, tuple[Any, ...]]  # {axis: values}; rows are RowMix, placements Placement, others plain
Supported = Callable[[Case], str | None]  # the clause of the kernel's contract that rules the case out, or None

FAULTS: Mapping[str, str] = {
    "output_zero": "an output of zeros",
    "mean_v": "the mean of V instead of attention: queries ignored",
    "newest_token": "the newest token of a row not read",
    "window_edges": "the sliding window off by one at either edge",
    "causal_edge": "the causal mask off by one",
    "sink_tokens": "the leading tokens that a window does not hide dropped, or one of them too many or too few",
    "page_swap": "a page read from its neighbour's place",
    "k_descale": "the K descale of one page, or of one head, off by 2 %",
    "v_descale": "the V descale of one page, or of one head, off by 2 %",
    "scale_dropped": "a descale not applied",
    "stale_descale": "keys beside a page transition scaled by the descale of the page on the other side",
    "descale_head": "the descale of another KV head",
    "descale_slot": "the descale of the neighbouring token",
    "encoding": "stored bytes read as another format",
    "q_descale": "the descale of the query not applied",
    "output_scale": "the scale of the output not applied",
    "softmax_scale": "the softmax scale off by 2 %",
    "gqa_mapping": "queries matched with the wrong KV head",
    "sink": "the attention sink dropped or counted twice",
    "soft_cap": "the soft cap not applied",
    "alibi": "the ALiBi bias dropped",
    "head_dim_tail": "dimensions beyond the largest power of two ignored",
    "split_weight": "split-KV parts merged with wrong weights",
}


@dataclass(frozen=True)
class Rule:
    """A constraint of the matrix: only combinations that meet it are cases."""

    where: Where
    because: str
    span: Span


@dataclass(frozen=True)
class MustRun:
    """Cases that meet `where` launch the device kernel `kernel`."""

    where: Where
    kernel: str
    span: Span


@dataclass(frozen=True)
class Unreached:
    """A branch of the dispatch of `kernel` that the sweep does not take in `tiers`, and why not."""

    kernel: str
    branch: str
    because: str
    tiers: tuple[str, ...]
    kernel_span: Span
    branch_span: Span


@dataclass(frozen=True)
class Entry:
    """One element of `list` or `also`: what it says of the axes, multiplied out over what it lists."""

    values: Values
    span: Span


@dataclass(frozen=True)
class Tier:
    """How one tier selects: `cover` (2 or 3), `full`, or the entries alone; `shrink` replaces values of axes."""

    name: str
    span: Span
    cover: int | None = None
    full: bool = False
    entries: tuple[Entry, ...] = ()
    shrink: Values | None = None


@dataclass(frozen=True)
class Matrix:
    """`values` are those of kernels, fixed and axes together, in the order of AXES; absent axes are at their default.

    `spans` are the places of single values, {(axis, value): place}, for messages about combinations.
    """

    path: Path
    name: str
    about: str
    values: Values
    rules: tuple[Rule, ...]
    must_see: tuple[str, ...]
    tiers: Mapping[str, Tier]
    expectations: tuple[Expectation, ...]
    source: Source
    spans: Mapping[tuple[str, Any], Span]
    margin: float = 8.0  # tolerances by which the effect of a fault of must_see shows
    legacy_tolerance: tuple[float, float] | None = None  # atol, rtol of another suite; attnreg audit measures with it
    twins: tuple[str, ...] = ()  # of TWIN_AXES: a case's twin with another value must leave the same bits
    must_run: tuple[MustRun, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    noise_floor: str = "off"  # off, or one of NOISE_FLOORS: what an error elevated over that of a case's twin ends in

    @property
    def kernels(self) -> tuple[str, ...]:
        return self.values["kernel"]

    def expand(self, tier: str, *, supported: Supported) -> Expansion:
        """The cases of `tier`; none where the matrix does not have that tier.

        `supported` gives the clause of a contract that rules a case out, or None. Such cases are left out of covers
        (and counted), and kept in full products and lists, where they end as UNSUPPORTED.
        Raises MatrixError where the tier would select nothing.
        """
        from harness.matrix.expand import expand  # it needs Matrix

        return expand(self, tier, supported)

    def expectation(self, case: Case) -> Expectation | None:
        """The expectation that `case` meets, if any."""
        return match(self.expectations, case)
