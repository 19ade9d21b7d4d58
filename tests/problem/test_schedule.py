"""The simulated scheduler: what holds in every step, and that the hard things happen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.case import Case, Rows
from harness.problem.admission import SPARE_PAGES, serving_refusal
from harness.problem.problem import build_problem
from harness.problem.schedule import Schedule, make_schedule
from harness.problem.steps import step_problem

CASE = Case(
    "schedule", "unified_paged", Rows("three", (8, 5, 3), (20, 5, 30)), page_size=8, steps=20, writer="cache_writer"
)


def check(case: Case, schedule: Schedule) -> None:
    """What every step of every schedule keeps."""
    computed: dict[int, int] = {}
    assert [step.number for step in schedule.steps] == list(range(1, case.steps + 1))
    for step in schedule.steps:
        assert 1 <= len(step.rows) <= case.rows.num_seqs
        assert sum(row.query_len for row in step.rows) <= case.rows.num_tokens
        pages = [page for row in step.rows for page in row.pages]
        assert len(set(pages)) == len(pages), "no page belongs to two requests"
        assert all(0 < page < schedule.num_pages for page in pages)
        assert len(set(pages)) <= schedule.num_pages - 1 - SPARE_PAGES
        for row in step.rows:
            assert row.query_len >= 1
            assert row.context_len in (0, computed.get(row.request, 0)), "goes on where it was, or begins anew"
            computed[row.request] = row.context_len + row.query_len
            assert computed[row.request] <= schedule.lengths[row.request]
            assert len(row.pages) == -(-computed[row.request] // case.page_size)


def test_the_hard_things_happen() -> None:
    schedule = make_schedule(CASE)
    check(CASE, schedule)
    rows = [row for step in schedule.steps for row in step.rows]
    ended = {row.request for row in rows if row.context_len + row.query_len == schedule.lengths[row.request]}
    chunked = {row.request for row in rows if row.query_len > 1 and row.context_len > 0}
    begun = [row.request for row in rows if row.context_len == 0]
    assert ended, "requests finish"
    assert chunked, "prompts are computed in chunks"
    assert len(set(begun)) < len(begun), "requests are evicted, and computed anew"
    assert any(row.query_len == 1 and row.context_len > 0 for row in rows), "requests decode"
    assert any({row.query_len == 1 for row in step.rows} == {True, False} for step in schedule.steps)
    owners: dict[int, set[int]] = {}
    for step in schedule.steps:
        for page, request in step.owners.items():
            owners.setdefault(page, set()).add(request)
    assert max(len(requests) for requests in owners.values()) >= 3, "pages are reused"


def test_a_schedule_follows_from_the_geometry_seed_alone() -> None:
    assert make_schedule(CASE) == make_schedule(replace(CASE, data_seed=5, dtype="bf16"))
    assert make_schedule(CASE) != make_schedule(replace(CASE, geometry_seed=1))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 4, 16]),
    steps=st.integers(2, 30),
    seed=st.integers(0, 99),
    more=st.none() | st.integers(0, 20),
)
def test_every_schedule_keeps_its_promises(
    rows: list[tuple[int, int]], page_size: int, steps: int, seed: int, more: int | None
) -> None:
    mix = Rows("drawn", *(tuple(column) for column in zip(*rows, strict=True)))
    case = replace(CASE, rows=mix, page_size=page_size, steps=steps, geometry_seed=seed)
    if more is not None:
        longest = -(-(max(mix.seq_lens) + 6) // page_size)
        case = replace(case, num_pages=1 + longest + SPARE_PAGES + more)
    assert serving_refusal(case) is None
    schedule = make_schedule(case)
    check(case, schedule)
    assert case.num_pages in (None, schedule.num_pages)


def test_who_had_a_page_is_told() -> None:
    schedule = make_schedule(CASE)
    page = schedule.steps[0].rows[0].pages[0]
    assert schedule.history(page, 1) == f"page {page} was request 0's in step 1"
    assert schedule.history(page, 20).startswith(f"page {page} was request ")
    assert " then request " in schedule.history(page, 20)
    assert schedule.history(0, 20) == "page 0 is nobody's"


@pytest.mark.parametrize("descales_per", ["tensor", "head", "page", "token"])
def test_a_token_is_the_same_in_every_step_that_sees_it(descales_per: str) -> None:
    case = replace(CASE, num_q_heads=2, head_size=8, kv_dtype="fp8_e4m3", descales_per=descales_per)
    schedule = make_schedule(case)
    whole = build_problem(schedule.problem_case(case), "cpu")
    for step in schedule.steps:
        problem = step_problem(whole, schedule, step)
        assert problem.case.placement.pages == tuple(row.pages for row in step.rows)
        token = 0
        for seq, row in enumerate(step.rows):
            first, end = whole.key_start[row.request], row.context_len + row.query_len
            own = slice(problem.key_start[seq], problem.key_start[seq + 1])
            assert torch.equal(problem.k[own], whole.k[first : first + end])
            assert torch.equal(problem.v[own], whole.v[first : first + end])
            for which in ("k", "v"):
                mine, theirs = (one.descale(which).expand(len(one.k), case.num_kv_heads, 1) for one in (problem, whole))
                assert torch.equal(mine[own], theirs[first : first + end])
            queries = whole.q[first + row.context_len : first + end]
            assert torch.equal(problem.q[token : token + row.query_len], queries)
            token += row.query_len


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"writer": None}, "an engine of 20 steps needs a writer"),
        ({"causal": False}, "needs a causal mask"),
        ({"rows": Rows("empty", (1,), (-1,))}, "needs prompts of at least one token"),
        ({"data": "bar_codes"}, "needs a data law that is not auto or bar_codes"),
        ({"num_pages": 9}, "needs at least 10 pages"),
        ({"boundary": "page16"}, "needs a pool that no boundary probe lays out"),
        ({"boundary": "page16", "boundary_target": "out"}, "a writer stores to K and V only"),
        ({"pool": "aliased"}, "compared whole"),
    ],
)
def test_what_no_engine_can_serve_is_refused(axes: dict[str, object], words: str) -> None:
    assert words in (serving_refusal(replace(CASE, **axes)) or "")  # type: ignore[arg-type]
