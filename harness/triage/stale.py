"""An exchange of descales in words: which keys behave as scaled by whose descale, and how such a thing happens.

Invariant: every page, key and factor said is one of the hypothesis, which the output has borne out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.case import Case
from harness.oracle.stale import DROPPED, EXCHANGED, FIRST_HEAD, NEIGHBOUR, Stale
from harness.problem.spans import key_start
from harness.triage.wording import compact

Factors = Mapping[str, tuple[float, float]]  # by "K", "V": the least and the largest factor on a descale


def tell_stale(
    case: Case,
    stale: Stale,
    pages: Sequence[Sequence[int]],
    cached_lens: Sequence[int],
    factors: Factors,
    first_key: int,
) -> list[str]:
    """One sentence. `pages` of each sequence, physical, and how many of its keys lie in them; `first_key` is the first
    packed key with another descale.
    """
    starts = key_start(case.rows)
    sequence = next(seq for seq in range(case.rows.num_seqs) if first_key < starts[seq + 1])
    position = first_key - starts[sequence]
    what = f"{stale.tensors} descale{'s' if ' ' in stale.tensors else ''}"
    if stale.source == NEIGHBOUR:
        said = _neighbour(case, stale, sequence, position, pages[sequence], cached_lens[sequence], factors, what)
    else:
        said = f"{what}: {_everywhere(stale, factors)}"
    heads = "" if stale.heads is None else f"; of kv head{'s' * (len(stale.heads) > 1)} {compact(stale.heads)} only"
    of = "" if stale.sequence is None or case.rows.num_seqs == 1 else f"; in sequence {stale.sequence} only"
    return [said + heads + of]


def _neighbour(
    case: Case,
    stale: Stale,
    sequence: int,
    position: int,
    pages: Sequence[int],
    cached_len: int,
    factors: Factors,
    what: str,
) -> str:
    slot = position // case.page_size
    page, other = pages[slot], pages[slot + stale.step]
    end = min((slot + 1) * case.page_size, cached_len)
    which, transition = ("next", f"{page} -> {other}") if stale.step > 0 else ("previous", f"{other} -> {page}")
    part, how = "all", "instead of the page's own"
    if stale.num_keys is not None:
        end = min(end, position + stale.num_keys)
        edge, when = ("last", "early") if stale.step > 0 else ("first", "late")
        part = f"{end - position} of the {edge} {2 * stale.num_keys}" if stale.gap else f"the {edge} {end - position}"
        how = f"used {'two tiles' if stale.gap else 'one tile'} {when}"
    keys = f"keys {position}-{end - 1} of sequence {sequence} ({part} of page {page})"
    more = (
        "" if stale.slot is not None or cached_len <= 2 * case.page_size else ", and likewise at every page transition,"
    )
    return (
        f"{what}: {keys}{more} behave as scaled by {_sizes(factors)}, the ratio of the {what} of page {other} and page "
        f"{page}: descale of the {which} page {how} (page transition {transition})"
    )


def _everywhere(stale: Stale, factors: Factors) -> str:
    if stale.source == DROPPED:
        return f"all keys behave as scaled by {_sizes(factors)}, as with a descale of 1: descale not applied"
    if stale.source == EXCHANGED:
        return f"all keys behave as scaled by {_sizes(factors)}, as with the descale of the other of K and V"
    whose = "of kv head 0" if stale.source == FIRST_HEAD else f"of the kv head {stale.step} further on"
    return f"all keys behave as scaled by {_sizes(factors)}, as with the descale {whose}: descale of another head"


def _sizes(factors: Factors) -> str:
    """ "1.017", "0.991 to 1.017", "1.017 (K) and 0.991 (V)"."""
    texts = []
    for which, (least, largest) in factors.items():
        low, high = f"{least:.4g}", f"{largest:.4g}"
        of = f" ({which})" if len(factors) > 1 else ""
        texts.append((low if low == high else f"{low} to {high}") + of)
    return " and ".join(texts)
