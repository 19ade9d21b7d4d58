"""The schedule of a simulated engine: which requests take part in each step, with how many tokens, on which pages.

Invariant: follows from the case and its geometry seed alone. In every step each running request computes at least one
token, no page belongs to two requests, and a request holds just the pages of the tokens it has computed. With `steps`
from 2 on, the rows of a case are the requests that arrive, again and again: a prompt of seq_len tokens each. A step has
at most as many tokens and sequences as the rows have (longer prompts are computed in chunks), and every request then
generates a few tokens, one a step. Freed pages are given out again first. Where pages run out, the youngest request is
evicted and computed anew later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from harness.case import Case, Placement, Rows
from harness.problem import random
from harness.problem.admission import MOST_GENERATED, SPARE_PAGES, engine_pages

_MOST_TOLD = 3  # holders of a page
_SHARE = 0.8  # of the pages that all requests of the rows would want at once, in the pool


@dataclass(frozen=True)
class Scheduled:
    """One row of the batch of a step."""

    request: int
    query_len: int
    context_len: int
    pages: tuple[int, ...]  # in order; for all context_len + query_len tokens


@dataclass(frozen=True)
class Step:
    number: int  # from 1
    rows: tuple[Scheduled, ...]

    @property
    def owners(self) -> dict[int, int]:
        """{page: request}"""
        return {page: row.request for row in self.rows for page in row.pages}


@dataclass(frozen=True)
class Schedule:
    steps: tuple[Step, ...]
    lengths: tuple[int, ...]  # tokens of each request by its end, prompt and all that it generates
    num_pages: int

    def problem_case(self, case: Case) -> Case:
        """Every token of every request, as rows without context: what the steps are slices of."""
        rows = Rows("requests", self.lengths, (0,) * len(self.lengths))
        return replace(case, rows=rows, num_pages=None)

    def step_case(self, case: Case, step: Step) -> Case:
        """The batch of one step as a case of its own, on the pages that its requests have."""
        name = f"step{step.number}"
        rows = Rows(name, tuple(r.query_len for r in step.rows), tuple(r.context_len for r in step.rows))
        placement = Placement("explicit", name, tuple(row.pages for row in step.rows))
        return replace(case, rows=rows, placement=placement, num_pages=self.num_pages, steps=1)

    def history(self, page: int, until: int) -> str:
        """Who had `page` up to step `until`, in words."""
        spans: list[tuple[int, int, int]] = []  # request, first step, last step
        for step in self.steps[:until]:
            request = step.owners.get(page)
            if request is None:
                continue
            if spans and spans[-1][0] == request and spans[-1][2] == step.number - 1:
                request, first, _ = spans.pop()
                spans.append((request, first, step.number))
            else:
                spans.append((request, step.number, step.number))
        if not spans:
            return f"page {page} is nobody's"
        told = [f"request {r}'s in step{'' if a == b else 's'} {a}{'' if a == b else f'..{b}'}" for r, a, b in spans]
        return f"page {page} was {', then '.join(told[-_MOST_TOLD:])}"


@dataclass
class _Request:
    number: int
    known: int  # tokens there are: the prompt, and those generated so far
    end: int  # `known` of a request that is done
    computed: int = 0
    pages: list[int] = field(default_factory=list)


def make_schedule(case: Case) -> Schedule:
    """The schedule of `case`, whose `steps` are at least 2 (see serving_refusal for what it must not be)."""
    engine = _Engine(case)
    steps = tuple(engine.step(number) for number in range(1, case.steps + 1))
    last = max(row.request for step in steps for row in step.rows)
    return Schedule(steps, tuple(engine.lengths[: last + 1]), engine.num_pages)


class _Engine:
    """The requests and pages of a case as it is simulated."""

    def __init__(self, case: Case) -> None:
        self.case, self.page_size = case, case.page_size
        wanted = engine_pages(case)
        self.num_pages = case.num_pages or 1 + max(*wanted, int(sum(wanted) * _SHARE)) + SPARE_PAGES
        usable = self.num_pages - 1 - SPARE_PAGES
        order = random.permutation(case.geometry_seed, "pages", self.num_pages - 1)
        self.free = [1 + page for page in order[:usable]]  # the last is given out first
        self.lengths: list[int] = []
        self.running: list[_Request] = []  # the oldest first
        self.waiting: deque[_Request] = deque()

    def step(self, number: int) -> Step:
        """One step: arrivals, then tokens and pages for those that run, then the end of those that are done."""
        self._arrive(number)
        rows, evicted = [], False
        budget = self.case.rows.num_tokens
        index = 0
        while index < len(self.running):
            request = self.running[index]
            query_len = min(request.known - request.computed, budget - (len(self.running) - index - 1))
            while not self._take(request, query_len) and len(self.running) > 1:
                evicted = True
                self._evict()
            if request in self.running:
                rows.append(self._row(request, query_len))
                budget -= query_len
            index += 1
        while self.waiting and not evicted and budget and len(self.running) < self.case.rows.num_seqs:
            request = self.waiting[0]
            query_len = min(request.known, budget)
            if not self._take(request, query_len):
                break
            self.running.append(self.waiting.popleft())
            rows.append(self._row(request, query_len))
            budget -= query_len
        self._finish()
        return Step(number, tuple(rows))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _arrive(self, number: int) -> None:
        """None, one or two requests; two at first, one where there is nothing to do, none where others wait."""
        draw = int(random.integers(self.case.geometry_seed, f"arrivals/{number}", (1,), 3, "cpu"))
        nothing = not self.running and not self.waiting
        for _ in range(0 if self.waiting else 2 if number == 1 else max(draw, int(nothing))):
            count = len(self.lengths)
            prompt = self.case.rows.seq_lens[count % self.case.rows.num_seqs]
            more = random.integers(self.case.geometry_seed, f"generated/{count}", (1,), MOST_GENERATED, "cpu")
            request = _Request(count, prompt, prompt + 1 + int(more))
            self.lengths.append(request.end)
            self.waiting.append(request)

    def _take(self, request: _Request, query_len: int) -> bool:
        """Pages for `query_len` more tokens of `request`, if there are enough."""
        lacking = self._pages(request.computed + query_len) - len(request.pages)
        if lacking > len(self.free):
            return False
        request.pages += [self.free.pop() for _ in range(lacking)]
        return True

    def _row(self, request: _Request, query_len: int) -> Scheduled:
        context_len, request.computed = request.computed, request.computed + query_len
        return Scheduled(request.number, query_len, context_len, tuple(request.pages))

    def _evict(self) -> None:
        """The youngest request gives its pages back and waits to be computed anew."""
        request = self.running.pop()
        self._release(request)
        request.computed = 0
        self.waiting.appendleft(request)

    def _finish(self) -> None:
        for request in [one for one in self.running if one.computed == one.known]:
            if request.known == request.end:
                self.running.remove(request)
                self._release(request)
            else:
                request.known += 1

    def _release(self, request: _Request) -> None:
        self.free += reversed(request.pages)
        request.pages = []
