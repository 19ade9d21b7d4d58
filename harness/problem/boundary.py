"""Boundary probes: where the two suspect pages of a case lie, or the rows of its output or page table, decided from the
axes alone, without torch.

Invariant: of all pages of a batch exactly two, its first and its last, lie at the boundary; every other page lies below
it. `below` is the last two pages that end before the boundary, `straddling` the page the boundary cuts, then the one
before, `above` the first two behind it, `far` two at more than twice the boundary, where a wrapped offset is positive
again and lies inside the pool.

    bytes31, bytes32         the byte offset at which signed, unsigned 32-bit offsets in bytes wrap
    elements31, elements32   the element offset at which those in elements wrap
    page15 ... page24        page ids 2^15, 2^16, 2^23, 2^24, where int16, uint16, int24, uint24 and float32 ids end
    carry                    where base + offset carries into the upper 32 bits, in a pool that may be small

Where the target is the output or the page table, its last token or row takes the place of the suspect pages, and the
distance of tokens or rows that of pages. A list, kv_page_indices or a slot mapping, has nothing that could lie far
apart: of its boundaries there is the carry, amid the entries that are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from harness.case import Case
from harness.dtypes import element_type

BOUNDARIES = ("bytes31", "bytes32", "elements31", "elements32", "page15", "page16", "page23", "page24", "carry")
TARGETS = ("kv", "k", "v", "descale", "out", "table", "workspace", "slots")
_IN_ROWS = ("out", "table", "workspace", "slots")  # targets whose rows lie at the boundary, not pages
POSITIONS = ("straddling", "below", "above", "far")
_SUSPECT = 13  # number of the page at the boundary, where the page stride is free to put it there
_OTHERS = (5, 6, 7, 8, 9, 10)  # page ids of the pages that are no suspects: off page 0 to 3, where wrapped offsets lie
_SPARE = 3
_INDEX_SIZE = 4  # bytes of an entry of the page table
_DESCALE_SIZE = 4  # bytes of a descale
_SLOT_SIZE = 8  # bytes of an entry of a slot mapping


@dataclass(frozen=True)
class Geometry:
    """Where pages lie. `page_strides` (elements, by "k", "v" and "descale") holds the tensors whose addresses reach the
    boundary; `low_bits` (by the same names) are the low 32 bits that the address of the pool must have.
    """

    suspects: tuple[int, int]
    num_pages: int
    page_strides: dict[str, int]
    low_bits: dict[str, int]

    def pages(self, needed: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Page ids of every sequence, `needed` pages each."""
        ids = [self.suspects[0], *_OTHERS[: sum(needed) - 2], self.suspects[1]]
        starts = [sum(needed[:seq]) for seq in range(len(needed))]
        return tuple(tuple(ids[start : start + count]) for start, count in zip(starts, needed, strict=True))


def boundary_refusal(case: Case) -> str | None:
    """Why `case` cannot probe its boundary, in one sentence; None where it can, or has none."""
    if case.boundary is None:
        return None
    name, target = f"boundary {case.boundary}", case.boundary_target
    if target in _IN_ROWS:
        return _rows_refusal(case)
    if case.num_pages is not None:
        return f"{name}: it says itself how large the pool is: leave num_pages at none"
    count = sum(_pages_of(case, seq) for seq in range(case.rows.num_seqs))
    if not 2 <= count <= 2 + len(_OTHERS):
        return f"{name}: the batch has {count} pages of {case.page_size} tokens; a probe has 2 to {2 + len(_OTHERS)}"
    if case.boundary.startswith("page") and target != "kv":
        return f"{name}: K and V have the same page ids: the target is kv, not {target}"
    if case.num_q_heads % case.gqa_ratio:
        return f"{name}: gqa_ratio {case.gqa_ratio} does not divide {case.num_q_heads} query heads"
    if target == "descale" and (case.kv_dtype == "auto" or case.descales_per not in ("page", "token")):
        return f"{name}: only descales per page or token have pages: not those per {case.descales_per}"
    if target != "descale" and case.value_size != case.head_size:
        return f"{name}: K and V must have pages of the same size"
    if case.strides != "compact" or case.placement.kind != "shuffled":
        return f"{name}: it says where pages lie: leave strides and placement at their default"
    at = cache_geometry(case)
    assert at is not None
    first, last = _at(case)
    if case.boundary_position == "straddling" and first > last:
        return f"{name}: no page straddles it, as whole pages of {_page(case)} elements end there"
    if case.boundary_position == "straddling" and target == "descale" and case.num_kv_heads < 2:
        return f"{name}: of the descales of K and V of one KV head it can only cut off those of V"
    if min(at.suspects) <= max(_OTHERS):
        return f"{name}: pages of {_page(case)} elements are too large to lie {case.boundary_position} it"
    return None


