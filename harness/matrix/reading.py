"""Reads the parts that all sections of a matrix have in common: values of axes, numbers and conditions.

Invariant: a value that was read is of the type its axis declares, and its place is remembered for later messages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from yaml import Node, ScalarNode, SequenceNode

from harness.matrix.axes import ALIASES, AXES, axis_name
from harness.matrix.axis_types import Number, Vocabulary
from harness.matrix.expression import ExpressionError
from harness.matrix.matrix import Values
from harness.matrix.source import Mistake, Source, Span, items, span_of, span_within, text, unknown_keys
from harness.matrix.where import Where

Entries = Mapping[str, tuple[Node, Node]]  # {key: (key node, value node)}


class Reader:
    """One file being read: where mistakes go, what names are known, and where values stand."""

    def __init__(self, source: Source, vocabulary: Vocabulary) -> None:
        self.source, self.vocabulary = source, vocabulary
        self.spans: dict[tuple[str, Any], Span] = {}  # of (axis, value)

    def axes_of(self, entries: Entries) -> Iterator[tuple[str, Node, Node]]:
        for mistake in unknown_keys(entries, (*AXES, *ALIASES), "axis"):
            self.source.add(mistake)
        for key, (key_node, node) in entries.items():
            if axis_name(key) in AXES:
                yield axis_name(key), key_node, node

    def value(self, axis: str, node: Node) -> Any:
        value = AXES[axis].parse(node, self.vocabulary)
        self.spans.setdefault((axis, value), span_of(node))
        return value

    def list_of(self, axis: str, node: Node, what: str) -> tuple[Any, ...]:
        found: list[Any] = []
        for element in items(node, what):
            with self.source.collect():
                value = self.value(axis, element)
                if value in found:
                    raise Mistake(span_of(element), f"{what} lists {text_of(element)} twice")
                found.append(value)
        return tuple(found)

    def one_or_more(self, entries: Entries, what: str) -> Values:
        """{axis: values} of shrink, list and also, where a single value may stand for a list of one."""
        found: dict[str, tuple[Any, ...]] = {}
        for axis, key, node in self.axes_of(entries):
            with self.source.collect():
                if axis in found:
                    raise Mistake(span_of(key), f"axis '{axis}' already has values elsewhere")
                several = isinstance(node, SequenceNode)
                found[axis] = self.list_of(axis, node, f"{what}.{axis}") if several else (self.value(axis, node),)
        return found

    def where(self, node: Node) -> Where:
        condition = text(node, "a condition")
        words: dict[str, Collection[str]] = {"rows": tuple(self.vocabulary.mixes)}
        if self.vocabulary.kernels is not None:
            words["kernel"] = self.vocabulary.kernels
        try:
            return Where.parse(condition, words)
        except ExpressionError as error:
            raise Mistake(span_within(node, error.offset, error.width), error.what) from None

    def number(self, node: Node, name: str, kind: Number) -> float:
        return float(kind.parse(node, name, self.vocabulary) or 0)


def text_of(node: Node) -> str:
    """A scalar as written, for messages."""
    return str(node.value) if isinstance(node, ScalarNode) else "a value"
