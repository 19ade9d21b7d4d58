"""Which data law, descales, layout and placement fit which case, decided from the axes alone, without torch.

Invariant: whatever the functions `..._refusal` let through either builds, or fails later for a reason that only the
drawn data show (a needle beyond the range of float16, two keys stored alike).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from harness.case import Case
from harness.dtypes import element_type
from harness.layout import VECTOR_BYTES, WHOLE_VECTORS
from harness.problem.boundary import boundary_refusal

AUTO = "auto"  # stands for a law that is chosen for each case, when it runs

LAWS: dict[str, str] = {
    "normal": "independent N(0, 1)",
    "probe": "each query points at one seen key and at the first masked ones, so that mask faults move half the mass",
    "needle": "each query puts all its mass on one key: the output is that key's value, to the bit",
    "uniform": "q = 0: the mean of the seen values (where neither ALiBi nor sinks say otherwise)",
    "outliers": "N(0, 1), plus N(0, 100) in one element of a thousand",
    "negative": "every seen score is below -88, so that a phantom key with score 0 takes all the mass",
    "needle_edges": "needles on both sides of the edges of pages, tiles and splits, and at both ends of what is seen",
    "rising": "scores rise along the keys: the running maximum changes at every tile",
    "falling": "scores fall along the keys: the running maximum never changes after the first tile",
    "large": "every seen score is above 88 and they spread widely: exp overflows unless the maximum is taken off",
    "biased": "N(0, 1), and V has mean 1, so that errors of accumulation add up instead of cancelling",
    "bar_codes": "q = 0 and V says page, slot, sequence and head, so that the output tells which tokens were attended",
    "tiny": "uniform in +-0.001, as some test suites draw; exists to show what it is blind to",
}
NEEDLES = frozenset({"needle", "needle_edges"})
BY_POSITION = NEEDLES | {"rising", "falling", "bar_codes"}  # tell each token of a sequence from all others
STRUCTURED = NEEDLES | {"uniform", "bar_codes", "tiny"}  # equal softmax weights or values: errors are not independent
DESCALES: dict[str, str] = {
    "loud": "log-uniform over a factor of 32, K and V independent: any mix-up is a gross error; per tensor: apart",
    "quiet": "all within 2 %, as data of one origin give",
    "equal": "one number for K and one for V, however many there are: a mix-up shows nothing",
    "one": "all 1: a kernel that ignores them passes",
}
DESCALES_PER: dict[str, str] = {
    "tensor": "one descale for K and one for V",
    "head": "one for each KV head",
    "page": "one for each page and KV head",
    "token": "one for each token and KV head",
}

MOST_GENERATED = 6  # tokens of one request of an engine, beyond its prompt
SPARE_PAGES = 4  # of an engine, that nobody is ever given: what a padded table may name, and a wrong slot hit
EXP_RANGE = 88.0  # exp of less than -88 underflows in float32, of more than 88 overflows
SHIFTED_MEAN = 160.0  # of the scores of law `large`, and but for its sign of law `negative`
SHIFTED_SPREAD = 45.0  # scores of these laws keep within this of their mean


def law_refusal(case: Case) -> str | None:
    """Why the data law of `case` cannot keep its promise, in one sentence; None where it can."""
    if case.data == AUTO:
        return None
    law, cap = case.data, case.logits_soft_cap
    if law not in LAWS:
        return f"unknown data law '{law}'; known: {', '.join(LAWS)}"
    if law in BY_POSITION and case.placement.repeats:
        return f"{law}: placement '{case.placement.name}' has the same tokens at two places of a sequence"
    if law in NEEDLES and cap is not None:
        return f"{law}: a soft cap of {cap:g} bounds the score gap that a needle needs"
    if law in ("negative", "large") and cap is not None:
        least = cap * math.tanh((SHIFTED_MEAN - SHIFTED_SPREAD) / cap)
        if least < EXP_RANGE and law == "negative":
            return f"negative: a soft cap of {cap:g} lifts scores to {-least:.0f}, above {-EXP_RANGE:.0f}"
        if least < EXP_RANGE:
            return f"large: a soft cap of {cap:g} holds scores at {least:.0f}, below {EXP_RANGE:.0f}"
    if law == "negative" and case.alibi and not case.causal:
        return "negative: without a causal mask ALiBi lifts the scores of keys behind the query"
    if law in ("falling", "large", "bar_codes") and case.alibi:
        return f"{law}: ALiBi lowers the scores of distant keys"
    return None


def descales_refusal(case: Case) -> str | None:
    """Why the descales of `case` do not fit its cache, or 8-bit queries their keys; None where they do."""
    for axis, word, known in (("descales_per", case.descales_per, DESCALES_PER), ("descales", case.descales, DESCALES)):
        if word not in known:
            return f"unknown {axis} '{word}'; known: {', '.join(known)}"
    if case.kv_dtype == "auto" and case.descales_per != "tensor":
        return f"descales_per {case.descales_per}: a cache of kv_dtype auto has no descales"
    if case.kv_dtype == case.q_dtype == "auto" and case.descales != "loud":
        return f"descales {case.descales}: a cache of kv_dtype auto has none"
    if case.data in NEEDLES and case.q_dtype not in ("auto", case.kv_dtype):
        return f"{case.data}: a query stored as {case.q_dtype} holds no key stored as {case.kv_dtype}"
    if case.descales_per == "tensor" and case.descales in ("quiet", "equal"):
        return f"descales {case.descales}: one per tensor has nothing to be {case.descales} with"
    return None


def layout_refusal(case: Case) -> str | None:
    """Why a cache of `case` cannot have its layout, in one sentence; None where it can."""
    if case.layout == "linear_3d" and case.page_size != 1:
        return f"linear_3d: a page is one token, not {case.page_size}"
    if case.layout in WHOLE_VECTORS:
        x = VECTOR_BYTES // element_type(case.stored_dtype).size
        for what, length in (("page_size", case.page_size), ("head_size", case.head_size)):
            if length % x:
                return f"{case.layout}: {what} {length} is no multiple of {x}, a vector of {case.stored_dtype}"
    return None


def placement_refusal(case: Case) -> str | None:
    """Why the placement, the pool or the boundary of `case` does not fit its lengths, in one sentence; None where they
    do.
    """
    placement, lens = case.placement, ", ".join(map(str, case.rows.context_lens))
    if reason := boundary_refusal(case):
        return reason
    if placement.kind == "shared_prefix" and not shared_prefix_len(case):
        return f"shared_prefix: no whole page of {case.page_size} tokens fits every context (context_lens {lens})"
    if placement.kind == "explicit" and (reason := _explicit_refusal(case)):
        return reason
    if placement.kind not in ("shuffled", "sequential", "reversed", "shared_prefix", "explicit"):
        return f"unknown placement '{placement.kind}'; known: shuffled, sequential, reversed, shared_prefix, explicit"
    return _pool_refusal(case)


def serving_refusal(case: Case) -> str | None:
    """Why no writer can fill the cache of `case`, or no engine serve its rows, in one sentence; None where they can."""
    if case.writer is not None and case.boundary is not None and case.boundary_target not in ("kv", "k", "v", "slots"):
        return f"boundary of {case.boundary_target}: a writer stores to K and V only, and reads slots"
    if case.writer is not None and case.pool == "aliased":
        return "pool aliased: what a writer stores to is compared whole, and dense"
    if case.writer is not None and case.placement.repeats:
        return f"placement '{case.placement.name}' has two tokens in one slot: no writer"
    if case.steps == 1:
        return None
    least = 1 + max(engine_pages(case)) + SPARE_PAGES
    needs = {
        "a writer, which stores what each step computes": case.writer is not None,
        "a causal mask: later tokens are not there yet": case.causal,
        "a pool that no boundary probe lays out": case.boundary is None,
        "prompts of at least one token": min(case.rows.seq_lens) > 0,
        "placement shuffled: its scheduler gives out pages": case.placement.kind == "shuffled",
        "a data law that is not auto or bar_codes": case.data not in (AUTO, "bar_codes"),
        f"at least {least} pages (num_pages)": case.num_pages is None or case.num_pages >= least,
    }
    lacking = [need for need, met in needs.items() if not met]
    return f"an engine of {case.steps} steps needs {lacking[0]}" if lacking else None


def engine_pages(case: Case) -> tuple[int, ...]:
    """Pages that a request of each row of an engine may have in the end."""
    return tuple(-(-(max(prompt, 0) + MOST_GENERATED) // case.page_size) for prompt in case.rows.seq_lens)


def shared_prefix_len(case: Case) -> int:
    """Tokens that all rows with context share: whole pages within the smallest context; 0 if nothing is shared."""
    contexts = [c for c in case.rows.context_lens if c > 0]
    if case.placement.kind != "shared_prefix" or not contexts:
        return 0
    return min(contexts) // case.page_size * case.page_size


def pages_needed(case: Case) -> tuple[int, ...]:
    """Pages of each sequence: ceil(seq_len / page_size), 0 for a sequence without keys."""
    return tuple(-(-max(seq_len, 0) // case.page_size) for seq_len in case.rows.seq_lens)


def tied(case: Case, starts: Sequence[int], per_page: int) -> Iterator[tuple[slice, slice]]:
    """(what is the same again, what it is the same as) wherever a sequence has a page another time, of something that
    comes `per_page` to a page and begins at starts[seq] for each sequence; num_seqs + 1 starts.
    """
    for seq, pages in enumerate(case.placement.pages if case.placement.repeats else ()):
        for column, page in enumerate(pages):
            to, origin = (starts[seq] + number * per_page for number in (column, pages.index(page)))
            count = min(per_page, starts[seq + 1] - to)
            if to != origin:
                yield slice(to, to + count), slice(origin, origin + count)


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
    by_sequence = [page for pages in placement.pages for page in set(pages)]
    if len(set(by_sequence)) != len(by_sequence):
        shared = next(page for i, page in enumerate(by_sequence) if page in by_sequence[:i])
        return f"placement '{placement.name}': page {shared} is given to two sequences"
    if case.num_pages is not None and ids and max(ids) >= case.num_pages:
        return f"placement '{placement.name}': page {max(ids)} lies beyond a pool of {case.num_pages} pages (num_pages)"
    return None


def _pool_refusal(case: Case) -> str | None:
    """A pool holds page 0, the pages of the batch, and one page of poison that padding may name."""
    if case.num_pages is None or case.steps > 1:  # of an engine: see serving_refusal
        return None
    if case.placement.kind == "explicit":
        taken = len({page for pages in case.placement.pages for page in pages} | {0})
    else:
        holders = sum(context_len > 0 for context_len in case.rows.context_lens)
        again = max(holders - 1, 0) * (shared_prefix_len(case) // case.page_size)
        taken = 1 + sum(pages_needed(case)) - again
    if case.num_pages > taken:
        return None
    return f"num_pages {case.num_pages}: page 0, the pages of the batch and an unused one need at least {taken + 1}"
