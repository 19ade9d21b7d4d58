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
from harness.oracle.gains import K_STALE, V_STALE, Gain, GainFindings
from harness.oracle.matched_filter import PageFilter, row_errors, weighted_sums
from harness.oracle.row_noise import row_noise
from harness.oracle.sampling import FEWEST_ROWS, MAX_WORK
from references.attention import AttentionInputs
from references.rows import Rows, attention_rows

TILES = (64, 128)  # keys that are wrong at a transition; of smaller pages all are
STEPS = (1, -1)
MAX_ROWS = 256  # of one sequence
MAX_PLACES = 4  # transitions of a sequence looked at one by one, beside all of them together
MAX_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # of a temporary, unless a single KV head needs more
MOST_EXPONENT = 600.0  # of a weight that a wrong descale makes; more would overflow


@dataclass(frozen=True)
class Swap:
    """Keys of one sequence with factors on their descales: what they are scaled by over what they should be.

    step, width and slot say where; slot is None for all transitions of a sequence that has more than one.
    """

    keys: torch.Tensor  # [m] int64, ascending
    k_gain: torch.Tensor  # [num_kv_heads, m] float64
    v_gain: torch.Tensor  # [num_kv_heads, m] float64
    step: int
    width: int
    slot: int | None  # of the page that the keys lie on
    whole: bool  # whether the sequence has no other transitions


