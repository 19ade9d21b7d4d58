"""Scene: some query rows and heads of one sequence, laid open so that a fault can change one thing in them.

Invariant: an unchanged scene gives the reference's output and LSE on its rows; nothing of [heads, ...] is computed
before it is asked for, so that a scene of all heads is cheap to choose heads from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from harness.cache.content import is_decode
from harness.case import Case
from references.attention import AttentionInputs

PLACES: Mapping[
    str, Callable[[Sequence[int]], int]
] = {  # pages of a sequence that faults strike, of those with cached tokens
    "first page": lambda pages: pages[0],
    "middle page": lambda pages: pages[len(pages) // 2],
    "last page": lambda pages: pages[-1],
}


@dataclass(frozen=True)
class Scores:
    """All that the probabilities of the sampled rows are computed from."""

    dots: torch.Tensor  # [heads, rows, keys] softmax_scale * q . k
    seen: torch.Tensor  # bool [rows, keys]
    distance: torch.Tensor  # int64 [rows, keys] key position minus query position
    soft_cap: float | None
    slopes: torch.Tensor | None  # [heads] of ALiBi
    sinks: torch.Tensor | None  # [heads]

    @cached_property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """p [heads, rows, keys] and lse [heads, rows]; 0 and -inf (or the sink) where a row sees nothing."""
        scores = self.dots
        if self.soft_cap is not None:
            scores = (scores / self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.slopes is not None:
            scores = scores + self.slopes[:, None, None] * self.distance
        scores = scores.masked_fill(~self.seen, float("-inf"))
        lse = scores.logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.sinks[:, None])
        return (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_(), lse


@dataclass(frozen=True)
class Rows(Scores):
    """All that attention over the sampled rows is computed from; float64."""

    v: torch.Tensor  # [heads, keys, head_size_v]

    def outcome(self) -> Outcome:
        p, lse = self.weights
        return Outcome(p @ self.v, lse)


@dataclass(frozen=True)
class Outcome:
    """What a kernel would return for the sampled rows; lse is None where a fault leaves it alone."""

    out: torch.Tensor  # [heads, rows, head_size_v]
    lse: torch.Tensor | None  # [heads, rows]


@dataclass(frozen=True)
class Batch:
    """What a case is about to hand over, as far as faults look at it."""

    case: Case
    inputs: AttentionInputs  # what a right kernel sees
    cached_lens: tuple[int, ...]  # leading tokens of each sequence that a right kernel reads from the cache
    key_payload: torch.Tensor  # [num_keys, num_kv_heads, head_size] as stored, before descales
    value_payload: torch.Tensor  # [num_keys, num_kv_heads, head_size_v]
    k_descale: torch.Tensor  # float32 that broadcasts against the payloads: [num_keys or 1, num_kv_heads or 1, 1]
    v_descale: torch.Tensor
    q_descale: float  # in the q of `inputs` already
    output_scale: float


@dataclass(frozen=True)
class Scene:
    """Sampled rows and heads of one sequence. `q` holds the softmax scale already."""

    case: Case
    inputs: AttentionInputs  # of the whole batch
    seq: int  # which sequence of it
    first_key: int  # of the sequence, packed
    q: torch.Tensor  # [heads, rows, head_size] float64
    q_cached: torch.Tensor | None  # [heads, rows, head_size] float64, instead of q for cached keys
    distance: torch.Tensor  # int64 [rows, keys] key position minus query position
    k: torch.Tensor  # [keys, num_kv_heads, head_size]
    v: torch.Tensor  # [keys, num_kv_heads, head_size_v]
    key_payload: torch.Tensor  # [keys, num_kv_heads, head_size]
    value_payload: torch.Tensor  # [keys, num_kv_heads, head_size_v]
    k_descale: torch.Tensor  # [keys, num_kv_heads, 1]
    v_descale: torch.Tensor  # [keys, num_kv_heads, 1]
    q_descale: float
    output_scale: float
    q_heads: tuple[int, ...]
    positions: tuple[int, ...]  # of the sampled queries
    tokens: torch.Tensor  # int64 [rows] packed new tokens
    first_pos: int  # position of the first query of the sequence; may be negative
    query_len: int
    seq_len: int
    cached_len: int

    @property
    def kv_heads(self) -> list[int]:
        """The KV head of each sampled query head."""
        return [head // self.case.gqa_ratio for head in self.q_heads]

    @property
    def decodes(self) -> bool:
        return is_decode(self.query_len)

    @property
    def cached_pages(self) -> tuple[int, ...]:
        """Pages of the sequence, by number, with a cached token that some query may see."""
        window, page = self.case.sliding_window, self.case.page_size
        oldest = 0 if window is None else max(self.first_pos - window + 1, 0)
        sinks = min(self.case.sink_tokens, oldest, self.cached_len)
        seen = {*range(-(-sinks // page))}
        if oldest < self.cached_len:
            seen |= {*range(oldest // page, (self.cached_len - 1) // page + 1)}
        return tuple(sorted(seen))

    def slots(self, page: int) -> slice:
        """The cached tokens of a page."""
        return slice(page * self.case.page_size, min((page + 1) * self.case.page_size, self.cached_len))

    def of_heads(self, q_heads: Sequence[int]) -> Scene:
        """The same rows of fewer heads; this scene must hold every query head."""
        chosen = list(q_heads)
        q_cached = None if self.q_cached is None else self.q_cached[chosen]
        return replace(self, q=self.q[chosen], q_cached=q_cached, q_heads=tuple(q_heads))

    def seen_spans(self) -> list[tuple[int, int]]:
        """First and last key that each sampled row sees; rows that see none are left out."""
        window = None if self.case.sink_tokens else self.case.sliding_window
        spans = [
            (0 if window is None else max(pos - window + 1, 0), pos if self.case.causal else self.seq_len - 1)
            for pos in self.positions
        ]
        return [(first, last) for first, last in spans if first <= last]

    def alone(self) -> AttentionInputs:
        """What attention over nothing but this scene needs, beside `positions`; a KV head for every query head."""
        inputs, heads = self.inputs, list(self.q_heads)
        keys = slice(self.first_key, self.first_key + self.seq_len)
        return replace(
            inputs,
            q=inputs.q[self.tokens][:, heads],
            k=self.k[:, self.kv_heads],
            v=self.v[:, self.kv_heads],
            query_lens=(len(self.positions),),
            seq_lens=(self.seq_len,),
            alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[heads],
            sinks=None if inputs.sinks is None else inputs.sinks[heads],
            q_cached=None if inputs.q_cached is None else inputs.q_cached[self.tokens][:, heads],
            cached_lens=None if inputs.cached_lens is None else (inputs.cached_lens[self.seq],),
            weight_scale=None if inputs.weight_scale is None else inputs.weight_scale[keys][:, self.kv_heads],
        )

    @cached_property
    def rows(self) -> Rows:
        inputs, heads = self.inputs, list(self.q_heads)
        return Rows(
            dots=self.dots(self.k, self.kv_heads),
            v=per_head(self.v, self.kv_heads),
            seen=seen_at(self.distance, inputs.causal, inputs.sliding_window, inputs.sink_tokens),
            distance=self.distance,
            soft_cap=inputs.logits_soft_cap,
            slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[heads].double(),
            sinks=None if inputs.sinks is None else inputs.sinks[heads].double(),
        )

    @cached_property
    def right(self) -> Outcome:
        return self.rows.outcome()

    def dots(self, k: torch.Tensor, kv_heads: Sequence[int], dims: int | None = None) -> torch.Tensor:
        """Products of the queries with heads `kv_heads` of `k` [keys, num_kv_heads, head_size]: [heads, rows, keys]."""
        keys = per_head(k, kv_heads)[..., :dims].transpose(1, 2)
        dots = self.q[..., :dims] @ keys
        if self.q_cached is not None:
            cached = slice(0, self.cached_len)
            dots[..., cached] = self.q_cached[..., :dims] @ keys[..., cached]
        return dots


def per_head(tensor: torch.Tensor, kv_heads: Sequence[int]) -> torch.Tensor:
    """Heads `kv_heads` of `tensor` [keys, num_kv_heads, dim]: float64 [heads, keys, dim]."""
    return tensor[:, list(kv_heads)].double().transpose(0, 1)


def seen_at(distance: torch.Tensor, causal: bool, window: int | None, sink_tokens: int, ahead: int = 0) -> torch.Tensor:
    """bool, as `distance` [rows, keys] (key minus query position): whether the key is seen.

    `ahead` moves the causal edge.
    """
    seen = distance <= ahead if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is None:
        return seen
    return seen & ((distance > -window) | (torch.arange(distance.shape[1], device=distance.device) < sink_tokens))
