"""What matched filters and the hull found, in words.

Invariant: every number said is one that was found; a cause is named as what it looks like, never as what it is.
"""

from __future__ import annotations

from harness.case import Case
from harness.oracle import gains
from harness.oracle.gains import Gain, GainFindings, HullFindings
from harness.triage.wording import count, number

MAX_LINES = 3  # gains told one by one

_LOOKS_LIKE = {
    gains.TOKEN_WEIGHT: {-1: "one token is not read", 1: "one token counts twice"},
    gains.TOKEN_ZERO: {1: "one token is read as zeros"},
    gains.TOKEN_VALUE: {1: "one token has other values than were stored"},
    gains.OLDEST_WEIGHT: {-1: "the oldest key each query should see is not read (left edge of the window)"},
    gains.NEWEST_WEIGHT: {-1: "the newest key each query should see is not read"},
    gains.BEYOND_OLDEST: {1: "one key too many is read at the left edge of the window"},
    gains.SINK_TOKENS: {-1: "the leading tokens that a window must not hide (sink_tokens) are not read"},
    gains.BEYOND_SINKS: {1: "one key too many is read behind the sink tokens"},
    gains.BEYOND_NEWEST: {1: "one key behind the query is read (causal edge)"},
    gains.PAGE_WEIGHT: {-1: "one page is not read", 1: "one page counts twice"},
    gains.HEAD_MODULO: {1: "kv head = q head % num_kv_heads, instead of q head // gqa_ratio"},
    gains.HEAD_SHIFT: {1: "queries are matched with another kv head"},
    gains.SPLIT_WEIGHT: {-1: "one split is lost in the merge"},
    gains.SPLIT_AVERAGE: {1: "splits are merged with equal weights"},
}
_CLOSE = 0.1  # of a whole effect: what "not read" or "twice" may be off by
_OR_OTHERS = ", or other tokens in their place"  # where a cache has no descales that could be wrong


def tell_gains(case: Case, found: GainFindings) -> dict[str, list[str]]:
    """Rows "token/page" and "looks like"; empty where nothing was found."""
    told = [found.source, *found.gains[:MAX_LINES]] if found.source else list(found.gains[:MAX_LINES])
    lines = list(dict.fromkeys(_line(case, gain) for gain in told if gain is not None))
    if not lines:
        return {}
    more = found.num_gains - MAX_LINES
    if more > 0:
        lines.append(f"and {count(more, 'more gain')} above the limit")
    rows = {"token/page": lines}
    best = found.best
    if best is not None and (cause := _cause(case, best, found)):
        rows["looks like"] = [cause]
    return rows


def tell_hull(found: HullFindings) -> list[str]:
    """The row "hull"; empty where nothing lies outside."""
    if not found.num_outside:
        return []
    where = f"token {found.token}, head {found.head}, dim {found.dim}"
    span = f"{number(found.low)} to {number(found.high)}"
    return [
        f"{count(found.num_outside, 'element')} outside the range of the values attended to",
        f"{where}: got {number(found.got)}, the values lie within {span}",
    ]


def gain_summary(case: Case, found: GainFindings) -> str:
    """One line for a failure that only tier 2 sees."""
    return "" if found.best is None else _line(case, found.best)


def _line(case: Case, gain: Gain) -> str:
    if gain.kind in (gains.K_STALE, gains.V_STALE):
        return f"{_stale(gain)}, {_where(case, gain)}: {gain.estimate * 100:.0f} % of that (z {gain.z:.0f})"
    size = f"x{1 + gain.estimate:.4f}" if gain.kind in (gains.K_DESCALE, gains.V_DESCALE) else _percent(gain.estimate)
    return f"{_what(gain)}, {_where(case, gain)}: {size} (z {gain.z:.0f})"


def _what(gain: Gain) -> str:
    if gain.kind in (gains.K_DESCALE, gains.V_DESCALE):
        return f"{gain.kind[0]} of {'every page' if gain.slot is None else _page(gain)}"
    if gain.kind == gains.PAGE_WEIGHT:
        return f"weight of {_page(gain)}"
    if gain.position is not None and gain.kind != gains.ROW_GAIN:
        in_page = f" ({_page(gain)})" if gain.page is not None else ""
        return f"{gain.kind} {gain.position}{in_page}"
    if gain.kind == gains.ROW_GAIN:
        return f"row at position {gain.position}"
    if gain.split is not None:
        return f"{gain.kind} {gain.split}"
    return gain.kind if gain.other_head is None else f"kv head {gain.other_head} read"


def _stale(gain: Gain) -> str:
    edge, neighbour = ("last", "next") if (gain.step or 0) > 0 else ("first", "previous")
    on = "each page" if gain.slot is None else _page(gain)
    whose = f"the {neighbour} page" if gain.other_page is None else f"page {gain.other_page}"
    return f"{gain.kind.split()[1]} of the {edge} {gain.num_keys} keys of {on} as scaled by {whose}"


def _page(gain: Gain) -> str:
    return f"page {gain.page} (slot {gain.slot})"


def _where(case: Case, gain: Gain) -> str:
    sequence = "all sequences" if gain.sequence is None else f"sequence {gain.sequence}"
    return sequence if gain.kv_head is None or case.num_kv_heads == 1 else f"{sequence}, kv head {gain.kv_head}"


def _cause(case: Case, best: Gain, found: GainFindings) -> str:
    for effect, cause in _LOOKS_LIKE.get(best.kind, {}).items():
        if abs(best.estimate - effect) < _CLOSE:
            return cause
    if best.kind not in (gains.K_DESCALE, gains.V_DESCALE):
        return ""
    descale = case.kv_dtype != "auto"
    if best.slot is None:
        heads = {gain.kv_head for gain in found.gains if gain.sequence is None and gain.kind == best.kind}
        everywhere = len(heads) == case.num_kv_heads
        if best.kind == gains.K_DESCALE:
            whole, one = ("softmax scale or K descale", "K descale") if descale else ("softmax scale", "softmax scale")
        else:
            whole, one = ("V descale or output gain", "V descale or row sum") if descale else ("output gain", "row sum")
        return f"a wrong {whole}" if everywhere else f"a wrong {one} of that kv head{'' if descale else _OR_OTHERS}"
    if best.kind == gains.V_DESCALE and abs(best.estimate + 1) < _CLOSE:
        return "the values of that page are not read, or others in their place"
    return (
        f"a wrong {best.kind} of that page" if descale else f"a wrong gain on {best.kind[0]} of that page{_OR_OTHERS}"
    )


def _percent(effect: float) -> str:
    return f"{effect * 100:+.3g} %"
