"""Reads the conditions of a matrix: its constraints, and the failures it expects.

Invariant: every condition can be decided for every case; an expectation has a reason, a link and a date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date

from yaml import MappingNode, Node

from harness.matrix.expect import EXPECTABLE, Expectation
from harness.matrix.matrix import Rule
from harness.matrix.reading import Entries, Reader
from harness.matrix.source import Mistake, items, one_of, span_of, text, unknown_keys

EXPECT_KEYS = ("where", "outcome", "because", "issue", "until")


def read_rules(reader: Reader, entries: Entries) -> Iterator[Rule]:
    """The constraints of the matrix with these `entries`."""
    with reader.source.collect():
        for node in items(entries["constraints"][1], "constraints") if "constraints" in entries else ():
            with reader.source.collect():
                yield _rule(reader, node)


def _rule(reader: Reader, node: Node) -> Rule:
    if not isinstance(node, MappingNode):
        return Rule(reader.where(node), "", span_of(node))
    fields = reader.source.entries(node, "a constraint")
    for mistake in unknown_keys(fields, ("require", "because"), "constraint key"):
        reader.source.add(mistake)
    if "require" not in fields:
        raise Mistake(span_of(node), "the constraint has no 'require'")
    because = text(fields["because"][1], "because") if "because" in fields else ""
    return Rule(reader.where(fields["require"][1]), because, span_of(fields["require"][1]))


def read_expectations(reader: Reader, entries: Entries) -> Iterator[Expectation]:
    """The expectations of the matrix with these `entries`."""
    with reader.source.collect():
        for node in items(entries["expect"][1], "expect") if "expect" in entries else ():
            with reader.source.collect():
                yield _expectation(reader, node)


def _expectation(reader: Reader, node: Node) -> Expectation:
    fields = reader.source.entries(node, "an expectation")
    for mistake in unknown_keys(fields, EXPECT_KEYS, "expectation key"):
        reader.source.add(mistake)
    missing = [key for key in EXPECT_KEYS if key not in fields]
    if missing:
        raise Mistake(span_of(node), f"the expectation has no {', '.join(missing)}")
    nodes = {key: fields[key][1] for key in EXPECT_KEYS}
    outcome = one_of(text(nodes["outcome"], "outcome"), EXPECTABLE, "outcome to expect", span_of(nodes["outcome"]))
    issue = text(nodes["issue"], "issue")
    if not re.fullmatch(r"https?://\S+", issue):
        raise Mistake(span_of(nodes["issue"]), f"issue is a link (https://...), not '{issue}'")
    word = text(nodes["until"], "until")
    try:
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", word):
            raise ValueError(word)
        until = date.fromisoformat(word)
    except ValueError:
        raise Mistake(span_of(nodes["until"]), f"until is a date such as 2027-03-01, not '{word}'") from None
    because = text(nodes["because"], "because")
    return Expectation(reader.where(nodes["where"]), outcome, because, issue, until, span_of(node).line)
