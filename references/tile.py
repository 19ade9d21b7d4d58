"""Scores and softmax of one tile: some query rows of a batch, some kv heads, all keys that these rows see.

Invariant: every row sees at least one key, and a key that a row does not see has score -inf, hence probability 0.
Scores are [num_seqs * num_kv_heads, num_rows * gqa_ratio, num_keys]: the queries of a group share a product with K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from references.batches import Batch
from references.quantities import AttentionInputs

LARGEST_SINK = 40.0  # a sink this far above all logits flushes every P below float32: e^-40 < 2^-57


@dataclass(frozen=True)
class Tile:
    """Which rows, heads and keys; `common` are the keys that every row sees."""

    inputs: AttentionInputs
    batch: Batch
    rows: slice
    kv_heads: slice
    positions: torch.Tensor  # [num_seqs, num_rows] of the query rows
    first: torch.Tensor  # [num_seqs, num_rows] first key seen, sink tokens aside
    end: torch.Tensor  # [num_seqs, num_rows] one behind the last key seen
    span: slice
    common: slice

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(num_seqs, kv heads, num_rows, gqa_ratio, anything): a view of scores with everything unfolded."""
        group = self.inputs.q.shape[1] // self.inputs.k.shape[1]
        return self.batch.num_seqs, self.kv_heads.stop - self.kv_heads.start, self.positions.shape[1], group, -1

    @property
    def q_heads(self) -> slice:
        group = self.shape[3]
        return slice(self.kv_heads.start * group, self.kv_heads.stop * group)

    def per_head(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [num_q_heads] as float64 [1, kv heads, 1, gqa_ratio, 1]"""
        return values[self.q_heads].double().view(1, self.shape[1], 1, self.shape[3], 1)

    def fold(self, values: torch.Tensor) -> torch.Tensor:
        """[num_seqs, kv heads, num_rows, gqa_ratio, n], broadcast, as [num_seqs * kv heads, rows * gqa_ratio, n]"""
        num_seqs, kv_heads, num_rows, group, _ = self.shape
        full = values.expand(num_seqs, kv_heads, num_rows, group, values.shape[-1])
        return full.reshape(num_seqs * kv_heads, num_rows * group, values.shape[-1])

    def store(self, packed: torch.Tensor, values: torch.Tensor) -> None:
        """Write [num_seqs * kv heads, rows * gqa_ratio, n] to `packed` [num_tokens, num_q_heads, n]."""
        self.batch.store(packed, self.rows, self.q_heads, values.view(self.shape).transpose(1, 2).flatten(2, 3))


@dataclass(frozen=True)
class Softmax:
    """p adds up to 1 over the keys, without the sink; rows are [num_seqs * kv heads, rows * gqa_ratio, 1]."""

    p: torch.Tensor  # [num_seqs * kv heads, rows * gqa_ratio, keys of the span]
    peak: torch.Tensor  # largest p
    lse: torch.Tensor  # sink included
    mass: torch.Tensor | None  # what the keys have beside the sink; None without one
    sink_excess: torch.Tensor | None  # how far the sink lies above all logits, within [0, LARGEST_SINK]
    largest_logit: torch.Tensor  # |s| before cap and bias, hidden keys of the span included


def make_tile(inputs: AttentionInputs, batch: Batch, rows: slice, kv_heads: slice) -> Tile:
    """The tile of `rows` (of every sequence of the batch) and `kv_heads`."""
    limits = []  # what the first and the last row of each sequence see
    for s in batch.sequences:
        for row in (min(rows.start, s.num_rows - 1), min(rows.stop, s.num_rows) - 1):
            position = s.positions[row]
            first = 0 if inputs.sliding_window is None else max(position - inputs.sliding_window + 1, 0)
            limits.append((first, min(position + 1, s.seq_len) if inputs.causal else s.seq_len))
    firsts, ends = zip(*limits, strict=True)
    device = inputs.q.device
    row = torch.arange(rows.start, rows.stop, device=device)[None]  # [1, num_rows]
    if batch.num_seqs > 1:
        facts = torch.tensor([(s.positions[0], s.num_rows, s.seq_len) for s in batch.sequences]).to(device)
        positions = facts[:, 0:1] + torch.minimum(row, facts[:, 1:2] - 1)
        end: torch.Tensor = facts[:, 2:3].expand_as(positions)
    else:
        own = batch.sequences[0].positions
        positions = row + own[0] if isinstance(own, range) else torch.tensor([own[rows]], device=device)
        end = torch.full_like(positions, batch.num_keys)
    first = torch.zeros_like(positions)
    if inputs.sliding_window is not None:
        first = (positions - (inputs.sliding_window - 1)).clamp_(min=0)
    if inputs.causal:
        end = torch.minimum(positions + 1, end)
    start = 0 if inputs.sink_tokens else min(firsts)
    span, common = slice(start, max(ends)), slice(max(firsts), min(ends))
    return Tile(inputs, batch, rows, kv_heads, positions, first, end, span, common)


def softmax(tile: Tile, k: torch.Tensor) -> Softmax:
    """Softmax over `k` [num_seqs * kv heads, num_keys, head_size], float64."""
    scores, largest_logit = _scores(tile, k)
    top, where = scores.max(-1, keepdim=True)
    p = scores.softmax(-1)
    peak = p.gather(-1, where)
    lse = top - peak.log()
    if tile.inputs.sinks is None:
        return Softmax(p, peak, lse, None, None, largest_logit)
    sinks = tile.fold(tile.per_head(tile.inputs.sinks))
    with_sink = torch.logaddexp(lse, sinks)
    excess = (sinks - top).clamp_(0, LARGEST_SINK)
    return Softmax(p, peak, with_sink, (lse - with_sink).exp_(), excess, largest_logit)


def _scores(tile: Tile, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, -inf where hidden, and the largest |score| per row before cap and bias."""
    inputs, span = tile.inputs, tile.span
    scores = _products(tile, k[:, span].transpose(1, 2))
    largest_logit = torch.linalg.vector_norm(scores, ord=float("inf"), dim=-1, keepdim=True)
    if inputs.logits_soft_cap:
        scores.div_(inputs.logits_soft_cap).tanh_().mul_(inputs.logits_soft_cap)
    whole = scores.view(tile.shape)
    key = torch.arange(span.start, span.stop, device=k.device)
    if inputs.alibi_slopes is not None:
        distance = (key - tile.positions[:, :, None]).double()  # [num_seqs, num_rows, keys]
        whole.addcmul_(tile.per_head(inputs.alibi_slopes), distance[:, None, :, None])
    if tile.common.start > span.start:
        some = slice(0, tile.common.start - span.start)
        hidden = (key[some] < tile.first[:, :, None]) & (key[some] >= inputs.sink_tokens)  # [num_seqs, num_rows, keys]
        whole[..., some].masked_fill_(hidden[:, None, :, None], float("-inf"))
    if tile.common.stop < span.stop:
        some = slice(max(tile.common.stop - span.start, 0), None)
        hidden = key[some] >= tile.end[:, :, None]
        whole[..., some].masked_fill_(hidden[:, None, :, None], float("-inf"))
    return scores, largest_logit


def _products(tile: Tile, k: torch.Tensor) -> torch.Tensor:
    """softmax_scale q . k, with the q that each key meets. k: [num_seqs * kv heads, head_size, keys of the span]."""
    inputs = tile.inputs
    cached = min(max(tile.batch.cached_len - tile.span.start, 0), k.shape[2]) if inputs.q_cached is not None else 0
    if cached == 0:
        return _queries(tile, inputs.q) @ k
    assert inputs.q_cached is not None
    q = _queries(tile, inputs.q_cached)
    scores = q.new_empty(*q.shape[:2], k.shape[2])
    scores[..., :cached] = q @ k[..., :cached]
    scores[..., cached:] = _queries(tile, inputs.q) @ k[..., cached:]
    return scores


def _queries(tile: Tile, q: torch.Tensor) -> torch.Tensor:
    """`q` times the scale [num_seqs * kv heads, rows * gqa_ratio, head_size], float64"""
    rows = tile.batch.rows_of(q, tile.rows)[:, :, tile.q_heads].double() * tile.inputs.softmax_scale
    num_seqs, kv_heads, num_rows, group, _ = tile.shape
    by_kv_head = rows.view(num_seqs, num_rows, kv_heads, group, -1).transpose(1, 2)
    return by_kv_head.reshape(num_seqs * kv_heads, num_rows * group, -1)