def stale_swaps(descales: torch.Tensor, page_size: int, cached_len: int, widths: Sequence[int]) -> list[Swap]:
    """Swaps of one sequence whose pages have `descales` [pages, num_kv_heads, 2]: all transitions, then single ones.

    Of its keys the first `cached_len` lie on these pages. [] where these are one page, or none.
    """
    pages = -(-cached_len // page_size)
    swaps, device = [], descales.device
    for step in STEPS:
        slots = range(pages - 1) if step == 1 else range(1, pages)  # pages that have a neighbour on that side
        for width in sorted({min(width, page_size) for width in widths}) if slots else ():
            places: list[int | None] = [None] if len(slots) > 1 else [slots[0]]
            places += _spread(slots, MAX_PLACES) if len(slots) > 1 else []
            for place in places:
                own = list(slots) if place is None else [place]
                keys = [_tile(slot, step, width, page_size, cached_len) for slot in own]
                slot = torch.tensor(own, device=device).repeat_interleave(
                    torch.tensor([len(tile) for tile in keys], device=device)
                )  # [m]
                ratio = (descales[slot + step].double() / descales[slot].double()).transpose(0, 1)  # [heads, m, 2]
                index = torch.tensor([key for tile in keys for key in tile], device=device)
                k_gain, v_gain = ratio.unbind(-1)
                swaps.append(Swap(index, k_gain, v_gain, step, width, place, len(own) == len(slots)))
    return swaps


def swap_change(
    rows: Rows, keys: torch.Tensor, k_gain: torch.Tensor | None, v_gain: torch.Tensor | None
) -> torch.Tensor:
    """What the outputs of one sequence change by, exactly, if K and V of `keys` [m] are multiplied by gains [heads, m].

    float64 [num_kv_heads, R * group, head_size_v]; None leaves K, or V, as it is.
    """
    p, v, out = rows.p[0][..., keys], rows.v[0][:, keys], rows.out[0]  # [heads, L, m], [heads, m, dv], [heads, L, dv]
    changed = p
    if k_gain is not None:
        raw, scores = rows.raw[0][..., keys], rows.scores[0][..., keys]
        shift = _capped(raw * k_gain[:, None], rows.soft_cap) - _capped(raw, rows.soft_cap)
        changed = (scores + shift - rows.lse[0]).clamp_(max=MOST_EXPONENT).exp_()
        changed = changed * rows.visible[0][..., keys]
    mass = (changed - p).sum(-1, keepdim=True)  # [heads, L, 1]
    moved = (changed * v_gain[:, None] - p if v_gain is not None else changed - p) @ v
    return (moved - mass * out) / (1 + mass)


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
    gains.sort(key=lambda gain: -abs(gain.z))
    return GainFindings(z=largest, num_statistics=count, gains=tuple(gains), num_gains=len(gains))


def stale_sizes(inputs: AttentionInputs, filters: PageFilter) -> dict[tuple[str, int], float]:
    """How well a launch would show a stale descale of tiles of TILES[0] keys: what it moves its best statistic by, in
    units of what would be flagged, by (kind, step). No entry where no statistic looks at it.
    """
    found: dict[tuple[str, int], float] = {}
    for one in _statistics(inputs, None, filters):
        if one.gain.step is not None and one.gain.num_keys == min(TILES[0], filters.page_size):
            _, energy, variance, bias = one.sums
            size = (energy / (Z_LIMIT * variance.sqrt() + bias).clamp(min=1e-300)).max()
            at = one.gain.kind, one.gain.step
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
    for sequence, pages in enumerate(filters.pages):
        cached_len = filters.cached_lens[sequence]
        swaps = stale_swaps(filters.block_descale[list(pages)], filters.page_size, cached_len, TILES)
        if not swaps or not inputs.query_lens[sequence]:
            continue
        parts = list(_of_heads(inputs, out, filters, sequence, swaps))
        table = torch.cat(parts, dim=1).cpu()  # [4, num_kv_heads, 2 * swaps]
        table = torch.cat((table, table.sum(1, keepdim=True)), dim=1)
        for i, swap in enumerate(swaps):
            for j, kind in enumerate((K_STALE, V_STALE)):
                yield _Statistic(_named(kind, swap, sequence, pages), swap.whole, table[..., 2 * i + j])


def _of_heads(
    inputs: AttentionInputs, out: torch.Tensor | None, filters: PageFilter, sequence: int, swaps: Sequence[Swap]
) -> Iterator[torch.Tensor]:
    """Sums [4, heads, 2 * swaps (K, V)] of some KV heads at a time."""
    chosen = chosen_rows(inputs, sequence)
    num_heads, group = inputs.k.shape[1], inputs.q.shape[1] // inputs.k.shape[1]
    per_head = len(chosen) * group * max(inputs.seq_lens[sequence], 2 * len(swaps) * inputs.v.shape[2])
    step = max(MAX_ELEMENTS[inputs.q.device.type] // per_head, 1)
    for first in range(0, num_heads, step):
        heads = slice(first, min(first + step, num_heads))
        rows = attention_rows(of_heads(inputs, heads), [sequence], [chosen])
        changes = [
            swap_change(rows, swap.keys, *gains)
            for swap in swaps
            for gains in ((swap.k_gain[heads], None), (None, swap.v_gain[heads]))
        ]
        noise = row_noise(rows, filters.profile, filters.q_dtype)
        x = across(torch.stack(changes, 2), rows.out[0])[None].float()  # [1, heads, L, 2 * swaps, dv]
        x *= noise.used[..., None, None]
        moments = noise.moments(x)
        product = torch.zeros_like(moments.energy)  # [1, heads, L, 2 * swaps]
        if out is not None:
            error = row_errors(rows, out[:, heads.start * group : heads.stop * group], filters)
            product = (x @ error.float()[..., None])[..., 0]
        yield weighted_sums(product, moments, noise.second_order)[:, 0]


def across(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`x` [..., L, T, dv] without its part along `out` [..., L, dv].

    That is where a mean relative error of P shows, which 8-bit types have: as a bias it would hide a V descale.
    """
    out = out[..., None, :]
    along = (x * out).sum(-1, keepdim=True) / out.square().sum(-1, keepdim=True).clamp(min=1e-300)
    return x - along * out


def chosen_rows(inputs: AttentionInputs, sequence: int) -> list[int]:
    """Query rows of a sequence to look at: evenly spread, more than the matched filter of pages can afford."""
    query_len = inputs.query_lens[sequence]
    work = inputs.q.shape[1] * inputs.v.shape[2] * max(inputs.seq_lens[sequence], 1)  # of one row
    return _spread(range(query_len), min(max(MAX_WORK // work, FEWEST_ROWS), MAX_ROWS))


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


def _named(kind: str, swap: Swap, sequence: int, pages: Sequence[int]) -> Gain:
    one = Gain(kind, 1.0, 0.0, sequence=sequence, step=swap.step, num_keys=swap.width)
    if swap.slot is None:
        return one
    other = pages[swap.slot + swap.step]
    return replace(one, slot=swap.slot, page=pages[swap.slot], position=int(swap.keys[0]), other_page=other)


def _tile(slot: int, step: int, width: int, page_size: int, cached_len: int) -> range:
    """The keys of a page that are next to the neighbour `step` away."""
    start, end = slot * page_size, min((slot + 1) * page_size, cached_len)
    return range(max(end - width, start), end) if step == 1 else range(start, min(start + width, end))


def _capped(raw: torch.Tensor, cap: float) -> torch.Tensor:
    return (raw / cap).tanh_().mul_(cap) if cap else raw


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of `items`, evenly spread, the first and the last among them."""
    count = min(len(items), most)
    return sorted({items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)})
