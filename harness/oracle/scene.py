"""Scene: some query rows of one sequence, laid open so that a fault can change one thing in them.

Invariant: an unchanged scene gives the reference's output and LSE on its rows; a sample of rows can only make a fault
look smaller than it is, never larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from harness.cache.content import is_decode
from harness.case import Case
from references.attention import AttentionInputs

MAX_ROWS = 32  # of one sequence
MAX_HEADS = 8
MAX_SEQUENCES = 8


@dataclass(frozen=True)
class Rows:
    """All that attention over the sampled rows is computed from; float64."""

    dots: torch.Tensor  # [heads, rows, keys] softmax_scale * q . k
    v: torch.Tensor  # [heads, keys, head_size_v]
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


@dataclass(frozen=True)
class Scene:
    """Sampled rows and heads of one sequence. `q` holds the softmax scale already."""

    case: Case
    inputs: AttentionInputs  # of the whole batch, for what is alike in all sequences
    q: torch.Tensor  # [heads, rows, head_size] float64
    q_cached: torch.Tensor | None  # [heads, rows, head_size] float64, instead of q for cached keys
    distance: torch.Tensor  # int64 [rows, keys] key position minus query position
    k: torch.Tensor  # [keys, num_kv_heads, head_size]
    v: torch.Tensor  # [keys, num_kv_heads, head_size_v]
    key_payload: torch.Tensor  # [keys, num_kv_heads, head_size]
    value_payload: torch.Tensor  # [keys, num_kv_heads, head_size_v]
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

    def seen_spans(self) -> list[tuple[int, int]]:
        """First and last key that each sampled row sees; rows that see none are left out."""
        window = self.case.sliding_window
        spans = [
            (0 if window is None else max(pos - window + 1, 0), pos if self.case.causal else self.seq_len - 1)
            for pos in self.positions
        ]
        return [(first, last) for first, last in spans if first <= last]

    @cached_property
    def rows(self) -> Rows:
        inputs, heads = self.inputs, list(self.q_heads)
        return Rows(
            dots=self.dots(self.k, self.kv_heads),
            v=per_head(self.v, self.kv_heads),
            seen=seen_at(self.distance, inputs.causal, inputs.sliding_window),
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


def scenes(batch: Batch) -> list[Scene]:
    """Scenes of the sequences of `batch` that have keys, of at most MAX_SEQUENCES spread over their lengths."""
    inputs = batch.inputs
    starts = [(0, 0)]
    for query_len, seq_len in zip(inputs.query_lens, inputs.seq_lens, strict=True):
        starts.append((starts[-1][0] + query_len, starts[-1][1] + max(seq_len, 0)))
    lens = list(zip(inputs.query_lens, inputs.seq_lens, strict=True))
    with_keys = sorted((seq for seq, (_, n) in enumerate(lens) if n > 0), key=lambda seq: (lens[seq][0] > 1, lens[seq]))
    return [_scene(batch, seq, *starts[seq]) for seq in _spread(with_keys, MAX_SEQUENCES)]


def _scene(batch: Batch, seq: int, first_token: int, first_key: int) -> Scene:
    case, inputs = batch.case, batch.inputs
    query_len, seq_len = inputs.query_lens[seq], inputs.seq_lens[seq]
    keys = slice(first_key, first_key + seq_len)
    device = inputs.q.device
    q_heads = _sampled_heads(case, inputs.alibi_slopes)
    first_pos = seq_len - query_len
    sampled = _sampled_rows(case, first_pos, query_len)
    chosen = torch.tensor(sampled, device=device)  # [rows]
    tokens = first_token + chosen

    def queries(q: torch.Tensor) -> torch.Tensor:
        return q[tokens][:, list(q_heads)].double().transpose(0, 1) * inputs.softmax_scale

    return Scene(
        case=case,
        inputs=inputs,
        q=queries(inputs.q),
        q_cached=None if inputs.q_cached is None else queries(inputs.q_cached),
        distance=torch.arange(seq_len, device=device) - (first_pos + chosen)[:, None],
        k=inputs.k[keys],
        v=inputs.v[keys],
        key_payload=batch.key_payload[keys],
        value_payload=batch.value_payload[keys],
        q_heads=q_heads,
        positions=tuple(first_pos + row for row in sampled),
        tokens=tokens,
        first_pos=first_pos,
        query_len=query_len,
        seq_len=seq_len,
        cached_len=min(batch.cached_lens[seq], seq_len),
    )


def seen_at(distance: torch.Tensor, causal: bool, window: int | None, ahead: int = 0) -> torch.Tensor:
    """bool, as `distance` (key minus query position): whether the key is seen; `ahead` moves the causal edge."""
    seen = distance <= ahead if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance > -window)


def _sampled_heads(case: Case, slopes: torch.Tensor | None) -> tuple[int, ...]:
    """At most MAX_HEADS query heads, the first and last KV head's among them, and the one that ALiBi bends least.

    Head 1 is one that a mapping by modulo moves, wherever there is anything to map.
    """
    heads, group = case.num_q_heads, case.gqa_ratio
    wanted = [0, 1, group - 1, heads - group, heads - 1]
    if slopes is not None:
        wanted.append(int(slopes.argmin()))
    wanted += _spread(range(heads), MAX_HEADS)
    return tuple(sorted(list(dict.fromkeys(head for head in wanted if head < heads))[:MAX_HEADS]))


def _sampled_rows(case: Case, first_pos: int, query_len: int) -> list[int]:
    """Numbers of at most MAX_ROWS rows of a sequence: the first, the newest, and those at edges of pages and window."""
    if query_len <= MAX_ROWS:
        return list(range(query_len))
    positions = range(first_pos, first_pos + query_len)
    page, window = case.page_size, case.sliding_window
    edges = [row for row, pos in enumerate(positions) if pos % page in (0, page - 1)]
    if window is not None:
        edges = [row for row, pos in enumerate(positions) if window - 1 <= pos <= window + 1] + edges
    wanted = [*range(4), *range(query_len - 8, query_len), *_spread(edges, 12), *_spread(list(range(query_len)), 8)]
    return sorted(dict.fromkeys(wanted))


def _spread(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of `items`, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
