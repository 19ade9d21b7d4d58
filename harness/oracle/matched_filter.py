"""Tolerance tier 2, the page matched filter: faults that hide below the tolerance of every element, and their place.

Invariant: a statistic is flagged only above Z_LIMIT standard deviations of honest noise plus every bias that noise may
have; the least detectable fault of each is known before the launch, from the same numbers.

A gain r on the K or V of one page of one KV head changes the outputs of a row by r X, to first order:

    X^V = sum_{j in page} p_j v_j        X^K = sum_{j in page} p_j (ds_j / dr) (v_j - o)

so that, with E = out - o over sampled rows and all query heads of the KV head,

    N = sum a <E, X>,   D = sum a <X, X>:   r = N / D,   z = max(|N| - bias, 0) / sd,   r_min = (Z_LIMIT sd + bias) / D

Rows differ in noise; the weights a = <X, X> / (variance + bias^2) of a row make the sum the best estimate of r.
Each page of each sequence, and all pages together (of a sequence, and of the batch), is one statistic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile
from harness.oracle.gains import K_DESCALE, V_DESCALE, Gain, GainFindings
from harness.oracle.row_noise import MOST_WEIGHTS, by_gram, row_noise, rows_alike
from references.attention import AttentionInputs
from references.rows import Rows, attention_rows

Z_LIMIT = 7.0
FALSE_ALARM = math.erfc(Z_LIMIT / math.sqrt(2))  # probability per statistic, 2.6e-12
MAX_ROWS = 64  # sampled per sequence
MAX_HEAD_ROWS = 256  # sampled rows times gqa_ratio
MAX_WORK, FEWEST_ROWS = 1 << 29, 8  # query heads x keys x dims of the rows of a sequence, unless so few need more
MAX_GAINS = 16  # listed
MIN_ENERGY = 1e-24  # of the signature of a row; less is a page that the row does not attend to
_PADDING = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements up to which a batch may be padding; beyond, half of it
_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}  # of the largest float32 temporary, where one row needs no more
_PASSES = 16  # float64 temporaries of the scores of a row that count as one float32 temporary would


@dataclass(frozen=True)
class PageFilter:
    """What the filter needs to know of a case beside the inputs of its reference."""

    profile: NumericsProfile
    q_dtype: str
    page_size: int
    pages: tuple[tuple[int, ...], ...]  # physical pages of each sequence
    cached_lens: tuple[int, ...]  # keys below these lie in pages
    num_splits: int = 1

    def applies(self) -> bool:
        """Whether the cast of P can be modelled as independent errors: truncated P is biased."""
        return self.profile.tf32(self.q_dtype) is None


def find_gains(inputs: AttentionInputs, out: torch.Tensor, filters: PageFilter) -> GainFindings:
    """Statistics of `out` [num_tokens, num_q_heads, head_size_v] as values (any output scale applied), any float dtype.

    Elements that are not finite are left to tier 1. Saturated 8-bit outputs are compared with saturated references.
    """
    if not filters.applies():
        return GainFindings()
    return _findings(_all_statistics(inputs, out, filters), filters)


def least_gains(inputs: AttentionInputs, filters: PageFilter) -> GainFindings:
    """The same before a launch: only what could be detected (`least_k`, `least_v`) is known."""
    if not filters.applies():
        return GainFindings()
    return _findings(_all_statistics(inputs, None, filters), filters)


def least_of_pages(inputs: AttentionInputs, filters: PageFilter) -> dict[int, torch.Tensor]:
    """Least detectable gain of each page, by sequence: float64 [num_kv_heads, 2 (K, V), pages], on the CPU.

    inf where no sampled row attends to a page; no entry for a sequence that cannot be looked at.
    """
    if not filters.applies():
        return {}
    sequences, table = _table(_all_statistics(inputs, None, filters), filters)
    least = _least(table)[:-1, ..., :-1]  # [num_seqs, num_kv_heads, 2, most pages]
    return {s: least[i, ..., : len(filters.pages[s])] for i, s in enumerate(sequences)}


def sampled(query_len: int, group: int, most: int = MAX_ROWS) -> tuple[int, ...]:
    """Rows to look at: the first, the last and evenly spread ones between, at most `most`."""
    count = min(query_len, most, MAX_ROWS, max(MAX_HEAD_ROWS // group, 4))
    return tuple(sorted({round(i * (query_len - 1) / max(count - 1, 1)) for i in range(count)}))


@dataclass(frozen=True)
class Part:
    """Sampled rows of one sequence that are looked at together; `whole` if they are all of them."""

    sequence: int
    rows: tuple[int, ...]
    seq_len: int
    whole: bool


def batches(inputs: AttentionInputs, filters: PageFilter) -> Iterator[list[Part]]:
    """Parts in lists that are computed together, padded, largest first; a large sequence is cut by rows.

    No float32 temporary of a batch has more than _ELEMENTS elements, unless a single row of one sequence does.
    """
    heads = inputs.q.shape[1]
    group, size, device = heads // inputs.k.shape[1], inputs.v.shape[2], inputs.q.device.type

    def elements(num_rows: int, seq_len: int) -> int:
        signatures = 2 * (-(-seq_len // filters.page_size) + 1)
        per_key = _PASSES if by_gram(signatures, MOST_WEIGHTS, size) else max(signatures, _PASSES)
        return num_rows * heads * max(signatures * size, seq_len * per_key)

    limit, padding = _ELEMENTS[device], _PADDING[device]
    parts = []
    for sequence, seq_len in enumerate(inputs.seq_lens):
        affordable = max(MAX_WORK // (heads * size * max(seq_len, 1)), FEWEST_ROWS)
        rows = sampled(inputs.query_lens[sequence], group, affordable)
        if seq_len > 0 and rows:
            step = max(limit // elements(1, seq_len), 1)
            parts += [
                Part(sequence, rows[start : start + step], seq_len, step >= len(rows))
                for start in range(0, len(rows), step)
            ]
    parts.sort(key=lambda part: (-part.seq_len, -len(part.rows), part.sequence))
    batch: list[Part] = []
    own = most_rows = 0
    for part in parts:
        most_rows, own = max(most_rows, len(part.rows)), own + elements(len(part.rows), part.seq_len)
        padded = (len(batch) + 1) * elements(most_rows, batch[0].seq_len if batch else part.seq_len)
        if batch and (padded > limit or padded > max(padding, 2 * own)):
            yield batch
            batch, most_rows, own = [], len(part.rows), elements(len(part.rows), part.seq_len)
        batch.append(part)
    if batch:
        yield batch


def _all_statistics(inputs: AttentionInputs, out: torch.Tensor | None, filters: PageFilter) -> list[Statistics]:
    """Statistics of all batches; rows that round alike are counted over all parts of their sequence first."""
    todo = list(batches(inputs, filters))
    cut: dict[int, list[Part]] = {}
    for part in (part for batch in todo for part in batch if not part.whole):
        cut.setdefault(part.sequence, []).append(part)
    alike: dict[Part, torch.Tensor] = {}
    for sequence, parts in cut.items():
        seen = [attention_rows(inputs, [sequence], [part.rows]).out for part in parts]  # [1, heads, rows * group, dv]
        counts = rows_alike(torch.cat(seen, dim=2), filters.profile, filters.q_dtype)
        alike |= zip(parts, torch.split(counts, [x.shape[2] for x in seen], dim=2), strict=True)
    return [_statistics(inputs, out, filters, batch, alike) for batch in todo]


@dataclass(frozen=True)
class Statistics:
    """Of one batch; [num_seqs, num_kv_heads, 2 kinds (K, V), pages + 1 (all pages)], float64, on the CPU."""

    sequences: tuple[int, ...]
    product: torch.Tensor  # N
    energy: torch.Tensor  # D
    variance: torch.Tensor
    bias: torch.Tensor
    explained: torch.Tensor  # squared error that the signature explains, rows alike: tells kinds of one place apart


def page_signatures(rows: Rows, page_size: int, cached: torch.Tensor) -> torch.Tensor:
    """X^K and X^V of all pages and of all pages together: [num_seqs, num_kv_heads, R * group, 2 * (pages + 1), dv].

    float32: signatures and their noise need no more, and are most of the work. `cached` bool [num_seqs, n] says which
    keys lie in pages.
    """
    num_seqs, heads, num_rows, num_keys = rows.p.shape
    size = min(page_size, num_keys)
    pages = -(-num_keys // size)
    pad = pages * size - num_keys
    slope = logit_slope(rows)  # [L, n]
    p = (rows.p * cached[:, None, None]).float()
    v, out = rows.v.float(), rows.out.float()

    def by_page(weights: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(weights, (0, pad))
        return padded.view(num_seqs, heads, num_rows, pages, size).transpose(2, 3)  # [seqs, heads, pages, rows, size]

    values = torch.nn.functional.pad(v, (0, 0, 0, pad)).view(num_seqs, heads, pages, size, -1)
    by_value = by_page(p) @ values  # [num_seqs, heads, pages, rows, dv]
    weights = by_page(p * slope.float())
    by_key = weights @ values - weights.sum(-1, keepdim=True) * out[:, :, None]
    both = [torch.cat((x, x.sum(2, keepdim=True)), dim=2) for x in (by_key, by_value)]
    return torch.cat(both, dim=2).transpose(2, 3)


def logit_slope(rows: Rows) -> torch.Tensor:
    """d s_j / dr where q . k_j is multiplied by 1 + r, same shape as the scores: a soft cap flattens it."""
    if not rows.soft_cap:
        return rows.raw
    return rows.raw * (1 - (rows.raw / rows.soft_cap).tanh().square_())


def row_errors(rows: Rows, out: torch.Tensor, filters: PageFilter) -> torch.Tensor:
    """out - o of these rows, 0 where the output is not finite or saturates: [num_seqs, num_kv_heads, R * group, dv]."""
    error = rows.pick(out).double() - rows.out
    out_type = element_type(filters.profile.out_type(filters.q_dtype))
    largest = out_type.largest * filters.profile.out_scale
    return error.masked_fill(~error.isfinite() | (rows.out.abs() >= largest), 0.0)


def _statistics(
    inputs: AttentionInputs,
    out: torch.Tensor | None,
    filters: PageFilter,
    batch: Sequence[Part],
    alike: Mapping[Part, torch.Tensor],
) -> Statistics:
    rows = attention_rows(inputs, [part.sequence for part in batch], [part.rows for part in batch])
    cached_lens = torch.tensor([filters.cached_lens[s] for s in rows.sequences], device=rows.p.device)
    cached = torch.arange(rows.p.shape[3], device=rows.p.device) < cached_lens[:, None]  # [num_seqs, n]
    noise = row_noise(rows, filters.profile, filters.q_dtype, _alike(rows, batch, alike, filters))
    x = page_signatures(rows, filters.page_size, cached)  # [num_seqs, num_kv_heads, R * group, T, dv]
    x = x.contiguous() * noise.used[..., None, None]
    moments = noise.moments(x)
    energy, variance, bias, along = (y.double() for y in vars(moments).values())  # [num_seqs, kv heads, R * group, T]
    product = torch.zeros_like(energy)
    if out is not None:
        product = (x @ row_errors(rows, out, filters).float()[..., None])[..., 0].double()
    weight = (energy / (variance + bias.square())).masked_fill_(energy <= MIN_ENERGY, 0.0)
    sums = [(weight * y).sum(2) for y in (product, energy, weight * variance, bias)]
    sums[3] += (weight * along).sum(2).abs() * noise.second_order
    sums.append(product.sum(2).square() / energy.sum(2).clamp(min=MIN_ENERGY))
    stacked = torch.stack(sums).cpu().view(len(sums), len(rows.sequences), sums[0].shape[1], 2, -1)
    return Statistics(rows.sequences, *stacked)


def _alike(rows: Rows, batch: Sequence[Part], alike: Mapping[Part, torch.Tensor], filters: PageFilter) -> torch.Tensor:
    """How many rows round as each does [num_seqs, num_kv_heads, R * gqa_ratio], those of other parts included."""
    count = rows_alike(rows.out, filters.profile, filters.q_dtype)
    for i, part in enumerate(batch):
        if part in alike:
            known = alike[part]
            count[i, :, : known.shape[2]] = known[0]
    return count


def _table(parts: Sequence[Statistics], filters: PageFilter) -> tuple[list[int], torch.Tensor]:
    """Sums over rows: [5 (product, energy, variance, bias, explained), num_seqs + 1, num_kv_heads, 2, most pages + 1].

    The last sequence stands for the whole batch, the last page for all pages.
    """
    merged: dict[int, torch.Tensor] = {}
    for part in parts:
        for i, sequence in enumerate(part.sequences):
            sums = torch.stack((part.product[i], part.energy[i], part.variance[i], part.bias[i], part.explained[i]))
            pages = len(filters.pages[sequence])
            sums = torch.cat((sums[..., :pages], sums[..., -1:]), dim=-1)  # [5, num_kv_heads, 2, pages + 1]
            merged[sequence] = merged[sequence] + sums if sequence in merged else sums
    if not merged:
        return [], torch.zeros(5, 1, 1, 2, 1, dtype=torch.float64)
    width = max(sums.shape[-1] for sums in merged.values())
    shape = (5, len(merged) + 1, *next(iter(merged.values())).shape[1:3], width)
    table = torch.zeros(shape, dtype=torch.float64)
    for i, sums in enumerate(merged.values()):
        table[:, i, ..., : sums.shape[-1] - 1] = sums[..., :-1]
        table[:, i, ..., -1] = sums[..., -1]
    table[:, -1, ..., -1] = table[:, :-1, ..., -1].sum(1)  # the whole batch
    return list(merged), table


def _least(table: torch.Tensor) -> torch.Tensor:
    """r_min [num_seqs + 1, num_kv_heads, 2, most pages + 1]; inf where nothing is attended to."""
    _, energy, variance, bias, _ = table
    return torch.where(energy > 0, (Z_LIMIT * variance.sqrt() + bias) / energy.clamp(min=1e-300), math.inf)


def _findings(parts: Sequence[Statistics], filters: PageFilter) -> GainFindings:
    """All statistics judged; the same page seen by several parts is one statistic."""
    sequences, table = _table(parts, filters)
    product, energy, variance, bias, explained = table  # [num_seqs + 1, num_kv_heads, 2, width]
    width, attended = table.shape[-1], energy > 0
    deviation = variance.clamp(min=1e-300).sqrt()
    z = torch.where(attended, ((product.abs() - bias).clamp(min=0) / deviation) * product.sign(), 0.0)
    rank = z.abs().amax((2, 3), keepdim=True)  # of each sequence and KV head: first where, then what
    above = (z.abs() > Z_LIMIT).nonzero().tolist()
    above.sort(key=lambda at: (-float(rank[at[0], at[1]]), -float(explained[tuple(at)])))
    found = []
    for i, head, kind, slot in above:
        sequence = [*sequences, None][i]
        in_page = sequence is not None and slot < width - 1
        found.append(
            Gain(
                kind=(K_DESCALE, V_DESCALE)[kind],
                estimate=float(product[i, head, kind, slot] / energy[i, head, kind, slot]),
                z=float(z[i, head, kind, slot]),
                kv_head=head,
                sequence=sequence,
                slot=slot if in_page else None,
                page=filters.pages[sequence][slot] if in_page else None,
            )
        )
    per_page = _least(table)[:-1, ..., :-1]  # [num_seqs, num_kv_heads, 2, width - 1]
    return GainFindings(
        z=float(z.abs().max()),
        num_statistics=int(attended.sum()),
        gains=tuple(found[:MAX_GAINS]),
        num_gains=len(found),
        least_k=_typical(per_page[:, :, 0]),
        least_v=_typical(per_page[:, :, 1]),
    )


def _typical(least: torch.Tensor) -> float:
    """Median over the pages that are attended to; inf where there are none."""
    finite = least[least.isfinite()]
    return float(finite.median()) if finite.numel() else math.inf
