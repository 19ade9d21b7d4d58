"""The reference of a set-up: what a right kernel sees and makes of it.

Invariant: decided by the case and the contract; what a set-up fault changed does not move it.
"""

from __future__ import annotations

from harness.cache.build import KVCache, demanded_lens
from harness.cache.effective import Descales, effective_kv, value_weights
from harness.dtypes import element_type
from harness.kernel.contract import Contract
from harness.oracle.emulate import emulate
from harness.oracle.tolerance import rounding_of
from harness.problem.problem import Problem
from references.attention import AttentionInputs, AttentionReference, attend


def build_reference(problem: Problem, cache: KVCache, contract: Contract) -> AttentionReference:
    """float64 attention over what a right kernel sees."""
    return attend_as(reference_inputs(problem, cache, contract), problem, contract)


def attend_as(inputs: AttentionInputs, problem: Problem, contract: Contract) -> AttentionReference:
    """float64 attention over `inputs`, with the moments that the roundings of the contract ask for."""
    return attend(inputs, rounding_of(contract.numerics, problem.case.dtype))


def reference_inputs(
    problem: Problem, cache: KVCache, contract: Contract, descales: Descales | None = None
) -> AttentionInputs:
    """What a right kernel sees: dequantised stored bytes and raw new tokens, rounded as the contract declares.

    With `descales`: what a kernel sees that is right but for using these.
    """
    case, numerics = problem.case, contract.numerics
    k, v = effective_kv(problem, cache, contract.content, descales)
    q = problem.q.to(element_type(case.dtype).torch)  # exact: each of these types holds every 8-bit float
    seen = emulate(q, k, v, numerics, case.dtype, problem.softmax_scale, problem.q_descale)
    apart = seen.q_cached is not None or rounding_of(numerics, case.dtype).cached is not None
    return AttentionInputs(
        q=seen.q,
        k=seen.k,
        v=seen.v,
        query_lens=case.rows.query_lens,
        seq_lens=case.rows.seq_lens,
        softmax_scale=problem.softmax_scale,
        causal=case.causal,
        sliding_window=case.sliding_window,
        logits_soft_cap=case.logits_soft_cap,
        alibi_slopes=problem.alibi_slopes,
        sinks=problem.sinks,
        sink_tokens=case.sink_tokens,
        q_cached=seen.q_cached,
        cached_lens=demanded_lens(problem, contract.content) if apart else None,
        weight_scale=value_weights(problem, contract.content, descales) if numerics.p_fold_v else None,
    )
