"""Localisation: which single fault explains an error that is there.

Invariant: looks only at outputs that failed, and names a fault only if it explains at least MIN_SHARE of the squared
error of the rows looked at; it never decides whether a case fails.

Each candidate fault has a signature X = (output with the fault) - o, exact per row, so that its coefficient is 1, or a
gain that is found by the fit. The rows are of one sequence and KV head: where tier 2 found most, or where an element is
worst. By Cauchy-Schwarz share = <E, X>^2 / (<E, E> <X, X>) is 1 for the true fault alone, but for honest noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from harness.oracle.findings import Findings
from harness.oracle.gains import (
    BEYOND_NEWEST,
    BEYOND_OLDEST,
    BEYOND_SINKS,
    HEAD_MODULO,
    HEAD_SHIFT,
    K_DESCALE,
    NEWEST_WEIGHT,
    OLDEST_WEIGHT,
    PAGE_WEIGHT,
    ROW_GAIN,
    SINK_TOKENS,
    SPLIT_AVERAGE,
    SPLIT_WEIGHT,
    TOKEN_VALUE,
    TOKEN_WEIGHT,
    TOKEN_ZERO,
    V_DESCALE,
    Gain,
)
from harness.oracle.matched_filter import PageFilter, page_signatures, row_errors
from harness.oracle.row_noise import row_noise
from harness.oracle.sampling import sampled
from harness.oracle.splits import averaged, split_sizes
from references.attention import AttentionInputs
from references.rows import Rows, attention_rows

MIN_SHARE = 0.5  # of the squared error; two unrelated faults cannot both explain more
SIGNIFICANT = 25.0  # five sigma squared: by how much more a less simple fault must explain, in units of row noise
MIN_ROWS = 16  # a fit of one value per dim takes 1 / rows of any error
MAX_SHIFTS = 8  # KV heads tried instead of the right one
FULL = 1 - 1e-9  # a weight of one cannot be missing: nothing would be left

Signatures = tuple[list[Gain], torch.Tensor]  # gains, and what they stand for [num_rows * gqa_ratio, gains, dv]


def find_source(inputs: AttentionInputs, out: torch.Tensor, filters: PageFilter, findings: Findings) -> Gain | None:
    """The simplest fault that explains the error of `out` [num_tokens, num_q_heads, head_size_v], if one does."""
    place = _place(inputs, findings)
    if place is None:
        return None
    sequence, kv_head, worst_row = place
    group = inputs.q.shape[1] // inputs.k.shape[1]
    chosen = sorted({*sampled(inputs.query_lens[sequence], group), *([] if worst_row is None else [worst_row])})
    one = _one_head(inputs, kv_head)
    rows = attention_rows(one, [sequence], [chosen])
    heads = slice(kv_head * group, (kv_head + 1) * group)
    error = row_errors(rows, out[:, heads], filters)[0, 0].float()  # [L, head_size_v], L = rows * gqa_ratio
    total = float(error.square().sum())
    if total == 0.0:
        return None
    best: tuple[float, Gain, torch.Tensor] | None = None
    for gains, x in _signatures(inputs, one, rows, error, filters, kv_head, chosen):
        x = x.float()
        product, energy = (error[:, None] * x).sum((0, 2)), (x * x).sum((0, 2))  # [gains]
        shares = torch.where(energy > 0, product.square() / (energy.clamp(min=1e-30) * total), 0.0)
        highest = int(shares.argmax())
        share = float(shares[highest])
        if best is None or share - best[0] > (1 - share) * SIGNIFICANT / len(error):
            coefficient = float(product[highest] / energy[highest].clamp(min=1e-30))
            gain = gains[highest]
            found = replace(gain, estimate=gain.estimate * coefficient, sequence=sequence, kv_head=kv_head, share=share)
            best = share, found, x[:, highest]
    if best is None or best[0] < MIN_SHARE:
        return None
    _, gain, signature = best
    moments = row_noise(rows, filters.profile, filters.q_dtype).moments(signature[None, None, :, None])
    product = (error * signature).sum().abs()
    z = (product - moments.bias.sum()).clamp(min=0) / moments.variance.sum().clamp(min=1e-30).sqrt()
    return replace(gain, z=float(z))


def _place(inputs: AttentionInputs, findings: Findings) -> tuple[int, int, int | None] | None:
    """Sequence and KV head, and the row of the worst element where it is one of theirs."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    place: tuple[int, int, int | None] | None = None
    worst = next((t.worst for t in findings.tensors if t.name == "out" and t.num_mismatched), None)
    if worst is not None:
        row = worst.token
        for sequence, query_len in enumerate(inputs.query_lens):
            if row < query_len:
                place = (sequence, worst.head // group, row) if inputs.seq_lens[sequence] > 0 else None
                break
            row -= query_len
    for gain in findings.gains.gains:
        if gain.sequence is not None and gain.kv_head is not None:
            same = place is not None and place[0] == gain.sequence
            return gain.sequence, gain.kv_head, place[2] if same and place is not None else None
    return place


def _one_head(inputs: AttentionInputs, kv_head: int) -> AttentionInputs:
    """The inputs of one KV head and its query heads."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    heads, own = slice(kv_head * group, (kv_head + 1) * group), slice(kv_head, kv_head + 1)
    return replace(
        inputs,
        q=inputs.q[:, heads],
        k=inputs.k[:, own],
        v=inputs.v[:, own],
        q_cached=None if inputs.q_cached is None else inputs.q_cached[:, heads],
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[heads],
        sinks=None if inputs.sinks is None else inputs.sinks[heads],
        weight_scale=None if inputs.weight_scale is None else inputs.weight_scale[:, own],
    )


def _signatures(
    inputs: AttentionInputs,
    one: AttentionInputs,
    rows: Rows,
    error: torch.Tensor,
    filters: PageFilter,
    kv_head: int,
    chosen: list[int],
) -> Iterator[Signatures]:
    """Candidates, the simpler ones first; the estimate of a gain is the effect that a coefficient of 1 stands for."""
    sequence = rows.sequences[0]
    pages = filters.pages[sequence]
    cached = (torch.arange(rows.p.shape[3], device=rows.p.device) < filters.cached_lens[sequence])[None]
    by_key, by_value = page_signatures(rows, filters.page_size, cached)[0, 0].tensor_split(2, dim=1)
    yield [Gain(K_DESCALE, 1.0, 0.0)], by_key[:, -1:]
    yield [Gain(V_DESCALE, 1.0, 0.0)], by_value[:, -1:]
    if pages:
        slots = list(enumerate(pages))
        yield [Gain(K_DESCALE, 1.0, 0.0, slot=slot, page=page) for slot, page in slots], by_key[:, :-1]
        yield [Gain(V_DESCALE, 1.0, 0.0, slot=slot, page=page) for slot, page in slots], by_value[:, :-1]
    yield from _edges(rows, inputs)
    yield from _tokens(rows, error, filters)
    if pages:
        missing = [_missing(rows, i * filters.page_size, (i + 1) * filters.page_size) for i in range(len(pages))]
        yield [Gain(PAGE_WEIGHT, -1.0, 0.0, slot=slot, page=page) for slot, page in slots], torch.stack(missing, 1)
    yield from _heads(inputs, one, rows, kv_head, chosen)
    yield from _splits(rows, filters)
    yield from _rows(rows, error)
    yield from _values(rows, error, filters)


def _edges(rows: Rows, inputs: AttentionInputs) -> Iterator[Signatures]:
    """The keys at the edges of what each row sees: missing, or one beyond seen as well."""
    p, v, out, visible = rows.p[0, 0], rows.v[0, 0], rows.out[0, 0], rows.visible[0, 0]
    num_keys = p.shape[1]
    index = torch.arange(num_keys, device=p.device)
    near = visible  # bool [L, n]: without the sink tokens that the window has left behind
    if inputs.sliding_window is not None and inputs.sink_tokens:
        position = rows.positions[0].repeat_interleave(rows.group)[:, None]  # [L, 1]
        near = visible & (position - index < inputs.sliding_window)
        sinks = p.masked_fill(near, 0.0)  # [L, n]
        yield [Gain(SINK_TOKENS, -1.0, 0.0)], _without(out, sinks.sum(1, keepdim=True), sinks @ v)[:, None]
    newest = torch.where(near, index, -1).amax(1)  # [L]
    oldest = torch.where(near, index, num_keys).amin(1)
    for kind, key in ((OLDEST_WEIGHT, oldest), (NEWEST_WEIGHT, newest)):
        at = key.clamp(0, num_keys - 1)[:, None]
        weight = p.gather(1, at)  # 0 where nothing is seen
        yield [Gain(kind, -1.0, 0.0)], _without(out, weight, weight * v[at[:, 0]])[:, None]
    beyond = {BEYOND_OLDEST: oldest - 1, BEYOND_NEWEST: newest + 1}
    if near is not visible:
        beyond[BEYOND_SINKS] = torch.full_like(newest, inputs.sink_tokens)
    for kind, key in beyond.items():
        at = key.clamp(0, num_keys - 1)[:, None]
        there = (key >= 0) & (key < num_keys) & (newest >= 0) & ~visible.gather(1, at)[:, 0]
        odds = (rows.scores[0, 0].gather(1, at) - rows.lse[0, 0]).exp().masked_fill(~there[:, None], 0.0)
        yield [Gain(kind, 1.0, 0.0)], (odds / (1 + odds) * (v[at[:, 0]] - out))[:, None]


def _tokens(rows: Rows, error: torch.Tensor, filters: PageFilter) -> Iterator[Signatures]:
    """The key whose weight explains most, and the one that explains most if it is read as zeros.

    Both change row r by a_rj o_r - b_rj v_j, so that all keys are compared by products of matrices.
    """
    p, v, out, visible = rows.p[0, 0], rows.v[0, 0], rows.out[0, 0], rows.visible[0, 0]
    error = error.double()
    bias = rows.scores[0, 0] - (_capped(rows) if rows.soft_cap else rows.raw[0, 0])  # [L, n]: that of ALiBi
    zero = (bias - rows.lse[0, 0]).exp().masked_fill(~visible, 0.0)  # [L, n] weight of a key of zeros
    left = (1 - p).clamp(min=1 - FULL)
    along_v, along_out = error @ v.T, (error * out).sum(1, keepdim=True)  # [L, n], [L, 1]
    across, size_v, size_out = out @ v.T, v.square().sum(1), out.square().sum(1, keepdim=True)
    for kind, a, b in (
        (Gain(TOKEN_WEIGHT, -1.0, 0.0), p / left, p / left),
        (Gain(TOKEN_ZERO, 1.0, 0.0), 1 / (left + zero) - 1, p / (left + zero)),
    ):
        product = (a * along_out - b * along_v).sum(0)  # [n]
        energy = (a * a * size_out - 2 * a * b * across + b * b * size_v).sum(0)
        key = int(torch.where(energy > 0, product.square() / energy.clamp(min=1e-30), 0.0).argmax())
        x = a[:, key : key + 1] * out - b[:, key : key + 1] * v[key]
        yield [_of_token(kind, key, rows, filters)], x[:, None]


def _capped(rows: Rows) -> torch.Tensor:
    return rows.soft_cap * (rows.raw[0, 0] / rows.soft_cap).tanh()


def _heads(
    inputs: AttentionInputs, one: AttentionInputs, rows: Rows, kv_head: int, chosen: list[int]
) -> Iterator[Signatures]:
    """Query heads matched with other KV heads: by the remainder, or all of the group with the same one."""
    num_kv_heads, num_q_heads, out = inputs.k.shape[1], inputs.q.shape[1], rows.out[0, 0]
    if num_kv_heads == 1:
        return
    group = num_q_heads // num_kv_heads
    if group > 1:
        modulo = torch.arange(num_q_heads, device=inputs.k.device) % num_kv_heads
        expanded = replace(inputs, k=inputs.k[:, modulo], v=inputs.v[:, modulo], weight_scale=None)
        wrong = attention_rows(expanded, rows.sequences, [chosen]).out[0, kv_head * group : (kv_head + 1) * group]
        yield [Gain(HEAD_MODULO, 1.0, 0.0)], (wrong.transpose(0, 1).flatten(0, 1) - out)[:, None]
    for shift in range(1, min(num_kv_heads, MAX_SHIFTS)):
        other = (kv_head + shift) % num_kv_heads
        own = slice(other, other + 1)
        shifted = replace(one, k=inputs.k[:, own], v=inputs.v[:, own], weight_scale=None)
        wrong = attention_rows(shifted, rows.sequences, [chosen]).out[0, 0]
        yield [Gain(HEAD_SHIFT, 1.0, 0.0, other_head=other)], (wrong - out)[:, None]


def _splits(rows: Rows, filters: PageFilter) -> Iterator[Signatures]:
    """Parts of split-KV that are lost in the merge, or merged with equal weights."""
    num_keys, out = rows.p.shape[3], rows.out[0, 0]
    for size in split_sizes(num_keys, filters.num_splits, filters.page_size):
        starts = range(0, num_keys, size)
        lost = torch.stack([_missing(rows, start, start + size) for start in starts], 1)
        yield [Gain(SPLIT_WEIGHT, -1.0, 0.0, split=i) for i in range(len(starts))], lost
        yield [Gain(SPLIT_AVERAGE, 1.0, 0.0)], averaged(rows.p[0, 0], rows.v[0, 0], out, size)[:, None]


def _rows(rows: Rows, error: torch.Tensor) -> Iterator[Signatures]:
    """The row with the largest error, times a factor of its own."""
    by_row = error.square().sum(1).view(-1, rows.group).sum(1)  # [num_rows]
    worst = int(by_row.argmax())
    own = torch.arange(len(error), device=error.device) // rows.group == worst
    gain = Gain(ROW_GAIN, 1.0, 0.0, position=int(rows.positions[0, worst]))
    yield [gain], (rows.out[0, 0] * own[:, None])[:, None]


def _values(rows: Rows, error: torch.Tensor, filters: PageFilter) -> Iterator[Signatures]:
    """The key whose values explain most if they may be anything: E_r = p_rj (v' - v_j), fitted over the rows."""
    p, error = rows.p[0, 0], error.double()
    if len(p) < MIN_ROWS:
        return
    size = p.square().sum(0)  # [n]
    change = p.T @ error / size.clamp(min=1e-30)[:, None]  # [n, dv]
    key = int((change.square().sum(1) * size).argmax())
    yield [_of_token(Gain(TOKEN_VALUE, 1.0, 0.0), key, rows, filters)], (p[:, key, None] * change[key])[:, None]


def _of_token(gain: Gain, key: int, rows: Rows, filters: PageFilter) -> Gain:
    """`gain` with the place of a key; new tokens lie in no page."""
    sequence = rows.sequences[0]
    if key >= filters.cached_lens[sequence]:
        return replace(gain, position=key)
    slot = key // filters.page_size
    return replace(gain, position=key, slot=slot, page=filters.pages[sequence][slot])


def _mass(rows: Rows, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [L, 1] and weighted values [L, dv] of keys [start, end)."""
    p = rows.p[0, 0, :, start:end]
    return p.sum(1, keepdim=True), p @ rows.v[0, 0, start:end]


def _missing(rows: Rows, start: int, end: int) -> torch.Tensor:
    """What the output changes by if keys [start, end) are missing: [L, dv]."""
    return _without(rows.out[0, 0], *_mass(rows, start, end))


def _without(out: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What `out` [L, dv] changes by without keys of `weight` [L, 1] and weighted `values` [L, dv]; to 0 if all go."""
    return torch.where(weight < FULL, (weight * out - values) / (1 - weight).clamp(min=1 - FULL), -out)
