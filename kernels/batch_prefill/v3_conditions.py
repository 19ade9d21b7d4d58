"""When batch prefill takes its V3 kernel instead of V2: what dispatch says of a request, and what this V3 cannot.

Invariant: the contracts of V3 and of the dispatcher and the dispatcher itself ask this one predicate.
"""

from __future__ import annotations

from harness.case import Case
from harness.dispatch.batch_prefill import V3_REQUEST, BatchPrefillFacts, V3Clause
from harness.dispatch.predicate import Predicate

V2_KERNEL, V3_KERNEL = "batch_prefill_v2_kernel", "batch_prefill_v3_kernel"


def facts_of(case: Case, platform: str = "") -> BatchPrefillFacts:
    """What the dispatcher will see of `case`."""
    stored = case.stored_dtype
    return BatchPrefillFacts(
        arch=platform,
        q_dtype=case.query_dtype,
        k_dtype=stored,
        v_dtype=stored,
        layout=case.layout,
        page_size=case.page_size,
        sliding_window=case.sliding_window or 0,
        logits_soft_cap=case.logits_soft_cap or 0.0,
        alibi=case.alibi,
        sinks=case.sinks,
        sink_tokens=case.sink_tokens,
        descales_per_page=case.descales_per == "page",
    )


V3_CONDITIONS = Predicate(
    "batch_prefill",
    facts_of,
    (
        *V3_REQUEST,
        V3Clause("encoding", "the encoding is not e4m3fn", lambda f: {f.q_dtype, f.k_dtype, f.v_dtype} <= {"fp8_e4m3"}),
    ),
    kernels=(V3_KERNEL,),
    otherwise=(V2_KERNEL,),
)
