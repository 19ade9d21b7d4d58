"""Problem: what is to be computed, before any page, layout or kernel exists.

Invariant: built from a Case alone, the same bits on every device; k and v hold every position of every sequence in the
dtype of the case, so that what a cache must hold, and what a kernel gets as new tokens, are slices of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from harness.case import Case
from harness.dtypes import element_type
from harness.errors import LawError, PlacementError
from harness.problem import random
from harness.problem.admission import law_refusal, placement_refusal, shared_prefix_len
from harness.problem.laws import draw_keys, draw_queries, draw_sinks, draw_values
from harness.problem.masks import alibi_slopes
from harness.problem.needle import needle_queries, snap_keys, stored_as
from harness.problem.spans import key_start

_K_SCALES = (0.02, 0.15)  # apart from each other and from 1: payloads of N(0, 1) stay inside, and use, the fp8 range
_V_SCALES = (0.25, 0.9)
_STRUCTURED = frozenset({"uniform", "needle"})


@dataclass(frozen=True)
class Problem:
    """Logical inputs of one case. `structured`: rounding errors of the case are no independent draws."""

    case: Case
    q: torch.Tensor  # [num_tokens, num_q_heads, head_size]
    k: torch.Tensor  # [num_keys, num_kv_heads, head_size] all positions [0, seq_len) of all sequences, packed
    v: torch.Tensor  # [num_keys, num_kv_heads, head_size_v]
    key_start: tuple[int, ...]  # num_seqs + 1
    softmax_scale: float
    alibi_slopes: torch.Tensor | None  # [num_q_heads] float32
    sinks: torch.Tensor | None  # [num_q_heads] float32
    k_scale: float  # value = payload * scale; 1.0 unless the cache stores fp8
    v_scale: float
    shared_prefix: int  # leading tokens that all sequences with context have in common
    structured: bool
    geometry_seed: int
    data_seed: int


def build_problem(case: Case, device: torch.device | str) -> Problem:
    """Draw the inputs of `case` on `device`.

    Raises LawError where the data law cannot keep its promise, PlacementError where the placement does not fit.
    """
    if reason := law_refusal(case):
        raise LawError(reason)
    if reason := placement_refusal(case):
        raise PlacementError(reason)
    slopes = alibi_slopes(case.num_q_heads) if case.alibi else None
    softmax_scale = case.scale_factor / math.sqrt(case.head_size)
    sinks = draw_sinks(case, slopes, device) if case.sinks else None
    k, v = _share_prefix(case, draw_keys(case, device)), _share_prefix(case, draw_values(case, device))
    if case.data == "needle":
        k = snap_keys(case, k)
    k_scale, v_scale = _scale(case, "k", k, _K_SCALES), _scale(case, "v", v, _V_SCALES)
    if case.data == "needle":
        payload = stored_as(case, k, k_scale)
        k = (payload * k_scale).to(k.dtype)  # unchanged where the cache stores the dtype of the case
        q = needle_queries(case, payload, k_scale, softmax_scale, slopes, sinks)
    else:
        q = draw_queries(case, k)
    return Problem(
        case=case,
        q=q,
        k=k,
        v=v,
        key_start=key_start(case.rows),
        softmax_scale=softmax_scale,
        alibi_slopes=None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device),
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        shared_prefix=shared_prefix_len(case),
        structured=case.data in _STRUCTURED,
        geometry_seed=case.geometry_seed,
        data_seed=case.data_seed,
    )


def _share_prefix(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [num_keys, heads, d] with the shared prefix of the first sequence with context in all that have one."""
    length, starts = shared_prefix_len(case), key_start(case.rows)
    with_context = [starts[seq] for seq, context_len in enumerate(case.rows.context_lens) if context_len > 0]
    if length:
        for start in with_context[1:]:
            tensor[start : start + length] = tensor[with_context[0] : with_context[0] + length]
    return tensor


def _scale(case: Case, name: str, tensor: torch.Tensor, between: tuple[float, float]) -> float:
    """A float32 descale for `tensor` drawn from `between`, larger where its largest element needs it; 1 for auto."""
    if case.kv_dtype == "auto":
        return 1.0
    low, high = between
    drawn = low + (high - low) * float(random.uniform(case.data_seed, f"{name}_scale", (1,), "cpu"))
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    enough = largest / element_type(case.stored_dtype).largest
    return float(torch.tensor(max(drawn, enough * (1 + 2.0**-10)), dtype=torch.float32))
