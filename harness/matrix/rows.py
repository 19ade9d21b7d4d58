"""Row mixes: how a matrix says which sequences form the batch, and how that becomes harness.case.Rows.

Invariant: a mix is pure data; the lengths it resolves to depend on page_size, sliding_window and geometry_seed only
(ROWS_AXES), and are the same on every machine. A combination for which a mix has no meaning (a window edge without a
window, a length out of range) resolves to None and is left out of products.

A mix is written as two lists of one entry per sequence, an entry being a number or arithmetic over page_size,
sliding_window and, in context_lens, query_len (of the same row):

    page_edges: {query_lens: [1, 1, 5], context_lens: [2*page_size - query_len, 2*page_size - 1 - query_len, 0]}

or as a draw from inclusive ranges, in which `first` or `last` may be made a decode row (query_len 1):

    mixed10: {num_seqs: 10, query_lens: 16..1024, context_lens: 16..1024, last: decode}
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from yaml import Node, ScalarNode

from harness.case import Rows
from harness.matrix.expression import Expression, ExpressionError, Kind, parse_expression
from harness.matrix.source import (
    Mistake,
    Source,
    Span,
    items,
    span_of,
    span_within,
    text,
    unknown_keys,
)

ROWS_AXES = frozenset({"rows", "page_size", "sliding_window", "geometry_seed"})
SHARED_ROWS = "rows.yaml"  # beside the matrices: mixes that all of them may name; not a matrix itself
NAME = re.compile(r"[A-Za-z0-9_.]+")

LISTED_KEYS = ("query_lens", "context_lens")
DRAWN_KEYS = (*LISTED_KEYS, "num_seqs", "first", "last")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_QUERY_NAMES: Mapping[str, Kind] = {"page_size": "number", "sliding_window": "number"}
_CONTEXT_NAMES: Mapping[str, Kind] = {**_QUERY_NAMES, "query_len": "number"}


@dataclass(frozen=True)
class Drawn:
    """A batch drawn from inclusive ranges; `decode` are the rows (0 or -1) whose query_len is set to 1."""

    num_seqs: int
    query_lens: tuple[int, int]
    context_lens: tuple[int, int]
    decode: tuple[int, ...]


@dataclass(frozen=True)
class RowMix:
    """A named batch. `listed` holds the texts of (query_len, context_len) per sequence; or `drawn` is set."""

    name: str
    listed: tuple[tuple[str, str], ...] = ()
    drawn: Drawn | None = None

    def resolve(self, page_size: int, sliding_window: int | None, geometry_seed: int) -> Rows | None:
        """The batch for these axis values, or None where the mix has no meaning for them."""
        pairs = self._draw(geometry_seed) if self.drawn else self._list(page_size, sliding_window)
        found = tuple(pairs)
        if any(q is None or c is None or q < 1 or c < -q for q, c in found):
            return None
        return Rows(self.name, tuple(q for q, _ in found if q), tuple(c for _, c in found if c is not None))

    def _list(self, page_size: int, sliding_window: int | None) -> Iterator[tuple[int | None, int | None]]:
        values: dict[str, int | None] = {"page_size": page_size, "sliding_window": sliding_window}
        for query, context in self.listed:
            values["query_len"] = _entry(query, _QUERY_NAMES).evaluate(values.__getitem__)
            yield values["query_len"], _entry(context, _CONTEXT_NAMES).evaluate(values.__getitem__)

    def _draw(self, geometry_seed: int) -> Iterator[tuple[int, int]]:
        assert self.drawn is not None
        rng = random.Random(geometry_seed)
        query_lens = [rng.randint(*self.drawn.query_lens) for _ in range(self.drawn.num_seqs)]
        context_lens = [rng.randint(*self.drawn.context_lens) for _ in range(self.drawn.num_seqs)]
        for row in self.drawn.decode:
            query_lens[row] = 1
        return zip(query_lens, context_lens, strict=True)


_ENTRIES: dict[tuple[str, bool], Expression] = {}  # parsed entries by text: the same few texts resolve again and again


def _entry(entry: str, names: Mapping[str, Kind]) -> Expression:
    key = (entry, names is _CONTEXT_NAMES)
    if key not in _ENTRIES:
        _ENTRIES[key] = parse_expression(entry, names, {})
    return _ENTRIES[key]


def parse_mix(source: Source, node: Node, name: str) -> RowMix:
    """A mix from its mapping. Raises or notes Mistakes: unknown keys, unequal lengths, bad ranges and entries."""
    what = f"row mix '{name}'"
    entries = {key: pair for key, pair in source.entries(node, what).items() if key != "name"}
    drawn = "num_seqs" in entries
    for mistake in unknown_keys(entries, DRAWN_KEYS if drawn else LISTED_KEYS, "row mix key"):
        source.add(mistake)
    for key in LISTED_KEYS:
        if key not in entries:
            raise Mistake(span_of(node), f"{what} has no {key}")
    values = {key: value for key, (_, value) in entries.items()}
    return _parse_drawn(values, name, what) if drawn else _parse_listed(values, name, what)


def _parse_listed(values: Mapping[str, Node], name: str, what: str) -> RowMix:
    queries = [_entry_text(node, _QUERY_NAMES) for node in items(values["query_lens"], f"query_lens of {what}")]
    contexts = [_entry_text(node, _CONTEXT_NAMES) for node in items(values["context_lens"], f"context_lens of {what}")]
    if len(queries) != len(contexts):
        lengths = f"{len(queries)} query_lens and {len(contexts)} context_lens"
        raise Mistake(span_of(values["context_lens"]), f"{what} has {lengths}: one of each per sequence")
    return RowMix(name, listed=tuple(zip(queries, contexts, strict=True)))


def _entry_text(node: Node, names: Mapping[str, Kind]) -> str:
    entry = text(node, "a length").strip()
    try:
        expression = parse_expression(entry, names, {})
    except ExpressionError as error:
        raise Mistake(span_within(node, error.offset, error.width), error.what) from None
    if expression.kind != "number":
        raise Mistake(span_of(node), f"a length is a number, not '{entry}'")
    if not expression.names and not isinstance(expression.evaluate(lambda _: None), int):
        raise Mistake(span_of(node), f"a length is a whole number, not '{entry}'")
    if "/" in entry.replace("//", ""):
        raise Mistake(span_of(node), "a length is a whole number: divide with //")
    return entry


def _parse_drawn(values: Mapping[str, Node], name: str, what: str) -> RowMix:
    count = text(values["num_seqs"], "num_seqs")
    if not count.isdigit() or int(count) < 1:
        raise Mistake(span_of(values["num_seqs"]), f"num_seqs is a whole number of at least 1, not '{count}'")
    decode = []
    for key, row in (("first", 0), ("last", -1)):
        if key in values:
            if (word := text(values[key], key)) != "decode":
                raise Mistake(span_of(values[key]), f"{key} is decode or left out, not '{word}'")
            decode.append(row)
    queries = _range(values["query_lens"], f"query_lens of {what}", 1)
    contexts = _range(values["context_lens"], f"context_lens of {what}", -1)
    return RowMix(name, drawn=Drawn(int(count), queries, contexts, tuple(decode)))


def _range(node: Node, what: str, smallest: int) -> tuple[int, int]:
    found = _RANGE.fullmatch(node.value) if isinstance(node, ScalarNode) else None
    if not found:
        raise Mistake(span_of(node), f"{what} is a range such as 16..1024 (num_seqs asks for a draw)")
    low, high = int(found[1]), int(found[2])
    if not smallest <= low <= high:
        raise Mistake(span_of(node), f"{what}: {low}..{high} is empty or starts below {smallest}")
    return low, high


def parse_mixes(source: Source, node: Node, what: str) -> dict[str, RowMix]:
    """{name: mix} of a `row_mixes:` section or of the whole of rows.yaml; mistakes are noted on `source`."""
    found: dict[str, RowMix] = {}
    with source.collect():
        for name, (key, value) in source.entries(node, what).items():
            found[name] = RowMix(name, (("1", "0"),))  # stands in, so that a broken mix is not unknown as well
            with source.collect():
                found[name] = parse_mix(source, value, check_name(name, span_of(key), "row mix"))
    return found


def check_name(name: str, span: Span, what: str) -> str:
    """A name that may stand in an id: letters, digits, underscores and dots."""
    if not NAME.fullmatch(name):
        raise Mistake(span, f"the name of a {what} holds letters, digits, _ and . only, not '{name}'")
    return name
