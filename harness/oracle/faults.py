"""Fault models: what attention kernels really get wrong, each as one small change to a scene.

Invariant: a fault changes one thing and returns the exact outcome of a kernel with that fault in float64; None where
this sequence cannot have it. Variants of a fault (directions, places) are told apart, so that the weakest can count.

Exchanging two pages that are seen whole changes no attention (softmax does not ask for an order), so the fault of pages
is a page that is read from its neighbour's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from harness.cache.content import Content
from harness.case import Case
from harness.oracle.payload_faults import (
    ENCODINGS,
    OTHER_HEADS,
    OTHER_SLOTS,
    Change,
    no_8_bit_output,
    no_8_bit_query,
    one_head,
    one_slot,
    output_scale_dropped,
    q_descale_dropped,
)
from harness.oracle.scene import PLACES, Outcome, Rows, Scene, per_head, seen_at
from harness.oracle.stale import NEIGHBOUR, STEPS, Stale

GAIN = 1.02  # of the faults that scale: about what the descales of two neighbouring pages differ by
STALE_TILE = 64  # keys per tile that has the descale of a neighbouring page
SPLIT_TILES = (16, 64)  # keys per tile of a split: kernels give whole tiles to a split

Excuse = Callable[[Case, Content], str | None]  # why a case cannot have the fault, or None


@dataclass(frozen=True)
class Fault:
    """`variants` by label; a case sees the fault as well as it sees the weakest of them.

    A `graded` fault has a size of its own (a gain of 2 %): to be sure to see just that size is all that can be asked,
    as bfloat16 output alone rounds by 0.4 %.
    """

    name: str
    excuse: Excuse
    variants: Mapping[str, Change]
    advice: str  # which axis values show the fault better
    graded: bool = False


def _output_zero(scene: Scene) -> Outcome:
    return Outcome(torch.zeros_like(scene.right.out), None)


def _mean_v(scene: Scene) -> Outcome:
    plain = replace(scene.rows, dots=torch.zeros_like(scene.rows.dots), slopes=None, sinks=None)
    return Outcome(plain.outcome().out, None)


def _newest_token(decodes: bool) -> Change:
    def change(scene: Scene) -> Rows | None:
        if scene.decodes is not decodes:
            return None
        seen = scene.rows.seen.clone()
        seen[:, -1] = False
        return replace(scene.rows, seen=seen)

    return change


def _window(step: int) -> Change:
    def change(scene: Scene) -> Rows | None:
        case, window = scene.case, scene.case.sliding_window
        if window is None or window >= scene.seq_len:
            return None
        if scene.seq_len - window - (step > 0) < case.sink_tokens:
            return None  # the key at the edge is a sink token, even of the newest row
        return replace(scene.rows, seen=seen_at(scene.rows.distance, case.causal, window + step, case.sink_tokens))

    return change


def _causal(step: int) -> Change:
    def change(scene: Scene) -> Rows | None:
        if not scene.case.causal or (step > 0 and scene.query_len == 1):
            return None  # behind the newest token there is none
        case = scene.case
        seen = seen_at(scene.rows.distance, True, case.sliding_window, case.sink_tokens, ahead=step)
        return replace(scene.rows, seen=seen)

    return change


def _sink_tokens(kept: Callable[[int], int]) -> Change:
    def change(scene: Scene) -> Rows | None:
        case = scene.case
        left_behind = 0 if case.sliding_window is None else scene.seq_len - case.sliding_window
        wrong = kept(case.sink_tokens)
        if left_behind <= min(case.sink_tokens, wrong):
            return None  # what differs is in the window of every row
        return replace(scene.rows, seen=seen_at(scene.rows.distance, case.causal, case.sliding_window, wrong))

    return change


def _page_swap(place: Callable[[Sequence[int]], int]) -> Change:
    def change(scene: Scene) -> Rows | None:
        pages = scene.cached_pages
        if not pages or scene.cached_len <= scene.case.page_size:
            return None
        page = place(pages)
        there, source = scene.slots(page), scene.slots(page - 1 if page else page + 1)
        count = there.stop - there.start
        if source.stop - source.start < count:
            return None  # what lies behind the newest token is poison: read in place of a token, it is never quiet
        dots, v = scene.rows.dots.clone(), scene.rows.v.clone()
        dots[..., there] = scene.rows.dots[..., source.start : source.start + count]
        v[:, there] = scene.rows.v[:, source.start : source.start + count]
        return replace(scene.rows, dots=dots, v=v)

    return change


def _under_one_descale(scene: Scene, place: Callable[[Sequence[int]], int]) -> slice | None:
    """Cached tokens whose descale is wrong where one is: a page, but all tokens where a head has one descale."""
    if not scene.cached_pages:
        return None
    return slice(0, scene.cached_len) if scene.case.descales_per == "head" else scene.slots(place(scene.cached_pages))


def _k_descale(place: Callable[[Sequence[int]], int]) -> Change:
    def change(scene: Scene) -> Rows | None:
        slots = _under_one_descale(scene, place)
        if slots is None:
            return None
        dots = scene.rows.dots.clone()
        dots[..., slots] *= GAIN
        return replace(scene.rows, dots=dots)

    return change


def _v_descale(place: Callable[[Sequence[int]], int]) -> Change:
    def change(scene: Scene) -> Rows | None:
        slots = _under_one_descale(scene, place)
        if slots is None:
            return None
        v = scene.rows.v.clone()
        v[:, slots] *= GAIN
        return replace(scene.rows, v=v)

    return change


def _k_scale_dropped(scene: Scene) -> Rows | None:
    if not scene.cached_pages:
        return None
    dots = scene.rows.dots.clone()
    cached = scene.dots(scene.key_payload[: scene.cached_len], scene.kv_heads)
    dots[..., : scene.cached_len] = cached
    return replace(scene.rows, dots=dots)


def _v_scale_dropped(scene: Scene) -> Rows | None:
    if not scene.cached_pages:
        return None
    v = scene.rows.v.clone()
    v[:, : scene.cached_len] = per_head(scene.value_payload[: scene.cached_len], scene.kv_heads)
    return replace(scene.rows, v=v)


def _stale_descale(tensors: str, step: int) -> Change:
    """A tile beside each page transition is scaled as the page on the other side."""

    def change(scene: Scene) -> Rows | None:
        if scene.cached_len <= scene.case.page_size:
            return None
        size = scene.case.page_size
        own = torch.cat((scene.k_descale, scene.v_descale), dim=2)[: scene.cached_len]  # [cached_len, num_kv_heads, 2]
        used = Stale(tensors, NEIGHBOUR, step, min(STALE_TILE, size)).used(own[::size], size, len(own))
        gains = (used.double() / own.double())[:, scene.kv_heads]  # [cached_len, heads, 2]
        dots, v = scene.rows.dots.clone(), scene.rows.v.clone()
        dots[..., : len(own)] *= gains[..., 0].T[:, None]
        v[:, : len(own)] *= gains[..., 1].T[..., None]
        return replace(scene.rows, dots=dots, v=v)

    return change


def _softmax_scale(scene: Scene) -> Rows:
    return replace(scene.rows, dots=scene.rows.dots * GAIN)


def _gqa_mapping(scene: Scene) -> Rows:
    modulo = [head % scene.case.num_kv_heads for head in scene.q_heads]
    return replace(scene.rows, dots=scene.dots(scene.k, modulo), v=per_head(scene.v, modulo))


def _sink_dropped(scene: Scene) -> Rows:
    return replace(scene.rows, sinks=None)


def _sink_twice(scene: Scene) -> Rows | None:
    sinks = scene.rows.sinks
    return None if sinks is None else replace(scene.rows, sinks=torch.logaddexp(sinks, sinks))


def _soft_cap(scene: Scene) -> Rows:
    return replace(scene.rows, soft_cap=None)


def _alibi(scene: Scene) -> Rows:
    return replace(scene.rows, slopes=None)


def power_of_two_below(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << (size.bit_length() - 1)


def _query_tail(scene: Scene) -> Rows | None:
    kept = power_of_two_below(scene.case.head_size)
    if kept == scene.case.head_size:
        return None
    return replace(scene.rows, dots=scene.dots(scene.k, scene.kv_heads, kept))


def _value_tail(scene: Scene) -> Outcome | None:
    kept = power_of_two_below(scene.case.value_size)
    if kept == scene.case.value_size:
        return None
    out = scene.right.out.clone()
    out[..., kept:] = 0
    return Outcome(out, None)


def _split_weight(tile: int) -> Change:
    """The normalised results of the splits averaged evenly, whatever their share of the mass."""

    def change(scene: Scene) -> Outcome | None:
        num_splits, num_tiles = scene.case.num_splits or 1, -(-scene.seq_len // tile)
        owned = -(-num_tiles // num_splits) * tile  # keys of a split
        if owned >= scene.seq_len:
            return None
        if not any(last // owned > first // owned for first, last in scene.seen_spans()):
            return None  # no row has keys in two splits
        part = torch.arange(scene.seq_len, device=scene.q.device) // owned  # [keys]
        p, _ = scene.rows.weights
        one_hot = torch.nn.functional.one_hot(part, -(-scene.seq_len // owned)).double()  # [keys, parts]
        mass = p @ one_hot  # [heads, rows, parts]
        parts = (scene.rows.seen.double() @ one_hot > 0).sum(-1)[..., None]  # [rows, 1] with keys
        share = mass.sum(-1, keepdim=True) / parts.clamp(min=1) / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        return Outcome((p * share[..., part]) @ scene.rows.v, None)

    return change


def _never(case: Case, content: Content) -> str | None:
    return None


def _cached_tokens(case: Case, content: Content) -> int:
    rows = zip(case.rows.query_lens, case.rows.context_lens, strict=True)
    return max(content.cached_len(query_len, context_len) for query_len, context_len in rows)


def _no_descale(case: Case, content: Content) -> str | None:
    if case.kv_dtype == "auto":
        return "the cache stores the dtype of the case: no descale"
    return "no token is in the cache" if _cached_tokens(case, content) == 0 else None


def _no_transition(case: Case, content: Content) -> str | None:
    if case.placement.kind == "explicit" and all(len({*pages}) < 2 for pages in case.placement.pages):
        return "no sequence changes its page"
    return _one_page(case, content) if case.descales_per == "page" else "descales are not by page"


def _both(first: Excuse, second: Excuse) -> Excuse:
    return lambda case, content: first(case, content) or second(case, content)


def _no_window(case: Case, content: Content) -> str | None:
    if case.sliding_window is None:
        return "no window"
    return "every sequence fits in the window" if case.sliding_window >= max(case.rows.seq_lens) else None


def _no_sink_tokens(case: Case, content: Content) -> str | None:
    return "no sink tokens" if case.sink_tokens == 0 else _no_window(case, content)


def _one_page(case: Case, content: Content) -> str | None:
    return "no sequence has two cached pages" if _cached_tokens(case, content) <= case.page_size else None


def _one_mapping(case: Case, content: Content) -> str | None:
    if case.num_kv_heads == 1:
        return "one KV head"
    return "one query head per KV head" if case.gqa_ratio == 1 else None


def _whole_heads(case: Case, content: Content) -> str | None:
    whole = all(size == power_of_two_below(size) for size in (case.head_size, case.value_size))
    return "head sizes are powers of two" if whole else None


def _one_split(case: Case, content: Content) -> str | None:
    if case.num_splits in (None, 1):
        return "the path without split-KV" if case.num_splits is None else "one split"
    return "one split has all keys" if max(case.rows.seq_lens) <= max(SPLIT_TILES) else None


def stale_label(tensors: str, step: int) -> str:
    """The variant of stale_descale in which tiles have the descale of the page `step` away."""
    return f"of {tensors}, one tile {'early' if step > 0 else 'late'}"


def _at_places(change: Callable[[Callable[[Sequence[int]], int]], Change]) -> dict[str, Change]:
    return {label: change(place) for label, place in PLACES.items()}


_SHORTER = "shorter rows, or data: probe"
_FEWER_PAGES = "fewer pages: shorter rows or a larger page_size"

FAULT_MODELS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("output_zero", _never, {"": _output_zero}, "values far above the tolerance: data: normal"),
        Fault("mean_v", _never, {"": _mean_v}, "scores that differ: data: probe"),
        Fault(
            "newest_token",
            _never,
            {"in decode rows": _newest_token(True), "in prefill rows": _newest_token(False)},
            _SHORTER,
        ),
        Fault(
            "window_edges",
            _no_window,
            {"one key more": _window(1), "one key less": _window(-1)},
            "a smaller sliding_window, or data: probe",
        ),
        Fault(
            "causal_edge",
            lambda case, content: None if case.causal else "no causal mask",
            {"one key more": _causal(1), "one key less": _causal(-1)},
            _SHORTER,
        ),
        Fault(
            "sink_tokens",
            _no_sink_tokens,
            {
                "dropped": _sink_tokens(lambda number: 0),
                "one more": _sink_tokens(lambda number: number + 1),
                "one less": _sink_tokens(lambda number: number - 1),
            },
            "fewer sink_tokens or a smaller sliding_window, or data: probe",
        ),
        Fault("page_swap", _one_page, _at_places(_page_swap), _FEWER_PAGES),
        Fault("k_descale", _no_descale, _at_places(_k_descale), _FEWER_PAGES, graded=True),
        Fault("v_descale", _no_descale, _at_places(_v_descale), _FEWER_PAGES, graded=True),
        Fault("scale_dropped", _no_descale, {"of K": _k_scale_dropped, "of V": _v_scale_dropped}, "descales: loud"),
        Fault(
            "stale_descale",
            _no_transition,
            {stale_label(tensors, step): _stale_descale(tensors, step) for tensors in ("K", "V") for step in STEPS},
            "descales: loud, or more query heads",
            graded=True,
        ),
        Fault(
            "descale_head",
            _both(_no_descale, one_head),
            OTHER_HEADS,
            "descales: loud",
        ),
        Fault("descale_slot", _both(_no_descale, one_slot), OTHER_SLOTS, "descales: loud, or shorter rows"),
        Fault("encoding", _no_descale, ENCODINGS, "values far above the tolerance: data: normal"),
        Fault("q_descale", no_8_bit_query, {"": q_descale_dropped}, "scores that differ: data: normal"),
        Fault("output_scale", no_8_bit_output, {"": output_scale_dropped}, "data: normal"),
        Fault("softmax_scale", _never, {"": _softmax_scale}, "scores that differ: data: probe", graded=True),
        Fault("gqa_mapping", _one_mapping, {"": _gqa_mapping}, "values that differ by head: data: normal"),
        Fault(
            "sink",
            lambda case, content: None if case.sinks else "no sinks",
            {"dropped": _sink_dropped, "counted twice": _sink_twice},
            "sinks near the LSE of a row: data: normal",
        ),
        Fault(
            "soft_cap",
            lambda case, content: "no soft cap" if case.logits_soft_cap is None else None,
            {"": _soft_cap},
            "a smaller logits_soft_cap",
        ),
        Fault(
            "alibi",
            lambda case, content: None if case.alibi else "no ALiBi",
            {"": _alibi},
            "longer rows, or data: normal",
        ),
        Fault("head_dim_tail", _whole_heads, {"of Q and K": _query_tail, "of V": _value_tail}, "scores that differ"),
        Fault(
            "split_weight",
            _one_split,
            {f"tiles of {tile} keys": _split_weight(tile) for tile in SPLIT_TILES},
            "splits of unequal mass: data: normal, fewer splits",
        ),
    )
}
