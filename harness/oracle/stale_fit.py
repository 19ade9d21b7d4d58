"""Which exchange of descales explains an error that is there: pages mixed up, heads mixed up, descales dropped.

Invariant: looks only at outputs that failed; a hypothesis is handed on only if it fits clearly better than every other,
and it is the caller's to check that the whole output is what a right kernel would make of descales so exchanged.

With E = out - o, X the exact change of a hypothesis and s^2 the honest noise of a row, the fit of a hypothesis is

    sum over rows of (E^2 - (E - X)^2) / s^2

which is the largest for the true one. It adds up over KV heads, so that those which do not have the fault stand apart.
X starts from the payload, as K and V are rounded anew where a kernel rounds what it has scaled: 8-bit payloads have few
mantissas, so that all of a page err alike, by as much as neighbouring descales may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from harness.oracle.matched_filter import PageFilter, row_errors
from harness.oracle.row_noise import RowNoise, row_noise
from harness.oracle.stale import (
    DROPPED,
    EXCHANGED,
    FIRST_HEAD,
    NEIGHBOUR,
    OTHER_HEAD,
    STEPS,
    TENSORS,
    Stale,
    by_key,
    change,
    spread,
    struck,
)
from harness.oracle.transitions import chosen_rows, of_heads
from references.attention import AttentionInputs
from references.rows import Rows, attention_rows

WIDTHS = (16, 32, 64, 128, 256)  # keys per tile
MAX_PLACES = 8  # single transitions, beside all of them together
MAX_HEAD_STEPS = 8
CLEARLY = 25.0  # five sigma squared: by how much the best must fit better than any other
MAX_SCORES = 1 << 22  # query heads times rows times keys
FEW_ROWS = 32  # looked at first: enough for faults that are not diluted

# Cached keys [m] of the sequence and what they are scaled by [m, num_kv_heads, 2]: K and V as a kernel then sees them.
Dequantised = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Fit:
    """`total` is what the sum over rows comes to, `energy` what it would where the hypothesis is true; by KV head."""

    stale: Stale
    total: torch.Tensor  # [num_kv_heads] float64, on the CPU
    energy: torch.Tensor  # [num_kv_heads]


def best_fit(
    inputs: AttentionInputs, out: torch.Tensor, filters: PageFilter, sequence: int, dequantised: Dequantised
) -> Stale | None:
    """What explains the error of `out` [num_tokens, num_q_heads, head_size_v] in one sequence; None if nothing does
    clearly. Of a hypothesis that some KV heads contradict, those that bear it out are named.
    """
    if filters.block_descale is None or not filters.cached_lens[sequence]:
        return None
    chosen = chosen_rows(inputs, sequence)
    descales = filters.block_descale[list(filters.pages[sequence])]  # [pages, num_kv_heads, 2]
    page_size, cached_len = filters.page_size, filters.cached_lens[sequence]
    known = {_fingerprint(by_key(descales, page_size, cached_len))}
    different = []  # hypotheses that all have other keys scaled by other descales
    for stale in _hypotheses(filters, sequence, descales.shape[1]):
        if (fingerprint := _fingerprint(stale.used(descales, page_size, cached_len))) not in known:
            known.add(fingerprint)
            different.append(stale)
    for most in (FEW_ROWS, len(chosen)):
        looked_at = spread(chosen, most)
        fits = [_by_heads(fit) for fit in _fits(inputs, out, filters, sequence, looked_at, different, dequantised)]
        totals = sorted((float(fit.total.sum()) for fit in fits), reverse=True)
        if fits and totals[0] - max([*totals[1:2], 0.0]) >= CLEARLY:
            return max(fits, key=lambda fit: float(fit.total.sum())).stale
    return None


def _hypotheses(filters: PageFilter, sequence: int, num_kv_heads: int) -> Iterator[Stale]:
    """Those of pages first, all transitions before single ones: of equal ones the first is kept."""
    num_pages = -(-filters.cached_lens[sequence] // filters.page_size)
    tiles = [(None, 0), *((width, 0) for width in WIDTHS if width < filters.page_size)]
    tiles += [(width, width) for width in WIDTHS if 2 * width <= filters.page_size]  # every second tile
    for tensors in TENSORS:
        for step in STEPS:
            slots: list[int | None] = [None, *spread(range(num_pages), MAX_PLACES)]
            for slot in slots:
                yield from (Stale(tensors, NEIGHBOUR, step, width, gap, slot) for width, gap in tiles)
        for step in range(1, min(num_kv_heads, MAX_HEAD_STEPS)):
            yield Stale(tensors, OTHER_HEAD, step)
        yield from (Stale(tensors, source) for source in (FIRST_HEAD, DROPPED, EXCHANGED))


def _fits(
    inputs: AttentionInputs,
    out: torch.Tensor,
    filters: PageFilter,
    sequence: int,
    chosen: list[int],
    hypotheses: list[Stale],
    dequantised: Dequantised,
) -> list[Fit]:
    """The fit of each hypothesis to `chosen` rows, of some KV heads at a time."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    at_once = max(MAX_SCORES // (len(chosen) * group * inputs.seq_lens[sequence]), 1)
    assert filters.block_descale is not None
    descales = filters.block_descale[list(filters.pages[sequence])]
    page_size, cached_len = filters.page_size, filters.cached_lens[sequence]
    own = by_key(descales, page_size, cached_len)
    tables = []
    for first in range(0, inputs.k.shape[1], at_once):
        heads = slice(first, min(first + at_once, inputs.k.shape[1]))
        own_heads = slice(heads.start * group, heads.stop * group)  # query heads
        rows = attention_rows(of_heads(inputs, heads), [sequence], [chosen])
        error = row_errors(rows, out[:, own_heads], filters)[0]  # [heads, L, dv]
        weight = 1 / _noise(rows, row_noise(rows, filters.profile, filters.q_dtype))  # [heads, L, 1]
        queries = inputs.q if inputs.q_cached is None else inputs.q_cached
        q = rows.pick(queries[:, own_heads])[0].double() * inputs.softmax_scale  # [heads, L, head_size]
        squares = []
        for stale in hypotheses:
            used = stale.used(descales, page_size, cached_len)
            keys = struck(own, used)
            k, v = (x[:, heads].double().transpose(0, 1) for x in dequantised(keys, used[keys]))  # [heads, m, d]
            x = change(rows, keys, q @ k.transpose(1, 2), v)
            squares.append(torch.stack(((2 * error * x - x * x), x * x)).mul_(weight).sum((2, 3)))  # [2, heads]
        tables.append(torch.stack(squares))
    table = torch.cat(tables, dim=2).cpu()  # [hypotheses, 2, num_kv_heads]
    return [Fit(stale, *sums) for stale, sums in zip(hypotheses, table, strict=True)]


def _fingerprint(used: torch.Tensor) -> float:
    """The same for equal tensors, and for others another."""
    index = torch.arange(used.numel(), dtype=torch.float64, device=used.device)
    return float(used.flatten().double() @ index.sin_())


def _noise(rows: Rows, noise: RowNoise) -> torch.Tensor:
    """Variance of an element of each row, on average over its dims: float64 [heads, R * group, 1]."""
    cast = noise.weights["cast"][0].double() @ rows.v[0].square().mean(-1, keepdim=True)  # [heads, L, 1]
    return (cast + noise.per_dim[0].double().mean(-1, keepdim=True)).clamp_(min=1e-300)


def _by_heads(fit: Fit) -> Fit:
    """`fit` without the KV heads that contradict it: where its change would show, and does not."""
    shows = fit.energy >= CLEARLY
    against = shows & (fit.total < 0)
    if not bool(against.any()):
        return fit
    heads: Sequence[int] = (shows & ~against).nonzero()[:, 0].tolist()
    kept = torch.zeros_like(shows)
    kept[heads] = True
    return Fit(replace(fit.stale, heads=tuple(heads)), fit.total * kept, fit.energy * kept)
