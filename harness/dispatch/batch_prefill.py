"""When batch prefill takes its V3 kernel instead of V2, whose output does not tell which of them ran.

Invariant: the clauses hold together exactly where a V3 kernel is built for the request; all else goes to V2.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.dispatch.predicate import Clause

FP8 = frozenset({"fp8_e4m3", "fp8_e4m3fnuz"})
LINEAR = frozenset({"linear_nhd", "linear_3d"})
PAGE_SIZES = frozenset({1, 16, 1024})
TILE_KEYS = 64  # of V3: with descales by page, a tile lies in one page


@dataclass(frozen=True)
class BatchPrefillFacts:
    """What batch prefill looks at before it launches a kernel."""

    arch: str
    q_dtype: str  # names of element types, never auto
    k_dtype: str
    v_dtype: str
    layout: str
    page_size: int
    sliding_window: int  # 0: off
    logits_soft_cap: float  # 0: off
    alibi: bool
    sinks: bool  # one more logit per head
    sink_tokens: int  # tokens that every query sees; 0: off
    descales_per_page: bool


V3Clause = Clause[BatchPrefillFacts]

V3_MACHINE: tuple[V3Clause, ...] = (
    V3Clause("arch", "V3 is built for gfx950 only", lambda f: f.arch == "gfx950", machine=True),
)
V3_REQUEST: tuple[V3Clause, ...] = (
    V3Clause("dtype", "q, k and v are not all fp8", lambda f: {f.q_dtype, f.k_dtype, f.v_dtype} <= FP8),
    V3Clause("layout", "the layout is not linear", lambda f: f.layout in LINEAR),
    V3Clause("page_size", "the page size is none of 1, 16 and 1024", lambda f: f.page_size in PAGE_SIZES),
    V3Clause("window", "a sliding window is given", lambda f: f.sliding_window == 0),
    V3Clause("soft_cap", "a soft cap is given", lambda f: f.logits_soft_cap == 0),
    V3Clause("alibi", "ALiBi slopes are given", lambda f: not f.alibi),
    V3Clause("sinks", "sinks are given", lambda f: not f.sinks),
    V3Clause("sink_tokens", "sink tokens are given", lambda f: f.sink_tokens == 0),
    V3Clause(
        "descales_per_page",
        f"descales come by page, and pages hold fewer than {TILE_KEYS} tokens",
        lambda f: not f.descales_per_page or f.page_size >= TILE_KEYS,
    ),
)
