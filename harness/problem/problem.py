"""Problem: what is to be computed, before any page, layout or kernel exists.

Invariant: built from a Case alone, the same bits on every device; k and v hold every position of every sequence in the
dtype of the case, so that what a cache must hold, and what a kernel gets as new tokens, are slices of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from harness.case import Case
from harness.dtypes import element_type
from harness.errors import LawError, PlacementError
from harness.problem.admission import (
    NEEDLES,
    STRUCTURED,
    descales_refusal,
    law_refusal,
    layout_refusal,
    placement_refusal,
    shared_prefix_len,
    tied,
)
from harness.problem.descales import cache_descales, group_of_key, output_scale, tensor_descale
from harness.problem.laws import draw_keys, draw_queries, draw_sinks, draw_values
from harness.problem.masks import alibi_slopes
from harness.problem.needle import needle_queries, snap_keys, stored_as
from harness.problem.payload import payload_of
from harness.problem.spans import key_start


@dataclass(frozen=True)
class Problem:
    """Logical inputs of one case. `structured`: rounding errors of the case are no independent draws."""

    case: Case
    q: torch.Tensor  # [num_tokens, num_q_heads, head_size] as stored: value = q * q_descale
    k: torch.Tensor  # [num_keys, num_kv_heads, head_size] all positions [0, seq_len) of all sequences, packed
    v: torch.Tensor  # [num_keys, num_kv_heads, head_size_v]
    key_start: tuple[int, ...]  # num_seqs + 1
    softmax_scale: float
    alibi_slopes: torch.Tensor | None  # [num_q_heads] float32
    sinks: torch.Tensor | None  # [num_q_heads] float32
    descales: torch.Tensor  # [groups, num_kv_heads, 2] float32, of K then V (see harness.problem.descales); 1 if unused
    q_descale: float  # 1 where q has the dtype of the case
    output_scale: float  # value = stored output * output_scale; 1 where the output has the dtype of the case
    shared_prefix: int  # leading tokens that all sequences with context have in common
    structured: bool
    geometry_seed: int
    data_seed: int

    def descale(self, which: str) -> torch.Tensor:
        """What payloads of K (`which` "k") or V are multiplied by: float32 that broadcasts against the packed keys,
        [1, 1, 1] per tensor, [1, num_kv_heads, 1] per head, else [num_keys, num_kv_heads, 1].
        """
        own = self.descales[..., "kv".index(which), None]
        if self.case.descales_per in ("tensor", "head"):
            return own
        return own[group_of_key(self.case).to(own.device)]

    def place_of(self, key: int) -> tuple[int, int]:
        """Sequence and position of a packed key."""
        seq = max(i for i, start in enumerate(self.key_start[:-1]) if start <= key)
        return seq, key - self.key_start[seq]

    def without_writer(self) -> Problem:
        """The same with a cache that is built full."""
        return replace(self, case=self.case.without_writer())


def build_problem(case: Case, device: torch.device | str) -> Problem:
    """Draw the inputs of `case` on `device`.

    Raises LawError where the data law cannot keep its promise or the descales do not fit the cache, PlacementError
    where the placement or the layout does not fit.
    """
    if reason := law_refusal(case) or descales_refusal(case):
        raise LawError(reason)
    if reason := layout_refusal(case) or placement_refusal(case):
        raise PlacementError(reason)
    slopes = alibi_slopes(case.num_q_heads) if case.alibi else None
    softmax_scale = case.scale_factor / math.sqrt(case.head_size)
    sinks = draw_sinks(case, slopes, device) if case.sinks else None
    k, v = _tie(case, draw_keys(case, device)), _tie(case, draw_values(case, device))
    if case.data in NEEDLES:
        k = snap_keys(case, k)
    problem = Problem(
        case=case,
        q=k[:0],  # drawn last, as some laws point queries at keys as they are stored
        k=k,
        v=v,
        key_start=key_start(case.rows),
        softmax_scale=softmax_scale,
        alibi_slopes=None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device),
        sinks=sinks,
        descales=cache_descales(case, k, v),
        q_descale=1.0,
        output_scale=output_scale(case),
        shared_prefix=shared_prefix_len(case),
        structured=case.data in STRUCTURED or case.placement.repeats,
        geometry_seed=case.geometry_seed,
        data_seed=case.data_seed,
    )
    if case.data not in NEEDLES:
        q = draw_queries(case, k)
        scale = tensor_descale(case, "q", q)
        return replace(problem, q=_stored_queries(case, q, scale), q_descale=scale)
    descale = problem.descale("k").to(torch.float64)
    payload = stored_as(case, k, descale)
    k = (payload * descale).to(k.dtype)  # unchanged where the cache stores the dtype of the case
    q, q_descale = needle_queries(case, payload, descale, softmax_scale, slopes, sinks)
    return replace(problem, k=k, q=q, q_descale=q_descale)


def _stored_queries(case: Case, q: torch.Tensor, descale: float) -> torch.Tensor:
    """`q` [num_tokens, num_q_heads, head_size] as it is handed over."""
    return q if case.q_dtype == "auto" else payload_of(q, descale, element_type(case.q_dtype))


def _tie(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` [num_keys, heads, d] with the same tokens wherever sequences, or one of them twice, hold the same page:
    those of the first that does.
    """
    length, starts = shared_prefix_len(case), key_start(case.rows)
    with_context = [starts[seq] for seq, context_len in enumerate(case.rows.context_lens) if context_len > 0]
    if length:
        for start in with_context[1:]:
            tensor[start : start + length] = tensor[with_context[0] : with_context[0] + length]
    for again, origin in tied(case, starts, case.page_size):
        tensor[again] = tensor[origin]
    return tensor
