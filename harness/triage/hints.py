"""Observations that stand out in a pattern, one per sentence.

Invariant: each is true of the masks, element for element, and said only where the case could have shown the
opposite (a batch without prefill rows gives no "only decode rows").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.cache.content import is_decode
from harness.case import Case
from harness.oracle.findings import Findings, TensorFindings
from harness.triage.pattern import Pattern
from harness.triage.place import places
from harness.triage.wording import compact, count

QUERY_TILES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Hint:
    key: str  # stable name, for telling patterns apart
    text: str


def find_hints(case: Case, found: TensorFindings, pattern: Pattern) -> list[Hint]:
    """Observations about one tensor that has wrong elements."""
    return [*_values(found), *_tokens(case, pattern), *_heads(case, pattern), *_dims(pattern)]


def merge_hints(by_tensor: Mapping[str, Sequence[Hint]]) -> list[Hint]:
    """The hints of all tensors that are wrong, each once: what holds of one of them only says of which.

    A hint about out needs no name where nothing else is wrong.
    """
    merged: list[Hint] = []
    for name, hints in by_tensor.items():
        for hint in hints:
            everywhere = all(hint in others for others in by_tensor.values())
            if (everywhere and len(by_tensor) > 1) or [*by_tensor] == ["out"]:
                merged += [hint] if hint not in merged else []
            else:
                merged.append(Hint(f"{name}.{hint.key}", f"{name}: {hint.text}"))
    return merged


def compare_tensors(findings: Findings) -> list[Hint]:
    """What the output and its LSE say about each other."""
    by_name = {t.name: t for t in findings.tensors}
    if "out" not in by_name or "lse" not in by_name:
        return []
    out, lse = by_name["out"].num_mismatched, by_name["lse"].num_mismatched
    if out and not lse:
        return [Hint("lse_right", "the LSE is within its tolerance everywhere")]
    if lse and not out:
        return [Hint("only_lse", "only the LSE is wrong, the output is within its tolerance everywhere")]
    return []


def _values(found: TensorFindings) -> list[Hint]:
    for key, amount, what in (
        ("unwritten", found.num_unwritten, "was never written"),
        ("nan", found.num_nan, "is NaN"),
        ("inf", found.num_inf, "is infinite"),
        ("zero", found.num_zero, "is exactly 0"),
    ):
        if amount == found.num_mismatched:
            return [Hint(key, f"every wrong element {what}")]
    return []


def _tokens(case: Case, pattern: Pattern) -> list[Hint]:
    if pattern.whole(0):
        everything = pattern.exact and all(pattern.whole(axis) for axis in (1, 2))
        return [Hint("everything", "every element is wrong")] if everything else []
    hints = []
    rows = case.rows
    decode = sum(is_decode(q) for q in rows.query_lens)
    prefill = sum(q > 1 for q in rows.query_lens)
    wrong_decode = sum(part.phase == "decode" for part in pattern.parts)
    wrong_prefill = len(pattern.parts) - wrong_decode
    if wrong_decode and not wrong_prefill and prefill:
        hints.append(Hint("only_decode", f"only decode rows are wrong: {wrong_decode} of {decode}"))
    if wrong_prefill and not wrong_decode and decode:
        hints.append(Hint("only_prefill", f"only prefill rows are wrong: {wrong_prefill} of {prefill}"))
    if len(pattern.parts) == 1 and rows.num_seqs > 1:
        hints.append(Hint("one_sequence", f"only sequence {pattern.parts[0].sequence} is wrong"))
    return hints + (_newest(pattern) or _tile(pattern) or _position_threshold(case, pattern))


def _newest(pattern: Pattern) -> list[Hint]:
    """Only the last query of each wrong row, some of which have more than one."""
    longer = any(part.query_len > 1 for part in pattern.parts)
    if longer and all(part.indices == (part.query_len - 1,) for part in pattern.parts):
        return [Hint("newest_query", "only the last query of each wrong sequence")]
    return []


def _tile(pattern: Pattern) -> list[Hint]:
    """Exactly the queries behind the last full tile of each wrong row; the tile sizes for which that is so."""
    tiles = [
        tile
        for tile in QUERY_TILES
        if any(part.query_len > tile for part in pattern.parts)
        and all(part.indices == tuple(range(part.query_len // tile * tile, part.query_len)) for part in pattern.parts)
    ]
    if not tiles:
        return []
    sizes = " or ".join(str(tile) for tile in tiles)
    return [Hint("last_tile", f"exactly the queries of the last, partial tile of {sizes} queries")]


def _position_threshold(case: Case, pattern: Pattern) -> list[Hint]:
    """Every query from some position on and none before it, or the other way round."""
    all_positions = [p.position for p in places(case.rows, range(case.rows.num_tokens))]  # [num_tokens]
    wrong_positions = [all_positions[token] for token in pattern.tokens]
    low, high = min(wrong_positions), max(wrong_positions)
    if len(set(wrong_positions)) < 2:
        return []
    slot = f"page slot {low // case.page_size}, offset {low % case.page_size}"
    if sum(p >= low for p in all_positions) == len(wrong_positions):
        return [Hint("from_position", f"every query from position {low} ({slot}) on, none before")]
    if sum(p <= high for p in all_positions) == len(wrong_positions):
        return [Hint("up_to_position", f"every query up to position {high}, none after")]
    return []


def _heads(case: Case, pattern: Pattern) -> list[Hint]:
    if pattern.whole(1) or case.num_kv_heads == 1:
        return []
    kv_heads = sorted({head // case.gqa_ratio for head in pattern.heads})
    if len(kv_heads) == 1:
        share = "" if case.gqa_ratio == 1 else f", {len(pattern.heads)} of its {count(case.gqa_ratio, 'head')}"
        return [Hint("one_kv_head", f"only kv head {kv_heads[0]} is wrong{share}")]
    first_of_each = tuple(range(0, case.num_q_heads, case.gqa_ratio))
    if case.gqa_ratio > 1 and pattern.heads == first_of_each:
        return [Hint("first_of_group", "only the first head of each kv head")]
    if case.gqa_ratio > 1 and {*pattern.heads} == {*range(case.num_q_heads)} - {*first_of_each}:
        return [Hint("not_first_of_group", "every head but the first of each kv head")]
    return []


def _dims(pattern: Pattern) -> list[Hint]:
    if pattern.whole(2):
        return []
    size = pattern.shape[2]
    half = 1 << (size.bit_length() - 1)
    if half < size and pattern.dims[0] >= half:
        return [Hint("dims_above_power_of_two", f"only dims from {half} on: behind the largest power of two")]
    return _parity(pattern.dims)


def _parity(dims: Sequence[int]) -> list[Hint]:
    if len(dims) > 2 and len({dim % 2 for dim in dims}) == 1:
        return [Hint("one_parity", f"only {'odd' if dims[0] % 2 else 'even'} dims are wrong: {compact(dims)}")]
    return []
