"""Inputs for tests of the oracle: small batches over data laws and features, and one call that judges an output."""

from __future__ import annotations

from typing import Any

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile
from harness.oracle.findings import Findings
from harness.oracle.judge import judge
from harness.oracle.tolerance import rounding_of, tolerance
from references.attention import AttentionInputs, attend

MIXED = ((48, 1, 20, 3), (300, 257, 20, 1))  # query_lens, seq_lens: chunk, decode, prefill, two rows without keys
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 37},
    "window and sink tokens": {"sliding_window": 37, "sink_tokens": 5},
    "noncausal": {"causal": False},
    "soft_cap": {"logits_soft_cap": 2.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "all": {"alibi": True, "sinks": True, "logits_soft_cap": 5.0, "sliding_window": 100},
}


def make_case(
    law: str = "normal",
    q_dtype: str = "fp16",
    *,
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = MIXED,
    kv_heads: int = 2,
    group: int = 2,
    size: int = 64,
    seed: int = 0,
    alibi: bool = False,
    sinks: bool = False,
    **features: Any,
) -> AttentionInputs:
    """normal: N(0,1); outliers: plus N(0,100) in one of a thousand; structured: 8 distinct keys, V with a mean."""
    g = torch.Generator().manual_seed(seed)
    query_lens, seq_lens = lengths
    dtype = element_type(q_dtype).torch

    def draw(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=g)
        if law == "outliers":
            x += 10 * torch.randn(*shape, generator=g) * (torch.rand(*shape, generator=g) < 1e-3)
        return x

    num_keys, heads = sum(seq_lens), kv_heads * group
    q, k, v = draw(sum(query_lens), heads, size), draw(num_keys, kv_heads, size), draw(num_keys, kv_heads, size)
    if law == "structured":
        pick = torch.arange(num_keys) % 8
        k, v = k[pick], v[pick] + 0.5
    return AttentionInputs(
        q=q.to(dtype),
        k=k.to(dtype).float(),
        v=v.to(dtype).float(),
        query_lens=query_lens,
        seq_lens=seq_lens,
        softmax_scale=size**-0.5,
        alibi_slopes=2.0 ** -torch.arange(1.0, heads + 1) if alibi else None,
        sinks=torch.linspace(2.0, 6.0, heads) if sinks else None,
        **features,
    )


def judged(
    inputs: AttentionInputs,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    profile: NumericsProfile,
    q_dtype: str,
    structured: bool = False,
) -> Findings:
    """`out` and `lse` judged against the reference of `inputs`, NaN counting as unwritten."""
    reference = attend(inputs, rounding_of(profile, q_dtype))
    allowed = tolerance(reference, profile, q_dtype, inputs.q.shape[2], structured=structured)
    unwritten = (out.isnan(), lse.isnan()) if lse is not None else (out.isnan(),)
    return judge(out, lse, reference, allowed, unwritten=unwritten)


def ratios(findings: Findings) -> dict[str, float]:
    return {t.name: t.err_over_tol for t in findings.tensors}
