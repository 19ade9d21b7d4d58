"""Reads the tiers of a matrix. Invariant: a tier that was read selects in exactly one way: cover, full or list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from yaml import Node, ScalarNode

from harness.matrix.matrix import TIERS, Entry, Tier, Values
from harness.matrix.reading import Entries, Reader
from harness.matrix.source import Mistake, Span, items, span_of, text, unknown_keys

TIER_KEYS: Mapping[str, str] = {
    "cover": "2 or 3: every possible pair or triple of values occurs",
    "full": "true: every possible combination",
    "list": "these cases only",
    "shrink": "values that replace those of the matrix in this tier",
    "also": "cases beside the cover or product",
}


def read_tiers(reader: Reader, entries: Entries) -> dict[str, Tier]:
    """The tiers of the matrix with these `entries`, by name."""
    found: dict[str, Tier] = {}
    with reader.source.collect():
        named = reader.source.entries(entries["tiers"][1], "tiers") if "tiers" in entries else {}
        for mistake in unknown_keys(named, TIERS, "tier"):
            reader.source.add(mistake)
        for name, (key, node) in named.items():
            with reader.source.collect():
                found[name] = _tier(reader, name, span_of(key), node)
    return found


def _tier(reader: Reader, name: str, span: Span, node: Node) -> Tier:
    if isinstance(node, ScalarNode):
        if node.value != "full":
            raise Mistake(span_of(node), f"a tier is full or a mapping such as {{cover: 2}}, not '{node.value}'")
        return Tier(name, span, full=True)
    fields = reader.source.entries(node, f"tier '{name}'")
    for mistake in unknown_keys(fields, TIER_KEYS, "tier key"):
        reader.source.add(mistake)
    chosen = [key for key in ("cover", "full", "list") if key in fields]
    if len(chosen) != 1:
        have = " and ".join(chosen) or "none of them"
        raise Mistake(span, f"tier '{name}' needs one of cover, full and list; it has {have}")
    chosen_node = fields[chosen[0]][1]
    cover = None
    if "cover" in fields:
        if (word := text(chosen_node, "cover")) not in ("2", "3"):
            raise Mistake(span_of(chosen_node), f"cover is 2 or 3, not '{word}'")
        cover = int(word)
    if "full" in fields and (word := text(chosen_node, "full")) != "true":
        raise Mistake(span_of(chosen_node), f"full is true or left out, not '{word}'")
    shrink: Values | None = None
    if "shrink" in fields:
        shrink = reader.one_or_more(reader.source.entries(fields["shrink"][1], "shrink"), "shrink")
    entries = (*_entries(reader, fields, "list"), *_entries(reader, fields, "also"))
    return Tier(name, span, cover, "full" in fields, entries, shrink)


def _entries(reader: Reader, fields: Entries, key: str) -> Iterator[Entry]:
    for node in items(fields[key][1], key) if key in fields else ():
        with reader.source.collect():
            yield Entry(reader.one_or_more(reader.source.entries(node, "an entry"), key), span_of(node))
