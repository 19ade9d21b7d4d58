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

from harness.oracle.descale_faults import DROPPED, GAIN, K_DESCALES, OTHER_HEADS, OTHER_SLOTS, STALE, V_DESCALES
from harness.oracle.excuses import (
    SPLIT_TILES,
    Excuse,
    both,
    never,
    no_8_bit_output,
    no_8_bit_query,
    no_descale,
    no_sink_tokens,
    no_transition,
    no_window,
    one_head,
    one_mapping,
    one_page,
    one_slot,
    one_split,
    power_of_two_below,
    whole_heads,
)
from harness.oracle.payload_faults import ENCODINGS, Change, output_scale_dropped, q_descale_dropped
from harness.oracle.scene import PLACES, Outcome, Rows, Scene, per_head, seen_at


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


_SHORTER = "shorter rows, or data: probe"
_FEWER_PAGES = "fewer pages: shorter rows or a larger page_size"

FAULT_MODELS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("output_zero", never, {"": _output_zero}, "values far above the tolerance: data: normal"),
        Fault("mean_v", never, {"": _mean_v}, "scores that differ: data: probe"),
        Fault(
            "newest_token",
            never,
            {"in decode rows": _newest_token(True), "in prefill rows": _newest_token(False)},
            _SHORTER,
        ),
        Fault(
            "window_edges",
            no_window,
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
            no_sink_tokens,
            {
                "dropped": _sink_tokens(lambda number: 0),
                "one more": _sink_tokens(lambda number: number + 1),
                "one less": _sink_tokens(lambda number: number - 1),
            },
            "fewer sink_tokens or a smaller sliding_window, or data: probe",
        ),
        Fault("page_swap", one_page, {label: _page_swap(place) for label, place in PLACES.items()}, _FEWER_PAGES),
        Fault("k_descale", no_descale, K_DESCALES, _FEWER_PAGES, graded=True),
        Fault("v_descale", no_descale, V_DESCALES, _FEWER_PAGES, graded=True),
        Fault("scale_dropped", no_descale, DROPPED, "descales: loud"),
        Fault("stale_descale", no_transition, STALE, "descales: loud, or more query heads", graded=True),
        Fault("descale_head", both(no_descale, one_head), OTHER_HEADS, "descales: loud"),
        Fault("descale_slot", both(no_descale, one_slot), OTHER_SLOTS, "descales: loud, or shorter rows"),
        Fault("encoding", no_descale, ENCODINGS, "values far above the tolerance: data: normal"),
        Fault("q_descale", no_8_bit_query, {"": q_descale_dropped}, "scores that differ: data: normal"),
        Fault("output_scale", no_8_bit_output, {"": output_scale_dropped}, "data: normal"),
        Fault("softmax_scale", never, {"": _softmax_scale}, "scores that differ: data: probe", graded=True),
        Fault("gqa_mapping", one_mapping, {"": _gqa_mapping}, "values that differ by head: data: normal"),
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
        Fault("head_dim_tail", whole_heads, {"of Q and K": _query_tail, "of V": _value_tail}, "scores that differ"),
        Fault(
            "split_weight",
            one_split,
            {f"tiles of {tile} keys": _split_weight(tile) for tile in SPLIT_TILES},
            "splits of unequal mass: data: normal, fewer splits",
        ),
    )
}
