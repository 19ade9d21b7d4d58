"""Suspect pages lie where a boundary probe says, for every boundary, target and position; the impossible is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from harness.case import Case, Placement, Rows
from harness.dtypes import element_type
from harness.problem.boundary import (
    BOUNDARIES,
    POSITIONS,
    TARGETS,
    boundary_refusal,
    cache_geometry,
    output_geometry,
    table_geometry,
)

ROWS = Rows("r", (3, 1, 1), (60, 14, 63))
CASE = Case("m", "k", ROWS, num_q_heads=4, gqa_ratio=4, head_size=64, page_size=16)


def probe(**axes: object) -> Case:
    return replace(CASE, **axes)  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", ["fp32", "fp16", "fp8_e4m3"])
@pytest.mark.parametrize("page_size", [16, 24])
def test_pages_lie_below_across_above_and_far_from_the_boundary(stored: str, page_size: int) -> None:
    kv = {"kv_dtype": stored} if stored.startswith("fp8") else {"dtype": stored}
    refused = 0
    for boundary, target, position in itertools.product(BOUNDARIES, ("kv", "k", "v"), POSITIONS):
        case = probe(
            boundary=boundary, boundary_target=target, boundary_position=position, page_size=page_size,
            head_size=128, rows=Rows("r", (1, 1), (20, 12)), **kv,
        )  # fmt: skip
        if boundary_refusal(case) is not None:
            refused += 1
            continue
        at = cache_geometry(case)
        assert at is not None
        size, content = element_type(case.stored_dtype).size, page_size * 128
        stride = at.page_strides["v" if target == "v" else "k"]
        first, second = (page * stride for page in at.suspects)
        if boundary == "carry":
            limit = ((1 << 32) - at.low_bits["v" if target == "v" else "k"]) // size
        else:
            limit = 1 << int(boundary[-2:])
            limit = limit // size if boundary.startswith("bytes") else limit
            limit = limit * stride if boundary.startswith("page") else limit
        inside = {
            "below": max(first, second) + content <= limit,
            "straddling": second + content <= limit <= first + content and (first < limit or boundary[:4] == "page"),
            "above": min(first, second) >= limit,
            "far": min(first, second) > 2 * limit,
        }
        assert inside[position], (boundary, target, position)
        assert max(at.suspects) < at.num_pages
        assert len({*at.pages((2, 1))[0], *at.pages((2, 1))[1]}) == 3
    assert refused < 40  # page ids of one tensor, whole pages that end at the boundary


@pytest.mark.parametrize("per", ["page", "token"])
@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 24])
def test_pages_of_descales_lie_below_across_above_and_far_from_the_boundary(heads: int, per: str) -> None:
    content = heads * (2 if per == "page" else 16)  # elements of a page
    refused = 0
    for boundary, position in itertools.product(("bytes31", "bytes32", "elements31", "elements32"), POSITIONS):
        case = probe(
            boundary=boundary, boundary_target="descale", boundary_position=position, num_q_heads=heads, gqa_ratio=1,
            rows=Rows("r", (1, 1), (20, 12)), kv_dtype="fp8_e4m3", descales_per=per,
        )  # fmt: skip
        if boundary_refusal(case) is not None:
            refused += 1
            assert position == "straddling"
            continue
        at = cache_geometry(case)
        assert at is not None
        limit = (1 << int(boundary[-2:])) // (4 if boundary.startswith("bytes") else 1)
        first, second = (page * at.page_strides["descale"] for page in at.suspects)
        inside = {
            "below": max(first, second) + content <= limit,
            "straddling": second + content <= limit and first < limit < first + content,
            "above": min(first, second) >= limit,
            "far": min(first, second) > 2 * limit,
        }
        assert inside[position], (boundary, position)
    assert refused <= (4 if heads == 1 or (heads < 4 and per == "page") else 1)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("boundary", ["bytes31", "bytes32", "elements31", "elements32"])
def test_the_last_row_of_the_output_and_of_the_table_lies_where_it_should(boundary: str, position: str) -> None:
    out = output_geometry(probe(boundary=boundary, boundary_target="out", boundary_position=position))
    table = table_geometry(probe(boundary=boundary, boundary_target="table", boundary_position=position))
    assert out is not None
    assert table is not None
    for at, last, row, size in ((out, 4, 256, 2), (table, 2, 4, 4)):
        limit = (1 << int(boundary[-2:])) // (size if boundary.startswith("bytes") else 1)
        first = at.stride * last
        inside = {
            "below": first + row <= limit,
            "straddling": first < limit < first + row,
            "above": first >= limit,
            "far": first > 2 * limit,
        }
        assert inside[position]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"boundary": "page16", "boundary_target": "k"}, "K and V have the same page ids: the target is kv, not k"),
        ({"boundary": "page16", "boundary_target": "out"}, "only K and V have page ids"),
        ({"boundary": "elements31", "boundary_target": "kv"}, "no page straddles it"),
        ({"boundary": "elements31", "rows": Rows("r", (1,), (3,))}, "the batch has 1 pages of 16 tokens"),
        ({"boundary": "elements31", "strides": "cache"}, "leave strides and placement at their default"),
        ({"boundary": "bytes31", "placement": Placement("reversed", "reversed")}, "leave strides and placement"),
        ({"boundary": "bytes31", "boundary_target": "descale"}, "only descales per page or token have pages"),
        (
            {"boundary": "bytes32", "boundary_target": "descale", "kv_dtype": "fp8_e4m3", "descales_per": "page"},
            "of the descales of K and V of one KV head it can only cut off those of V",
        ),
        ({"boundary": "bytes31", "num_pages": 100}, "leave num_pages at none"),
        (
            {"boundary": "carry", "boundary_target": "workspace", "boundary_position": "far"},
            "the position is straddling",
        ),
        ({"boundary": "bytes31", "head_size_v": 32}, "K and V must have pages of the same size"),
        (
            {"boundary": "bytes31", "head_size": 1 << 24, "boundary_target": "kv", "boundary_position": "above"},
            "too large",
        ),
        (
            {"boundary": "bytes31", "boundary_target": "table", "page_table": "kv_indices"},
            "its only boundary is the carry",
        ),
        ({"boundary": "carry", "boundary_target": "table"}, "a carry lies in the last row of output or workspace"),
        (
            {"boundary": "carry", "boundary_target": "table", "page_table": "kv_indices", "boundary_position": "far"},
            "between the entries of two pages of one sequence",
        ),
        ({"boundary": "carry", "boundary_target": "slots"}, "only a writer has a slot mapping"),
        ({"boundary": "bytes31", "boundary_target": "slots", "writer": "w"}, "its only boundary is the carry"),
        (
            {
                "boundary": "carry",
                "boundary_target": "table",
                "page_table": "kv_indices",
                "boundary_position": "straddling",
                "rows": Rows("r", (1, 1), (3, 3)),
            },
            "between the entries of two pages of one sequence",
        ),
        (
            {"boundary": "carry", "boundary_target": "slots", "writer": "w", "descales_per": "page"},
            "page 0, which has no descales of its own",
        ),
        (
            {
                "boundary": "carry",
                "boundary_target": "slots",
                "writer": "w",
                "placement": Placement("explicit", "zero", ((1, 2), (0,))),
            },
            "page 0: leave that to no sequence",
        ),
        (
            {"boundary": "carry", "boundary_target": "slots", "writer": "w", "rows": Rows("r", (1,), (40,))},
            "between the entries of two new tokens that are stored",
        ),
        ({"boundary": "bytes31", "boundary_target": "out", "rows": Rows("r", (1,), (3,))}, "it needs two rows"),
        (
            {"boundary": "bytes31", "boundary_target": "table", "rows": Rows("r", (1, 1), (3, 3))},
            "no row of 1 page ids straddles it",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(axes: dict[str, object], words: str) -> None:
    reason = boundary_refusal(probe(**{"boundary_target": "k", "rows": Rows("r", (3, 1), (20, 14)), **axes}))
    assert reason is not None
    assert words in reason
    assert reason.startswith(f"boundary {axes['boundary']}")


@pytest.mark.parametrize("target", ["out", "table", "workspace"])
def test_a_probe_of_rows_leaves_the_size_of_the_pool_to_the_case(target: str) -> None:
    rows = Rows("full", (1, 1, 1), (63, 15, 63))
    position = "above"
    case = probe(boundary="bytes31", boundary_target=target, boundary_position=position, rows=rows, num_pages=100)
    assert boundary_refusal(case) is None


def test_a_case_without_a_boundary_has_no_geometry() -> None:
    assert boundary_refusal(CASE) is None
    assert cache_geometry(CASE) is output_geometry(CASE) is table_geometry(CASE) is None
    assert TARGETS[0] == CASE.boundary_target
    assert POSITIONS[0] == CASE.boundary_position
