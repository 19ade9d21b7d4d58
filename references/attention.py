"""Attention in float64, with the moments from which a tolerance follows. Needs torch only, knows no kernel.

Invariant: `out` and `lse` depend on nothing but the inputs; how a kernel rounds (`Rounding`) only selects the moments.

For query row i of a sequence, at position t = seq_len - query_len + i, and key position j it sees:

    s_j = softmax_scale * q . k_j;   s_j = cap * tanh(s_j / cap);   s_j += slope * (j - t)
    m = max(s_j, sink);   x_j = exp(s_j - m);   l = sum x_j + exp(sink - m);   p_j = x_j / l
    out = sum p_j v_j;    lse = m + ln l

A row sees 0 <= j < seq_len, j <= t if causal, and t - j < sliding_window or
j < sink_tokens if there is a window. A row that sees nothing
has out 0 and lse -inf, or the sink.
"""

from __future__ import annotations

from itertools import chain

import torch

from references.batches import CAUSAL_TILE_ROWS, Batch, batches
from references.moments import Magnitudes, magnitudes, moments
from references.quantities import AttentionInputs, AttentionReference, Rounding
from references.repeats import key_repeats
from references.tile import Softmax, Tile, make_tile, softmax

__all__ = ["AttentionInputs", "AttentionReference", "Rounding", "attend"]

DEFAULT_MAX_ELEMENTS = 1 << 25  # 256 MiB per float64 tile
PER_ELEMENT = ("out", "abs_pv", "cast_square", "cast_sum", "flush_sum")
PER_ROW = ("lse", "row_mass", "row_square", "peak", "largest_logit", "offset")
ROW_MOMENTS = {"row_cast_square": "cast_square", "row_cast_sum": "cast_sum", "row_flush_sum": "flush_sum"}


def attend(
    inputs: AttentionInputs,
    rounding: Rounding,
    *,
    positions: tuple[tuple[int, ...], ...] | None = None,
    max_elements: int = DEFAULT_MAX_ELEMENTS,
    moment_dtype: torch.dtype | None = None,
) -> AttentionReference:
    """Reference attention of `inputs`, on the device of q.

    `positions` are those of the queries of each sequence, ascending and below its seq_len, where they are not its last
    query_len ones: a sample of rows has the same result, row by row, as all of them.

    `moment_dtype` is what moments are summed from: float64 (exact, the default on CPUs) or bfloat16 (the default on
    GPUs: matrix units make it nearly free). The latter are upper bounds, too large by at most 5 % (2.5 % after the
    root of a square) up to 10,000 keys. All else is float64.

    Memory: no temporary holds more than N = max(max_elements, gqa_ratio * max(longest seq_len, head_size_v + 1,
    head_size)) scores, and at most 4 such float64 temporaries are alive at once (32 N bytes). Beside them: the result;
    of one batch, float64 copies of k (2) and v (4), where a batch is a single sequence or has at most max_elements of
    either; at the end, a float64 copy of q, or the keys as float32 with three 64-bit integers per key and head.
    """
    if moment_dtype is None:
        moment_dtype = torch.bfloat16 if inputs.q.is_cuda else torch.float64
    result = _Result(inputs, rounding, positions)
    for batch in batches(inputs, max_elements, positions):
        _attend_batch(inputs, result, batch, max_elements, moment_dtype)
    return result.finished()


