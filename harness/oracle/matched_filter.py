"""Tolerance tier 2, the matched filter: faults that hide below the tolerance of every element, and their place.

Invariant: a statistic is flagged only above Z_LIMIT standard deviations of honest noise plus every bias that noise may
have; the least detectable fault of each is known before the launch, from the same numbers.

A gain r on the K or V of one page of one KV head changes the outputs of a row by r X, to first order:

    X^V = sum_{j in page} p_j v_j        X^K = sum_{j in page} p_j (ds_j / dr) (v_j - o)

so that, with E = out - o over sampled rows and all query heads of the KV head,

    N = sum a <E, X>,   D = sum a <X, X>:   r = N / D,   z = max(|N| - bias, 0) / sd,   r_min = (Z_LIMIT sd + bias) / D

Rows differ in noise; the weights a = <X, X> / (variance + bias^2) of a row make the sum the best estimate of r.
Each page of each sequence, and all pages together (of a sequence, and of the batch), is one statistic. So is, with
signatures of their own, each row by a factor (X = o), and each way to average the splits of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from harness.dtypes import element_type
from harness.kernel.numerics import NumericsProfile
from harness.oracle.gain_findings import Statistics, findings, least_detectable, page_table
from harness.oracle.gains import ROW_GAIN, Gain, GainFindings
from harness.oracle.row_noise import Moments, row_noise, rows_alike
from harness.oracle.sampling import Part, batches
from harness.oracle.splits import MOST_SIZES, averaged, split_sizes
from references.attention import AttentionInputs
from references.rows import Rows, attention_rows

MIN_ENERGY = 1e-24  # of the signature of a row; less is a page that the row does not attend to


@dataclass(frozen=True)
class PageFilter:
    """What the filter needs to know of a case beside the inputs of its reference."""

    profile: NumericsProfile
    q_dtype: str
    page_size: int
    pages: tuple[tuple[int, ...], ...]  # physical pages of each sequence
    cached_lens: tuple[int, ...]  # keys below these lie in pages
    num_splits: int = 1
    block_descale: torch.Tensor | None = None  # [num_pages, num_kv_heads, 2] of K then V, where they are per page

    def applies(self) -> bool:
        """Whether the cast of P can be modelled as independent errors: truncated P is biased."""
        return self.profile.tf32(self.q_dtype) is None


def find_gains(inputs: AttentionInputs, out: torch.Tensor, filters: PageFilter) -> GainFindings:
    """Statistics of `out` [num_tokens, num_q_heads, head_size_v] as values (any output scale applied), any float dtype.

    Elements that are not finite are left to tier 1. Saturated 8-bit outputs are compared with saturated references.
    """
    if not filters.applies():
        return GainFindings()
    return findings(_all_statistics(inputs, out, filters), filters.pages)


def least_gains(inputs: AttentionInputs, filters: PageFilter) -> GainFindings:
    """The same before a launch: only what could be detected (`least_k`, `least_v`) is known."""
    if not filters.applies():
        return GainFindings()
    return findings(_all_statistics(inputs, None, filters), filters.pages)


def least_of_pages(inputs: AttentionInputs, filters: PageFilter) -> dict[int, torch.Tensor]:
    """Least detectable gain of each page, by sequence: float64 [num_kv_heads, 2 (K, V), pages], on the CPU.

    inf where no sampled row attends to a page; no entry for a sequence that cannot be looked at.
    """
    if not filters.applies():
        return {}
    sequences, table = page_table(_all_statistics(inputs, None, filters), filters.pages)
    least = least_detectable(table)[:-1, ..., :-1]  # [num_seqs, num_kv_heads, 2, most pages]
    return {s: least[i, ..., : len(filters.pages[s])] for i, s in enumerate(sequences)}


def _all_statistics(inputs: AttentionInputs, out: torch.Tensor | None, filters: PageFilter) -> list[Statistics]:
    """Statistics of all batches; rows that round alike are counted over all parts of their sequence first."""
    todo = list(batches(inputs, filters.page_size))
    cut: dict[int, list[Part]] = {}
    for part in (part for batch in todo for part in batch if not part.whole):
        cut.setdefault(part.sequence, []).append(part)
    alike: dict[Part, torch.Tensor] = {}
    for sequence, parts in cut.items():
        seen = [attention_rows(inputs, [sequence], [part.rows]).out for part in parts]  # [1, heads, rows * group, dv]
        counts = rows_alike(torch.cat(seen, dim=2), filters.profile, filters.q_dtype)
        alike |= zip(parts, torch.split(counts, [x.shape[2] for x in seen], dim=2), strict=True)
    return [_statistics(inputs, out, filters, batch, alike) for batch in todo]


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
    pages = page_signatures(rows, filters.page_size, cached)  # [num_seqs, num_kv_heads, R * group, T, dv]
    cuts = split_signatures(rows, inputs, filters)  # [num_seqs, num_kv_heads, R * group, ways, dv]
    x = torch.cat((pages, cuts, noise.out[..., None, :]), dim=3) * noise.used[..., None, None]
    moments = noise.moments(x)  # each [num_seqs, kv heads, R * group, all]
    product = torch.zeros_like(moments.energy)
    if out is not None:
        product = (x @ row_errors(rows, out, filters).float()[..., None])[..., 0]
    certain = moments.bias + moments.along_out.abs() * noise.second_order
    row = _worst_row(
        product[..., -1], moments.energy[..., -1], moments.variance[..., -1], certain[..., -1], noise.alike
    )
    explained = product.double().sum(2).square() / moments.energy.double().sum(2).clamp(min=MIN_ENERGY)
    sums = torch.cat((weighted_sums(product, moments, noise.second_order), explained[None]))
    stacked = torch.cat((sums.flatten(), row)).cpu()
    table = stacked[: -len(row)].view(sums.shape)
    by_page, by_cut, _ = torch.split(table, [pages.shape[3], cuts.shape[3], 1], dim=3)
    found = stacked[-len(row) :].tolist()
    return Statistics(
        rows.sequences,
        pages=by_page.reshape(*by_page.shape[:3], 2, -1),
        splits=by_cut,
        num_rows=int(found[-1]),
        worst_row=_named_row(inputs, batch, moments.energy.shape, found),
    )


def weighted_sums(product: torch.Tensor, moments: Moments, second_order: float) -> torch.Tensor:
    """N, D, variance and bias summed over rows, each row weighted by what it tells: float64 [4, ..., signatures].

    `product` <E, X> and the moments of X: [..., rows, signatures].
    """
    energy, variance, bias, along = (y.double() for y in vars(moments).values())
    weight = (energy / (variance + bias.square())).masked_fill_(energy <= MIN_ENERGY, 0.0)
    sums = [(weight * y).sum(-2) for y in (product.double(), energy, weight * variance, bias)]
    sums[3] += (weight * along).sum(-2).abs() * second_order
    return torch.stack(sums)


def split_signatures(rows: Rows, inputs: AttentionInputs, filters: PageFilter) -> torch.Tensor:
    """Equal weights for all splits, by size of a split: [num_seqs, num_kv_heads, R * group, sizes, dv] float32."""
    lens = [inputs.seq_lens[sequence] for sequence in rows.sequences]
    sizes = [split_sizes(seq_len, filters.num_splits, filters.page_size) for seq_len in lens]
    most = MOST_SIZES if filters.num_splits > 1 else 0  # the same for every part of a sequence
    signatures = rows.out.new_zeros(*rows.out.shape[:3], most, rows.out.shape[3], dtype=torch.float32)
    for i, (seq_len, own) in enumerate(zip(lens, sizes, strict=True)):
        for way, size in enumerate(own):
            keys = slice(0, seq_len)
            signatures[i, :, :, way] = averaged(rows.p[i, :, :, keys], rows.v[i, :, keys], rows.out[i], size)
    return signatures


def _worst_row(
    product: torch.Tensor,
    energy: torch.Tensor,
    variance: torch.Tensor,
    bias: torch.Tensor,
    alike: torch.Tensor,
) -> torch.Tensor:
    """Of X = o, each row a statistic of its own [num_seqs, num_kv_heads, R * group]: z, estimate, place, how many."""
    there = energy > MIN_ENERGY
    deviation = (variance / alike).sqrt()  # rows that round alike count when they are added up
    z = ((product.abs() - bias) / deviation).clamp_(min=0).masked_fill_(~there, 0.0)
    z = z.flatten()
    place = z.argmax()
    estimate = (product / energy.clamp(min=MIN_ENERGY)).flatten()[place]
    return torch.stack((z[place] * estimate.sign(), estimate, place.double(), there.sum().double()))


def _named_row(inputs: AttentionInputs, batch: Sequence[Part], shape: torch.Size, found: list[float]) -> Gain:
    """The row at a place among [num_seqs, num_kv_heads, R * group], with the z and the estimate of its factor."""
    z, estimate, place, _ = found
    i, rest = divmod(int(place), shape[1] * shape[2])
    kv_head, row = divmod(rest, shape[2])
    part, group = batch[i], inputs.q.shape[1] // inputs.k.shape[1]
    context_len = part.seq_len - inputs.query_lens[part.sequence]
    position = context_len + part.rows[min(row // group, len(part.rows) - 1)]
    return Gain(ROW_GAIN, estimate, z, kv_head=kv_head, sequence=part.sequence, position=position)


def _alike(rows: Rows, batch: Sequence[Part], alike: Mapping[Part, torch.Tensor], filters: PageFilter) -> torch.Tensor:
    """How many rows round as each does [num_seqs, num_kv_heads, R * gqa_ratio], those of other parts included."""
    count = rows_alike(rows.out, filters.profile, filters.q_dtype)
    for i, part in enumerate(batch):
        if part in alike:
            known = alike[part]
            count[i, :, : known.shape[2]] = known[0]
    return count
