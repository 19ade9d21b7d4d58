"""Which data law and which placement fit which case, decided from the axes alone, without torch.

Invariant: whatever `law_refusal` and `placement_refusal` let through either builds, or fails later for a reason that
only the drawn data show (a needle beyond the range of float16, two keys stored alike).
"""

from __future__ import annotations

import math

from harness.case import Case

LAWS: dict[str, str] = {
    "normal": "independent N(0, 1)",
    "probe": "each query points at one seen key and at the first masked ones, so that mask faults move half the mass",
    "needle": "each query puts all its mass on one key: the output is that key's value, to the bit",
    "uniform": "q = 0: the mean of the seen values (where neither ALiBi nor sinks say otherwise)",
    "outliers": "N(0, 1), plus N(0, 100) in one element of a thousand",
    "negative": "every seen score is below -88, so that a phantom key with score 0 takes all the mass",
}

HIGHEST_NEGATIVE = -88.0  # exp of less underflows in float32
NEGATIVE_MEAN = -160.0  # of the scores of law `negative`
NEGATIVE_SPREAD = 45.0  # scores of law `negative` keep within this of their mean


def law_refusal(case: Case) -> str | None:
    """Why the data law of `case` cannot keep its promise, in one sentence; None where it can."""
    if case.data not in LAWS:
        return f"unknown data law '{case.data}'; known: {', '.join(LAWS)}"
    cap = case.logits_soft_cap
    if case.data == "needle" and cap is not None:
        return f"needle: a soft cap of {cap:g} bounds the score gap that a needle needs"
    if case.data == "negative" and cap is not None:
        highest = cap * math.tanh((NEGATIVE_MEAN + NEGATIVE_SPREAD) / cap)
        if highest > HIGHEST_NEGATIVE:
            return f"negative: a soft cap of {cap:g} lifts scores to {highest:.0f}, above {HIGHEST_NEGATIVE:.0f}"
    if case.data == "negative" and case.alibi and not case.causal:
        return "negative: without a causal mask ALiBi lifts the scores of keys behind the query"
    return None


def placement_refusal(case: Case) -> str | None:
    """Why the placement of `case` does not fit its lengths, in one sentence; None where it does."""
    placement, lens = case.placement, ", ".join(map(str, case.rows.context_lens))
    if placement.kind == "shared_prefix" and not shared_prefix_len(case):
        return f"shared_prefix: no whole page of {case.page_size} tokens fits every context (context_lens {lens})"
    if placement.kind == "explicit":
        return _explicit_refusal(case)
    if placement.kind not in ("shuffled", "sequential", "reversed", "shared_prefix"):
        return f"unknown placement '{placement.kind}'; known: shuffled, sequential, reversed, shared_prefix, explicit"
    return None


def shared_prefix_len(case: Case) -> int:
    """Tokens that all rows with context share: whole pages within the smallest context; 0 if nothing is shared."""
    contexts = [c for c in case.rows.context_lens if c > 0]
    if case.placement.kind != "shared_prefix" or not contexts:
        return 0
    return min(contexts) // case.page_size * case.page_size


def pages_needed(case: Case) -> tuple[int, ...]:
    """Pages of each sequence: ceil(seq_len / page_size), 0 for a sequence without keys."""
    return tuple(-(-max(seq_len, 0) // case.page_size) for seq_len in case.rows.seq_lens)


def _explicit_refusal(case: Case) -> str | None:
    placement, needed = case.placement, pages_needed(case)
    if len(placement.pages) != len(needed):
        return f"placement '{placement.name}': {len(placement.pages)} page lists for {len(needed)} sequences"
    for seq, (pages, count) in enumerate(zip(placement.pages, needed, strict=True)):
        if len(pages) != count:
            return f"placement '{placement.name}': sequence {seq} needs {count} pages, {len(pages)} are given"
    ids = [page for pages in placement.pages for page in pages]
    if any(page < 0 for page in ids):
        return f"placement '{placement.name}': page ids must not be negative"
    if len(set(ids)) != len(ids):
        twice = next(page for i, page in enumerate(ids) if page in ids[:i])
        return f"placement '{placement.name}': page {twice} is given twice"
    return None
