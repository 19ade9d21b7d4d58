"""Which cases cannot have which fault, and why: decided from the axes alone.

Invariant: an excuse is a reason in words, or None where the case can have the fault; no data are looked at.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.cache.content import Content
from harness.case import Case

SPLIT_TILES = (16, 64)  # keys per tile of a split: kernels give whole tiles to a split

Excuse = Callable[[Case, Content], str | None]  # why a case cannot have the fault, or None


def never(case: Case, content: Content) -> str | None:
    return None


def both(first: Excuse, second: Excuse) -> Excuse:
    return lambda case, content: first(case, content) or second(case, content)


def no_descale(case: Case, content: Content) -> str | None:
    if case.kv_dtype == "auto":
        return "the cache stores the dtype of the case: no descale"
    return "no token is in the cache" if _cached_tokens(case, content) == 0 else None


def no_transition(case: Case, content: Content) -> str | None:
    if case.placement.kind == "explicit" and all(len({*pages}) < 2 for pages in case.placement.pages):
        return "no sequence changes its page"
    return one_page(case, content) if case.descales_per == "page" else "descales are not by page"


def one_head(case: Case, content: Content) -> str | None:
    if case.descales_per == "tensor":
        return "one descale for all heads"
    return "one KV head" if case.num_kv_heads == 1 else None


def one_slot(case: Case, content: Content) -> str | None:
    return None if case.descales_per == "token" else "tokens have no descales of their own"


def no_8_bit_query(case: Case, content: Content) -> str | None:
    return "q has the dtype of the case" if case.q_dtype == "auto" else None


def no_8_bit_output(case: Case, content: Content) -> str | None:
    return "the output has the dtype of the case" if case.out_dtype == "auto" else None


def no_window(case: Case, content: Content) -> str | None:
    if case.sliding_window is None:
        return "no window"
    return "every sequence fits in the window" if case.sliding_window >= max(case.rows.seq_lens) else None


def no_sink_tokens(case: Case, content: Content) -> str | None:
    return "no sink tokens" if case.sink_tokens == 0 else no_window(case, content)


def one_page(case: Case, content: Content) -> str | None:
    return "no sequence has two cached pages" if _cached_tokens(case, content) <= case.page_size else None


def one_mapping(case: Case, content: Content) -> str | None:
    if case.num_kv_heads == 1:
        return "one KV head"
    return "one query head per KV head" if case.gqa_ratio == 1 else None


def whole_heads(case: Case, content: Content) -> str | None:
    whole = all(size == power_of_two_below(size) for size in (case.head_size, case.value_size))
    return "head sizes are powers of two" if whole else None


def one_split(case: Case, content: Content) -> str | None:
    if case.num_splits in (None, 1):
        return "the path without split-KV" if case.num_splits is None else "one split"
    return "one split has all keys" if max(case.rows.seq_lens) <= max(SPLIT_TILES) else None


def power_of_two_below(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << (size.bit_length() - 1)


def _cached_tokens(case: Case, content: Content) -> int:
    rows = zip(case.rows.query_lens, case.rows.context_lens, strict=True)
    return max(content.cached_len(query_len, context_len) for query_len, context_len in rows)
