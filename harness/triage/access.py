"""What the access oracle found, in words: which token, which program, which line.

Invariant: two lines per finding, what and who; every number is one of the finding's.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.oracle.findings import AccessFinding
from harness.triage.wording import compact, count

MAX_TOLD = 6

_NOUNS = {
    "k_cache": "K", "v_cache": "V", "k": "new K", "v": "new V", "kv_block_descale": "descales", "out": "out",
    "k_token_descale": "K descale", "v_token_descale": "V descale", "k_scale": "K descale", "v_scale": "V descale",
}  # fmt: skip
_PLACES = {"kv_block_descale": "page slot", "block_table": "entry", "kv_page_indices": "entry", "out": "token"}
_TABLES = ("block_table", "kv_page_indices")
_KINDS = {
    "never_read": ("never read", "which {tokens} must see"),
    "behind_end": ("read too far", "behind its last cached token"),
    "out_of_window": ("read, though dead", "on a page that has left the window"),
    "other_head": ("read from another head", ""),
    "other_sequence": ("read from another sequence", ""),
    "not_handed_over": ("read, though not handed over", ""),
    "unused_page": ("read from an unused page", ""),
    "gap": ("read where no element lies", ""),
    "packed": ("read as if contiguous", "whose strides are others"),
    "never_stored": ("never stored", ""),
}


def tell_accesses(found: Sequence[AccessFinding]) -> list[str]:
    """Lines for `found`, the first findings one by one."""
    lines = [text for one in found[:MAX_TOLD] for text in (_what(one), _who(one))]
    left = len(found) - MAX_TOLD
    return lines + ([f"and {count(left, 'kind')} of access more"] if left > 0 else [])


def _what(one: AccessFinding) -> str:
    kind, note = _KINDS[one.kind]
    if one.buffers[0] in _TABLES and one.kind == "behind_end":
        note = "behind its last page"
    text = f"{kind}: {_noun(one)}"
    if "{tokens}" in note:
        note = note.format(tokens=_tokens(one))
    return f"{text}, {note}" if note else text


def _noun(one: AccessFinding) -> str:
    """The memory: buffer, place, physical place, owner."""
    name = "page table" if one.buffers[0] in _TABLES else " and ".join(_NOUNS[buffer] for buffer in one.buffers)
    if one.kind in ("gap", "packed"):
        return name
    if one.dims:
        name = f"{'dim' if len(one.dims) == 1 else 'dims'} {compact(one.dims)} of {name}"
    head = [] if one.kv_head is None else [f"kv head {one.kv_head}"]
    if one.sequence is None:
        page = [] if one.page is None else [f"page {one.page}" + ("" if one.slot is None else f", slot {one.slot}")]
        return f"{name} of {', '.join(page + head)}" if page or head else name
    physical = "" if one.page is None else f" (page {one.page}"
    physical += "" if not physical else ")" if one.slot is None else f", slot {one.slot})"
    owner = " of ".join([*head, f"sequence {one.sequence}"])
    if name == "page table":
        return f"{name} {_span(one)} of {owner}"
    return f"{name} of {_span(one)}{physical}, {owner}"


def _span(one: AccessFinding) -> str:
    place = _PLACES.get(one.buffers[0], "position")
    many = "entries" if place == "entry" else f"{place}s"
    if one.count == 1:
        return f"{place} {one.first}"
    if one.count == one.last - one.first + 1:
        return f"{many} {one.first}..{one.last}"
    return f"{one.count} {many} in {one.first}..{one.last}"


def _tokens(one: AccessFinding) -> str:
    first, last = one.tokens[0], one.tokens[-1]
    return f"token {first}" if first == last else f"tokens {first}..{last}"


def _who(one: AccessFinding) -> str:
    more = f"; {one.others:,} like it" if one.others else ""
    if one.program is None:
        return "by no program" + more
    storing = f", storing {_tokens(one)}" if one.tokens and one.kind != "never_read" else ""
    at = f", {one.where}" if one.where else ", which reads nothing of it"
    return f"by program {one.program} of {one.kernel}{storing}{at}{more}"