def cache_geometry(case: Case) -> Geometry | None:
    """Where the pages of a probe of K, V or descales lie; None where `case` is no such."""
    if case.boundary is None or case.boundary_target in _IN_ROWS:
        return None
    reaching = ("k", "v") if case.boundary_target == "kv" else (case.boundary_target,)
    stride, (first, last) = _stride(case), _at(case)
    suspects = {
        "below": (first - 2, first - 1),
        "straddling": (first, first - 1),
        "above": (last + 1, last + 2),
        "far": (first * 9 // 4, first * 9 // 4 + 1),
    }[case.boundary_position]
    carry = (1 << 32) - _limit(case) * _size(case) if case.boundary == "carry" else 0
    strides = dict.fromkeys(reaching, stride)
    return Geometry(suspects, max(suspects) + 1 + _SPARE, strides, dict.fromkeys(reaching, carry))


@dataclass(frozen=True)
class RowGeometry:
    """Rows of the output or of the page table: the last one lies at the boundary, or at more than twice it. Of a list
    every entry is a row.
    """

    stride: int  # elements from row to row
    low_bits: int  # the low 32 bits that the address of the first must have


def output_geometry(case: Case) -> RowGeometry | None:
    """Where the tokens of the output lie; None where its addresses reach no boundary."""
    if case.boundary is None or case.boundary_target != "out":
        return None
    return _rows(case, case.rows.num_tokens - 1, case.num_q_heads * case.value_size, element_type(case.dtype).size)


def table_geometry(case: Case) -> RowGeometry | None:
    """Where the rows of the page table lie; None where its addresses reach no boundary."""
    if case.boundary is None or case.boundary_target != "table":
        return None
    if case.page_table == "kv_indices":
        pages = [_pages_of(case, seq) for seq in range(case.rows.num_seqs)]
        amid = carrying_sequence(case)
        return _list(sum(pages[: amid + 1]) - pages[amid] // 2, _INDEX_SIZE)
    return _rows(case, case.rows.num_seqs - 1, _pages_of(case, -1), _INDEX_SIZE)


def carrying_sequence(case: Case) -> int:
    """The sequence amid whose entries of a list of pages addresses carry: the last with two, as a kernel may add up
    right where a sequence begins and wrong what lies behind that.
    """
    return max(seq for seq in range(case.rows.num_seqs) if _pages_of(case, seq) > 1)


def slots_geometry(case: Case) -> RowGeometry | None:
    """Where the entries of the slot mapping lie; None where its addresses reach no boundary."""
    if case.boundary is None or case.boundary_target != "slots":
        return None
    return _list(_with_slots(case)[-1], _SLOT_SIZE)


def workspace_geometry(case: Case) -> Callable[[int, int, int], RowGeometry] | None:
    """Where the rows of a workspace lie whose last is number `last`, of `row` elements of `size` bytes; None where its
    addresses reach no boundary.
    """
    if case.boundary is None or case.boundary_target != "workspace":
        return None
    return functools.partial(_rows, case)


def _rows(case: Case, last: int, row: int, size: int) -> RowGeometry:
    """Row number `last`, `row` elements of `size` bytes long, at the boundary."""
    step = 16 // size if row * size >= 64 else 1
    if case.boundary == "carry":
        limit = last * row + row // 2 // step * step
        return RowGeometry(row, ((1 << 32) - limit * size) % (1 << 32))
    limit = (1 << int((case.boundary or "")[-2:])) // (size if (case.boundary or "").startswith("bytes") else 1)
    start = {
        "below": limit - row,
        "straddling": limit - row // 2,
        "above": limit + 2 * row,  # an unsigned wrap leads behind the first row
        "far": limit * 9 // 4,
    }[case.boundary_position]
    return RowGeometry(start // last // step * step, 0)


def _list(first: int, size: int) -> RowGeometry:
    """A list of entries of `size` bytes, of which number `first` is the first whose address carries."""
    return RowGeometry(1, (1 << 32) - first * size)


def _with_slots(case: Case) -> list[int]:
    """The new tokens that a writer stores."""
    found, token = [], 0
    for query_len, context_len in zip(case.rows.query_lens, case.rows.context_lens, strict=True):
        found += [token + i for i in range(query_len) if context_len + i >= 0]
        token += query_len
    return found


def _list_refusal(case: Case, count: int, between: str) -> str | None:
    """The same as boundary_refusal, for a list: addresses carry `between` two entries, of which there are `count`."""
    name = f"boundary {case.boundary} of {case.boundary_target}"
    if case.boundary != "carry":
        return f"{name}: entries of a list cannot lie far apart: its only boundary is the carry"
    if case.boundary_position != "straddling" or count < 2:
        return f"{name}: the carry lies between the entries of {between}: the position is straddling"
    return None


def _rows_refusal(case: Case) -> str | None:
    """The same as boundary_refusal, for the output, the page table, workspaces and the slot mapping."""
    if case.boundary_target == "slots":
        if case.writer is None:
            return f"boundary {case.boundary} of slots: only a writer has a slot mapping"
        if case.descales_per in ("page", "token"):
            return f"boundary {case.boundary} of slots: a wrong slot is one of page 0, which has no descales of its own"
        if any(0 in pages for pages in case.placement.pages):
            return f"boundary {case.boundary} of slots: a wrong slot is one of page 0: leave that to no sequence"
        return _list_refusal(case, len(_with_slots(case)), "two new tokens that are stored")
    if case.boundary_target == "table" and case.page_table == "kv_indices":
        most = max(_pages_of(case, seq) for seq in range(case.rows.num_seqs))
        return _list_refusal(case, most, "two pages of one sequence")
    name = f"boundary {case.boundary} of {case.boundary_target}"
    counts = {"out": case.rows.num_tokens, "table": case.rows.num_seqs}
    count = counts.get(case.boundary_target, 2)  # a workspace: as many as the kernel takes
    if (case.boundary or "").startswith("page"):
        return f"{name}: only K and V have page ids"
    if case.out_dtype != "auto" and case.boundary_target == "out":
        return f"{name}: its output has the dtype of the case: leave out_dtype at auto"
    if count < 2 or case.strides != "compact":
        return f"{name}: it needs two rows, and says itself how far apart they lie"
    if case.boundary == "carry" and (case.boundary_target == "table" or case.boundary_position != "straddling"):
        return f"{name}: a carry lies in the last row of output or workspace: the position is straddling"
    if at := table_geometry(case):
        row, limit = _pages_of(case, -1), 1 << int((case.boundary or "")[-2:])
        limit //= _INDEX_SIZE if (case.boundary or "").startswith("bytes") else 1
        first = at.stride * (count - 1)
        if case.boundary_position == "straddling" and not first < limit < first + row:
            return f"{name}: no row of {row} page ids straddles it"
    return None


def _pages_of(case: Case, seq: int) -> int:
    return -(-max(case.rows.seq_lens[seq], 0) // case.page_size)


def _size(case: Case) -> int:
    """Bytes of an element of what reaches the boundary."""
    return _DESCALE_SIZE if case.boundary_target == "descale" else element_type(case.stored_dtype).size


def _page(case: Case) -> int:
    """Elements of a page of K, which is as large as one of V; or of its descales."""
    if case.boundary_target != "descale":
        return case.page_size * case.num_kv_heads * case.head_size
    return case.num_kv_heads * (case.page_size if case.descales_per == "token" else 2)


def _step(case: Case) -> int:
    """Elements that addresses of rows are multiples of: 16 bytes, where a page is no smaller than a few of them."""
    return 16 // _size(case) if _page(case) * _size(case) >= 64 else 1


def _limit(case: Case) -> int:
    """The boundary, in elements from the start of the pool; in pages for boundaries of page ids."""
    name = case.boundary or ""
    if name == "carry":
        return _SUSPECT * _page(case) + _middle(case)
    exponent = int(name[-2:])
    return 1 << exponent if not name.startswith("bytes") else (1 << exponent) // _size(case)


def _middle(case: Case) -> int:
    """Half a page, cut to 16 bytes."""
    return _page(case) // 2 // _step(case) * _step(case)


def _stride(case: Case) -> int:
    """Elements from page to page of what reaches the boundary: whole pages where both do or the pool is small; else so
    many that the boundary cuts page _SUSPECT, or the next that it can, near its middle.
    """
    if case.boundary_target == "kv" or case.boundary == "carry":
        return _page(case)
    limit, step = _limit(case), _step(case)
    strides = {number: (limit - _middle(case)) // number // step * step for number in range(_SUSPECT, 4 * _SUSPECT)}
    cut = (stride for number, stride in strides.items() if number * stride < limit < number * stride + _page(case))
    return next(cut, strides[_SUSPECT])


def _at(case: Case) -> tuple[int, int]:
    """The page that the boundary cuts, twice; where none is cut, the first behind the boundary and the last before."""
    limit = _limit(case)
    if (case.boundary or "").startswith("page"):
        return limit, limit
    page, inside = divmod(limit, _stride(case))
    if inside == 0:
        return page, page - 1
    return (page, page) if inside < _page(case) else (page + 1, page)