class _Result:
    """What attend fills in, tile by tile; begins as the result of rows that see nothing."""

    def __init__(
        self, inputs: AttentionInputs, rounding: Rounding, positions: tuple[tuple[int, ...], ...] | None
    ) -> None:
        self.inputs, self.rounding, self.positions = inputs, rounding, positions
        num_tokens, num_q_heads, _ = inputs.q.shape
        num_kv_heads, head_size_v = inputs.v.shape[1:]
        new = inputs.q.new_zeros
        self.per_element = {
            name: new(num_tokens, num_q_heads, head_size_v, dtype=torch.float64) for name in PER_ELEMENT
        }
        self.per_row = new(num_tokens, num_q_heads, len(PER_ROW), dtype=torch.float64)
        self.row_moments = new(num_tokens, num_q_heads, len(ROW_MOMENTS), dtype=torch.float64)
        self.per_row[..., PER_ROW.index("lse")] = float("-inf")
        if inputs.sinks is not None:
            self.per_row[..., PER_ROW.index("lse")] = inputs.sinks.double()
            self.per_row[..., PER_ROW.index("offset")] = inputs.sinks.double().abs()
        # largest norm of a key, of its square, largest |v|: [3, num_seqs, num_kv_heads]
        self.largest = new(3, len(inputs.seq_lens), num_kv_heads, dtype=torch.float64)

    def finished(self) -> AttentionReference:
        inputs, device = self.inputs, self.inputs.q.device
        group = inputs.q.shape[1] // inputs.k.shape[1]
        visible, sequence = (x.to(device) for x in _visible(inputs, self.positions))
        per_sequence = torch.cat((self.largest, key_repeats(inputs.k, inputs.seq_lens)[None]))
        per_token = per_sequence[:, sequence].repeat_interleave(group, dim=2) * (visible > 0)[:, None]
        longest_key, longest_square, max_abs_v, repeats = per_token  # [num_tokens, num_q_heads] each
        scale = abs(inputs.softmax_scale)
        norms = _norms(inputs.q)
        if inputs.q_cached is not None:
            norms = torch.maximum(norms, _norms(inputs.q_cached))
        rows = dict(zip(PER_ROW, self.per_row.movedim(-1, 0).contiguous(), strict=True))
        rows |= zip(ROW_MOMENTS, self.row_moments.movedim(-1, 0).contiguous(), strict=True)
        return AttentionReference(
            **self.per_element,
            **rows,
            logit_bound=norms[0] * longest_key * scale,
            dot_bound=(norms[1] * longest_square).sqrt_() * scale,
            max_abs_v=max_abs_v,
            key_repeats=repeats,
            num_visible=visible.double(),
            logits_soft_cap=inputs.logits_soft_cap or 0.0,
            rounding=self.rounding,
        )


def _norms(vectors: torch.Tensor) -> torch.Tensor:
    """Norms of `vectors` [..., d] and of their squares: float64 [2, ...]"""
    wide = vectors.to(torch.float64, copy=True)
    norm = torch.linalg.vector_norm
    return torch.stack((norm(wide, dim=-1), norm(wide.square_(), dim=-1)))


