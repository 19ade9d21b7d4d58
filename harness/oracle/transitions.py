"""Tier 2 at page transitions: a tile of keys scaled by the descales of the page before or behind its own.

Invariant: as in the matched filter, a statistic is flagged only above Z_LIMIT standard deviations of honest noise plus
every bias that noise may have; what each could detect is known before the launch.

A kernel that loads tiles ahead of those it computes may take the descale of the tile being loaded: the last tile of a
page then has the descales of the next page (a step of 1), or the first tile those of the previous one (a step of -1).
A page holds many tiles, so that its own statistics dilute such a fault. But both descales are known, and with them the
exact change X of every row, of size and sign: rows, heads and sequences add up in one statistic whose estimate is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from harness.oracle.gain_findings import Z_LIMIT, z_scores
from harness.oracle.gains import K_STALE, V_STALE, Gain, GainFindings, like_stale
from harness.oracle.matched_filter import PageFilter, row_errors, weighted_sums
from harness.oracle.row_noise import patterns_alike, row_noise, rows_alike
from harness.oracle.sampling import FEWEST_ROWS, MAX_WORK
from harness.oracle.stale import Stale, across, at_transitions, by_key, scaled, spread
from references.attention import AttentionInputs
from references.rows import Rows, attention_rows

TILES = (64, 128)  # keys that are wrong at a transition; of smaller pages all are
MAX_ROWS = 256  # of one sequence
MAX_PLACES = 4  # transitions of a sequence looked at one by one, beside all of them together
MAX_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # of a temporary, unless a single KV head needs more


def find_stale(inputs: AttentionInputs, out: torch.Tensor, filters: PageFilter) -> GainFindings:
    """Statistics of `out` [num_tokens, num_q_heads, head_size_v] as values; none where descales are not per page."""
    gains, largest, count = [], 0.0, 0
    for one in _statistics(inputs, out, filters):
        product, energy, variance, bias = one.sums
        z = z_scores(product, energy, variance, bias)  # [num_kv_heads + 1]
        count += int((energy > 0).sum())
        largest = max(largest, float(z.abs().max()))
        for head in (z.abs() > Z_LIMIT).nonzero()[:, 0].tolist():
            of_head = head if head < len(z) - 1 else None
            estimate = float(product[head] / energy[head])
            gains.append(replace(one.gain, estimate=estimate, z=float(z[head]), kv_head=of_head))
    gains.sort(key=lambda gain: (not like_stale(gain), -abs(gain.z)))
    return GainFindings(z=largest, num_statistics=count, gains=tuple(gains), num_gains=len(gains))


def stale_sizes(inputs: AttentionInputs, filters: PageFilter) -> dict[tuple[str, int], float]:
    """How well a launch would show a stale descale of tiles of TILES[0] keys: what it moves its best statistic by, in
    units of what would be flagged, by (K or V, step). No entry where no statistic looks at it.
    """
    found: dict[tuple[str, int], float] = {}
    for one in _statistics(inputs, None, filters):
        if one.gain.step is not None and one.gain.num_keys == min(TILES[0], filters.page_size):
            _, energy, variance, bias = one.sums
            size = (energy / (Z_LIMIT * variance.sqrt() + bias).clamp(min=1e-300)).max()
            at = "K" if one.gain.kind == K_STALE else "V", one.gain.step
            found[at] = max(found.get(at, 0.0), float(size))
    return found


@dataclass(frozen=True)
class _Statistic:
    """What it is of, all transitions of a sequence if `whole`, and its sums: product, energy, variance, bias."""

    gain: Gain
    whole: bool
    sums: torch.Tensor  # [4, num_kv_heads + 1 (all heads)] on the CPU


def _statistics(inputs: AttentionInputs, out: torch.Tensor | None, filters: PageFilter) -> list[_Statistic]:
    """Of each sequence, and of all of them together where there are more."""
    each = list(_of_sequences(inputs, out, filters))
    if len({one.gain.sequence for one in each}) < 2:
        return each
    together: dict[Gain, torch.Tensor] = {}
    for one in (one for one in each if one.whole):
        key = Gain(one.gain.kind, 1.0, 0.0, step=one.gain.step, num_keys=one.gain.num_keys)
        together[key] = together[key] + one.sums if key in together else one.sums
    return [*each, *(_Statistic(key, True, sums) for key, sums in together.items())]


def _of_sequences(inputs: AttentionInputs, out: torch.Tensor | None, filters: PageFilter) -> Iterator[_Statistic]:
    if filters.block_descale is None or not filters.applies():
        return
    for sequence in range(len(filters.pages)):
        num_pages = -(-filters.cached_lens[sequence] // filters.page_size)
        looked_at = at_transitions(num_pages, TILES, filters.page_size, MAX_PLACES)
        if not looked_at or not inputs.query_lens[sequence]:
            continue
        table = torch.cat(list(_of_heads(inputs, out, filters, sequence, looked_at)), dim=1)  # [4, heads, looked at]
        table = torch.cat((table, table.sum(1, keepdim=True)), dim=1).cpu()
        for one, sums in zip(looked_at, table.unbind(2), strict=True):
            yield _Statistic(_named(one, sequence, filters), one.slot is None or num_pages == 2, sums)


def _of_heads(
    inputs: AttentionInputs, out: torch.Tensor | None, filters: PageFilter, sequence: int, looked_at: Sequence[Stale]
) -> Iterator[torch.Tensor]:
    """Sums [4, heads, len(looked_at)] of some KV heads at a time."""
    assert filters.block_descale is not None
    chosen, group = chosen_rows(inputs, sequence), inputs.q.shape[1] // inputs.k.shape[1]
    per_head = len(chosen) * group * max(inputs.seq_lens[sequence], len(looked_at) * inputs.v.shape[2])
    at_once = max(MAX_ELEMENTS[inputs.q.device.type] // per_head, 1)
    page_size, cached_len = filters.page_size, filters.cached_lens[sequence]
    for first in range(0, inputs.k.shape[1], at_once):
        heads = slice(first, min(first + at_once, inputs.k.shape[1]))
        descales = filters.block_descale[list(filters.pages[sequence]), heads]  # [pages, heads, 2]
        rows = attention_rows(of_heads(inputs, heads), [sequence], [chosen])
        own = by_key(descales, page_size, cached_len)
        changes = [scaled(rows, own, one.used(descales, page_size, cached_len)) for one in looked_at]
        noise = row_noise(rows, filters.profile, filters.q_dtype, _alike(rows, filters))
        x = across(torch.stack(changes, 2), rows.out[0])[None].float() * noise.used[..., None, None]
        moments = noise.moments(x)
        product = torch.zeros_like(moments.energy)  # [1, heads, L, looked at]
        if out is not None:
            error = row_errors(rows, out[:, heads.start * group : heads.stop * group], filters)
            product = (x @ error.float()[..., None])[..., 0]
        yield weighted_sums(product, moments, noise.second_order)[:, 0]


def _alike(rows: Rows, filters: PageFilter) -> torch.Tensor:
    """How many rows round as each does [1, heads, L]: so many are looked at that likeness of P alone counts as well."""
    same = rows_alike(rows.out, filters.profile, filters.q_dtype)
    return torch.maximum(same, patterns_alike(rows, filters.profile, filters.q_dtype))


def chosen_rows(inputs: AttentionInputs, sequence: int) -> list[int]:
    """Query rows of a sequence to look at: evenly spread, more than the matched filter of pages can afford."""
    query_len = inputs.query_lens[sequence]
    work = inputs.q.shape[1] * inputs.v.shape[2] * max(inputs.seq_lens[sequence], 1)  # of one row
    return spread(range(query_len), min(max(MAX_WORK // work, FEWEST_ROWS), MAX_ROWS))


def of_heads(inputs: AttentionInputs, heads: slice) -> AttentionInputs:
    """The inputs of some KV heads and their query heads."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    own = slice(heads.start * group, heads.stop * group)
    return replace(
        inputs,
        q=inputs.q[:, own],
        k=inputs.k[:, heads],
        v=inputs.v[:, heads],
        q_cached=None if inputs.q_cached is None else inputs.q_cached[:, own],
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[own],
        sinks=None if inputs.sinks is None else inputs.sinks[own],
        weight_scale=None if inputs.weight_scale is None else inputs.weight_scale[:, heads],
    )


def _named(one: Stale, sequence: int, filters: PageFilter) -> Gain:
    kind = K_STALE if one.tensors == "K" else V_STALE
    gain = Gain(kind, 1.0, 0.0, sequence=sequence, step=one.step, num_keys=one.num_keys)
    if one.slot is None:
        return gain
    pages = filters.pages[sequence]
    return replace(gain, slot=one.slot, page=pages[one.slot], other_page=pages[one.slot + one.step])
