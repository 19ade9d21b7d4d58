"""Bar codes read back: which pages and tokens an output of law `bar_codes` attended, in sentences.

Invariant: a sentence is said only where the counts it rests on differ by half a token or more, and by more than the
rounding of the output explains. Softmax hides how many tokens were attended in all: of the totals that would explain
some page or slot, the one is believed under which the fewest tokens are missing or too many.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from harness.dtypes import element_type
from harness.problem.bar_codes import code_groups, slot_class
from harness.problem.masks import visible
from harness.problem.problem import Problem
from harness.problem.spans import Span, spans
from harness.triage.wording import MAX_RUNS, compact, count

MAX_STATEMENTS = 8
_MAX_ROWS = 512  # (token, head) rows read per sequence
_OTHER_ONE = 0.25  # how far a stored 1 may be from 1, twice: half a step of the coarsest fp8 type is an eighth
_ROUNDINGS = 4  # of the output, allowed in a count; the others a kernel makes are exact for codes of 0 and 1


def decode_bar_codes(out: torch.Tensor, problem: Problem, values: torch.Tensor) -> list[str]:
    """What `out` [num_tokens, num_q_heads, head_size_v] attended, where it differs from what it had to; [] if nowhere.

    `values` [num_keys, num_kv_heads, head_size_v] are those a right kernel sees (harness.cache.effective). One sentence
    per sequence and kind of difference, e.g. "sequence 1, positions 40-44, heads 0-3: page 3 attended 0 times, page 4
    twice". Raises ValueError where the problem has another data law.
    """
    if problem.case.data != "bar_codes":
        raise ValueError(f"decode_bar_codes: the data law is '{problem.case.data}', not 'bar_codes'")
    statements = [
        line for span in spans(problem.case.rows, out.device) for line in _sequence(out, problem, values, span)
    ]
    more = len(statements) - MAX_STATEMENTS
    return statements[:MAX_STATEMENTS] + ([f"and {more} more"] if more > 0 else [])


@dataclass(frozen=True)
class _Reader:
    """What is known of one sequence; counts are lists of head_size_v numbers."""

    problem: Problem
    seq: int
    seq_len: int

    def differences(self, got: list[float], want: list[float], slack: float) -> dict[str, dict[int, float]]:
        """By group, the classes whose counts differ, and by how much."""
        found: dict[str, dict[int, float]] = {}
        for name, part in code_groups(len(got)).starts().items():
            for i, (g, w) in enumerate(zip(got[part], want[part], strict=True)):
                if abs(g - w) > max(0.5, slack * max(g, w)):
                    found.setdefault(name, {})[i] = g - w
        return found

    def phrases(self, got: list[float], want: list[float], slack: float, pos: int, kv_head: int) -> tuple[str, ...]:
        """The differences of one row whose query stands at `pos`, in words."""
        if not all(map(math.isfinite, got)):
            return ("not finite",)
        found = self.differences(got, want, slack)
        foreign = self._foreign(found, kv_head)
        if foreign:  # stored at other descales, a 1 of theirs is another 1
            found = self.differences(got, want, max(slack, _OTHER_ONE))
        parts = code_groups(len(got)).starts()
        if (token := self._one_token(found)) is not None and (place := self._place(*token[:2], pos)):
            return (f"{place} attended {'once too often' if token[2] > 0 else '0 times'}", *foreign)
        named = {"page": self._pages, "slot": self._slots}
        names = [n for n in named if n in found and (n == "page" or self.problem.case.page_size > 1 or len(found) == 1)]
        name = min(
            names, key=lambda n: len(found[n]), default="page"
        )  # a page is many slots, a slot lies in many pages
        own = [f"{named[name](c)} {_times(got[parts[name]][c], want[parts[name]][c])}" for c in found.get(name, {})]
        return (*own, *foreign) or ("shares differ that no page or slot explains",)

    def _foreign(self, found: dict[str, dict[int, float]], kv_head: int) -> tuple[str, ...]:
        """Other sequences and KV heads whose tokens were attended."""
        groups, lines = code_groups(self.problem.case.value_size), []
        for name, what, own, size in (
            ("seq", "sequence", self.seq, groups.seq),
            ("head", "kv head", kv_head, groups.head),
        ):
            for c, change in found.get(name, {}).items():
                if change > 0 and c != own % size:
                    lines.append(f"tokens of {what} {self._numbers(name, c, size)} attended")
        return tuple(lines)

    def _one_token(self, found: dict[str, dict[int, float]]) -> tuple[int, int, float] | None:
        """(page class, slot class, change) where just one of each differs, by one token."""
        if len(found.get("page", {})) != 1 or len(found.get("slot", {})) != 1:
            return None
        (page, p), (slot, s) = *found["page"].items(), *found["slot"].items()
        return (page, slot, p) if round(p) == round(s) and abs(round(p)) == 1 else None

    def _place(self, page_class: int, slot: int, pos: int) -> str | None:
        """The token of these classes, if there is one only."""
        case, groups = self.problem.case, code_groups(self.problem.case.value_size)
        key = torch.arange(self.seq_len)
        at = slot_class(key % case.page_size, case.page_size, groups.slot)
        keys = key[(at == slot) & (key // case.page_size % groups.page == page_class)].tolist()
        if len(keys) != 1:
            return None
        if keys[0] == pos:
            return "the query's own position"
        if keys[0] == pos + 1:
            return "the position after the query"
        if case.sliding_window is not None and keys[0] == pos - case.sliding_window + 1:
            return "the last position in the window"
        if case.sliding_window is not None and keys[0] == pos - case.sliding_window:
            return "the position before the window"
        if case.sink_tokens and keys[0] < pos and keys[0] in (case.sink_tokens - 1, case.sink_tokens):
            return "the last sink token" if keys[0] < case.sink_tokens else "the position behind the sink tokens"
        return f"position {keys[0]}"

    def _pages(self, page_class: int) -> str:
        size = code_groups(self.problem.case.value_size).page
        pages = range(page_class, -(-self.seq_len // self.problem.case.page_size), size)
        if not pages:
            return f"a page beyond the end (number {page_class} modulo {size})"
        if len(pages) == 1:
            return f"page {pages[0]}"
        return f"pages {', '.join(map(str, pages)) if len(pages) <= MAX_RUNS else compact(list(pages))} together"

    def _slots(self, slot: int) -> str:
        case, size = self.problem.case, code_groups(self.problem.case.value_size).slot
        every = torch.arange(case.page_size)
        slots = every[slot_class(every, case.page_size, size) == slot].tolist()
        return f"slot {slots[0]} of its pages" if len(slots) == 1 else f"slots {compact(slots)} of its pages"

    def _numbers(self, name: str, number: int, size: int) -> str:
        case = self.problem.case
        total = case.rows.num_seqs if name == "seq" else case.num_kv_heads
        return " or ".join(str(n) for n in range(number, total, size)) or f"{number} modulo {size}"


def _sequence(out: torch.Tensor, problem: Problem, values: torch.Tensor, span: Span) -> list[str]:
    """Sentences about one sequence."""
    case, name = problem.case, f"sequence {span.seq}"
    if span.seq_len <= 0:
        return []
    seen = visible(
        span.query_pos[:, None], torch.arange(span.seq_len, device=out.device), span.seq_len, case.causal,
        case.sliding_window, case.sink_tokens,
    ).double()  # [tokens, keys]  # fmt: skip
    group, own = case.gqa_ratio, values[span.keys].double()  # [keys, num_kv_heads, head_size_v]
    mass = torch.einsum("tk,khd->thd", seen, own).repeat_interleave(group, 1)  # [tokens, heads, head_size_v]
    want = torch.einsum("tk,khd->thd", seen, (own > 0).double()).repeat_interleave(group, 1)
    typical = (own.sum(dim=(0, 2)) / (own > 0).sum(dim=(0, 2))).repeat_interleave(
        group
    )  # [heads] size of a 1 as stored
    unit = torch.where(want > 0, mass / want, typical[:, None])
    total = seen.sum(dim=1)[:, None, None]
    if problem.sinks is not None:
        total = total + problem.sinks.double().exp()[:, None]
    got = out[span.tokens].double() * total / unit  # counts, if the total is right
    slack = _ROUNDINGS * element_type(case.dtype).unit_roundoff
    wrong = (got - want).abs() > torch.maximum(got, want).mul(slack).clamp(min=0.5)
    token, head = (wrong | ~got.isfinite()).any(dim=2).nonzero()[:_MAX_ROWS].unbind(dim=1)
    need = want[token, head]  # [rows, head_size_v]
    have = _with_total(got[token, head], need)
    reader = _Reader(problem, span.seq, span.seq_len)
    kinds: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for pos, at, h, n in zip(span.query_pos[token].tolist(), head.tolist(), have.tolist(), need.tolist(), strict=True):
        kinds[reader.phrases(h, n, slack, pos, at // group)].append((pos, at))
    return [f"{name}, {_rows(places, case.num_q_heads)}: {', '.join(kind)}" for kind, places in kinds.items()]


def _with_total(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """`got` [rows, head_size_v] under the total that leaves the fewest tokens of pages, or of slots, wrong."""
    parts = code_groups(want.shape[1]).starts()
    both = (
        torch.cat([got[:, parts["page"]], got[:, parts["slot"]]], dim=1),
        torch.cat([want[:, parts["page"]], want[:, parts["slot"]]], dim=1),
    )
    ratio = torch.where((both[0] > 0.5) & (both[1] > 0), both[1] / both[0], torch.ones_like(both[0]))
    factors = torch.cat(
        [torch.ones_like(ratio[:, :1]), ratio], dim=1
    )  # [rows, totals tried]; first that of a right kernel
    misses = [
        (got[:, None, part] * factors[:, :, None] - want[:, None, part]).abs().sum(dim=2)
        for part in (parts["page"], parts["slot"])
    ]
    missed = torch.maximum(*misses)  # [rows, totals tried]
    missed[:, 0] -= 0.5
    return got * factors.gather(1, missed.argmin(dim=1, keepdim=True))


def _times(got: float, want: float) -> str:
    """How often the tokens of a class were attended."""
    if want < 0.5:
        return f"attended with {count(round(got), 'token')}, though not to be seen"
    times = got / want
    if want > 1.5 and abs(times - round(times)) * want > 0.5:
        return f"attended with {round(got)} instead of {count(round(want), 'token')}"
    return f"attended {({1: 'once', 2: 'twice'}).get(round(times), f'{round(times)} times')}"


def _rows(places: list[tuple[int, int]], num_heads: int) -> str:
    positions, heads = sorted({p for p, _ in places}), sorted({h for _, h in places})
    where = f"position{'s' if len(positions) > 1 else ''} {compact(positions)}"
    return f"{where}, head{'s' if len(heads) > 1 else ''} {compact(heads, num_heads)}"