def _visible(
    inputs: AttentionInputs, positions: tuple[tuple[int, ...], ...] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many keys each token sees, and its sequence: int64 [num_tokens] each, on the CPU."""
    lens = torch.tensor((inputs.query_lens, inputs.seq_lens), dtype=torch.int64)  # [2, num_seqs]
    sequence = torch.repeat_interleave(torch.arange(lens.shape[1]), lens[0])
    seq_len = lens[1][sequence]
    if positions is None:
        start = lens[0].cumsum(0) - lens[0]
        position = torch.arange(len(sequence)) - (start + lens[0] - lens[1])[sequence]
    else:
        position = torch.tensor(list(chain(*positions)), dtype=torch.int64)
    end = torch.minimum(position + 1, seq_len) if inputs.causal else seq_len
    first = torch.zeros_like(end) if inputs.sliding_window is None else position - inputs.sliding_window + 1
    first = first.clamp(min=0)
    return (end - first + first.clamp(max=inputs.sink_tokens)).clamp(min=0), sequence


def _attend_batch(
    inputs: AttentionInputs, result: _Result, batch: Batch, max_elements: int, moment_dtype: torch.dtype
) -> None:
    num_q_heads, num_kv_heads, size_v = inputs.q.shape[1], inputs.k.shape[1], inputs.v.shape[2]
    group = num_q_heads // num_kv_heads
    k, v = (_by_head(batch.keys_of(x)) for x in (inputs.k, inputs.v))  # [num_seqs * num_kv_heads, num_keys, *]
    weight = None if inputs.weight_scale is None else _by_head(batch.keys_of(inputs.weight_scale[..., None]))
    sizes = magnitudes(v, weight, result.rounding.row_sums, moment_dtype)

    largest_v = torch.linalg.vector_norm(v, ord=float("inf"), dim=(1, 2))
    largest = torch.cat((_norms(k).amax(-1), largest_v[None]))
    sequences = [s.index for s in batch.sequences]
    result.largest[:, sequences] = largest.view(3, batch.num_seqs, num_kv_heads)

    width = max(_widest_span(inputs, batch), size_v + 1, k.shape[2])
    kv_heads = min(num_kv_heads, max(max_elements // (group * width), 1)) if batch.num_seqs == 1 else num_kv_heads
    tile_rows = batch.num_rows
    if batch.num_seqs == 1:
        tile_rows = max(max_elements // (kv_heads * group * width), 1)
        tile_rows = min(tile_rows, CAUSAL_TILE_ROWS) if inputs.causal else tile_rows
    for row in range(0, batch.num_rows, tile_rows):
        rows = slice(row, min(row + tile_rows, batch.num_rows))
        for head in range(0, num_kv_heads, kv_heads):
            tile = make_tile(inputs, batch, rows, slice(head, min(head + kv_heads, num_kv_heads)))
            heads = slice(None) if batch.num_seqs > 1 else tile.kv_heads
            _attend_tile(result, tile, k[heads], v[heads], sizes.part(heads, tile.span))


def _by_head(values: torch.Tensor) -> torch.Tensor:
    """[num_seqs, num_keys, num_kv_heads, n] as float64 [num_seqs * num_kv_heads, num_keys, n]"""
    return values.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format).flatten(0, 1)


def _widest_span(inputs: AttentionInputs, batch: Batch) -> int:
    """Upper bound on the number of keys of any tile."""
    consecutive = all(isinstance(s.positions, range) for s in batch.sequences)
    if inputs.sliding_window is None or inputs.sink_tokens or not inputs.causal or not consecutive:
        return batch.num_keys
    return min(batch.num_keys, inputs.sliding_window + min(batch.num_rows, CAUSAL_TILE_ROWS))


def _attend_tile(result: _Result, tile: Tile, k: torch.Tensor, v: torch.Tensor, sizes: Magnitudes) -> None:
    """Compute and store one tile. `k` and `v` hold all keys of the batch, `sizes` those of the span."""
    soft = softmax(tile, k)
    mass = torch.ones_like(soft.lse) if soft.mass is None else soft.mass
    out = soft.p @ v[:, tile.span]
    tile.store(result.per_element["out"], out if soft.mass is None else out.mul_(soft.mass))
    del out
    square = torch.linalg.vector_norm(soft.p, dim=-1, keepdim=True).square_() * mass * mass
    peak = soft.peak * mass
    if soft.sink_excess is not None:
        assert tile.inputs.sinks is not None
        peak = torch.maximum(peak, (tile.fold(tile.per_head(tile.inputs.sinks)) - soft.lse).exp_())
    rows = {
        "lse": soft.lse,
        "row_mass": mass,
        "row_square": square,
        "peak": peak,
        "largest_logit": soft.largest_logit,
        "offset": _offset(tile, soft, mass),
    }
    tile.store(result.per_row, torch.cat([rows[name] for name in PER_ROW], dim=-1))

    cached = min(max(tile.batch.cached_len - tile.span.start, 0), soft.p.shape[-1])
    sums = moments(soft, sizes, result.rounding, cached)
    size_v = v.shape[2]
    for name, values in sums.items():
        tile.store(result.per_element[name], values[..., :size_v])
    if result.rounding.row_sums:
        columns = [
            sums[name][..., size_v:] if name in sums else torch.zeros_like(mass) for name in ROW_MOMENTS.values()
        ]
        tile.store(result.row_moments, torch.cat(columns, dim=-1))


def _offset(tile: Tile, soft: Softmax, mass: torch.Tensor) -> torch.Tensor:
    """Bound on sum p_j |slope (j - t)| + p_sink |sink| [num_seqs * kv heads, rows * gqa_ratio, 1].

    The first sum by Cauchy-Schwarz, from the moments of the key positions.
    """
    inputs = tile.inputs
    offset = torch.zeros_like(mass)
    if inputs.alibi_slopes is not None:
        newest = tile.span.stop  # positions count from here, where the bias leaves most of p
        key = torch.arange(tile.span.start - newest, 0, device=mass.device).double()
        first, second = (soft.p @ torch.stack((key, key * key), dim=-1)).view(tile.shape).chunk(2, dim=-1)
        query = (tile.positions - newest).double()[:, None, :, None, None]
        distance = (second - 2 * query * first + query * query).clamp_(min=0).sqrt_()
        offset += mass * (tile.per_head(inputs.alibi_slopes).abs() * distance).view_as(offset)
    if inputs.sinks is not None:
        sinks = tile.fold(tile.per_head(inputs.sinks))
        offset += (sinks - soft.lse).exp_() * sinks.abs()
    return offset
