"""Types of axes: how values are read from YAML, written into ids, and described to editors.

Invariant: a type takes what it names and nothing else; every other node is a Mistake with its place.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from yaml import MappingNode, Node

from harness.case import Placement
from harness.matrix.expression import Kind
from harness.matrix.rows import SHARED_ROWS, RowMix, check_name, parse_mix
from harness.matrix.source import Mistake, Source, items, one_of, span_of, suggestion, text, unknown_keys

PLACEMENTS = ("shuffled", "sequential", "reversed", "shared_prefix")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
Schema = dict[str, Any]


@dataclass
class Vocabulary:
    """What names may be used in one matrix. `kernels` and `writers` are None where any name is taken; inline mixes join
    `mixes`.
    """

    source: Source
    kernels: Collection[str] | None = None
    mixes: dict[str, RowMix] = field(default_factory=dict)
    writers: Collection[str] | None = None


class AxisType(Protocol):
    """How the values of an axis are read, written into ids, and described to editors."""

    @property
    def kind(self) -> Kind: ...

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> Any: ...

    def schema(self) -> Schema: ...


@dataclass(frozen=True)
class Number:
    """A number; `whole` numbers refuse 1e-2 and 0.5, `optional` ones take none (absent)."""

    minimum: float
    whole: bool = True
    optional: bool = False
    exclusive: bool = False
    kind: Kind = "number"

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> float | int | None:
        word = text(node, name)
        if self.optional and word == "none":
            return None
        if not (_INTEGER if self.whole else _NUMBER).fullmatch(word):
            raise Mistake(span_of(node), f"{name} is {self._words()}, not '{word}'")
        value = int(word) if self.whole else float(word)
        if value < self.minimum or (self.exclusive and value == self.minimum):
            raise Mistake(span_of(node), f"{name} is {self._words()}, not {word}")
        return value

    def _words(self) -> str:
        bound = f"{'above' if self.exclusive else 'of at least'} {self.minimum:g}"
        return f"a {'whole ' if self.whole else ''}number {bound}{' or none' if self.optional else ''}"

    def schema(self) -> Schema:
        bound = "exclusiveMinimum" if self.exclusive else "minimum"
        number: Schema = {"type": "integer" if self.whole else "number", bound: self.minimum}
        return {"anyOf": [number, {"const": "none"}]} if self.optional else number


@dataclass(frozen=True)
class Flag:
    """true or false; nothing else, so that `no` cannot quietly mean false."""

    kind: Kind = "truth"

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> bool:
        word = text(node, name)
        if word not in ("true", "false"):
            raise Mistake(span_of(node), f"{name} is true or false, not '{word}'")
        return word == "true"

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]
    noun: str = ""  # what a word is, where the name of the axis does not say
    optional: bool = False  # whether none (absent) is taken as well
    kind: Kind = "text"

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> str | None:
        word = one_of(text(node, name), self._taken(), self.noun or name, span_of(node))
        return None if self.optional and word == "none" else word

    def schema(self) -> Schema:
        return {"enum": list(self._taken())}

    def _taken(self) -> tuple[str, ...]:
        return (*self.words, "none") if self.optional else self.words


@dataclass(frozen=True)
class KernelName:
    """The name of a kernel that was found."""

    kind: Kind = "text"

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> str:
        word = text(node, name)
        if vocabulary.kernels is None:
            return check_name(word, span_of(node), "kernel")
        if word in (vocabulary.writers or ()):
            raise Mistake(span_of(node), f"{word} is a writer: name it with `writer:`, beside an attention kernel")
        return one_of(word, vocabulary.kernels, "kernel", span_of(node))

    def schema(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True)
class WriterName:
    """The name of a cache writer that was found, or none."""

    kind: Kind = "text"

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> str | None:
        word = text(node, name)
        if word == "none":
            return None
        if vocabulary.writers is None:
            return check_name(word, span_of(node), "writer")
        return one_of(word, (*vocabulary.writers, "none"), "writer", span_of(node))

    def schema(self) -> Schema:
        return {"type": "string"}


@dataclass(frozen=True)
class RowsValue:
    """The name of a row mix, or a mix written in place with a `name`."""

    kind: Kind = "text"

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> RowMix:
        if not isinstance(node, MappingNode):
            word = text(node, name)
            if word not in vocabulary.mixes:
                raise Mistake(span_of(node), f"unknown row mix '{word}'{self._advice(word, vocabulary)}")
            return vocabulary.mixes[word]
        label = _label(node, "a row mix in place", vocabulary.source)
        mix = parse_mix(vocabulary.source, node, label)
        if vocabulary.mixes.setdefault(label, mix) != mix:
            raise Mistake(span_of(node), f"row mix '{label}' is already defined otherwise")
        return mix

    @staticmethod
    def _advice(word: str, vocabulary: Vocabulary) -> str:
        near = suggestion(word, vocabulary.mixes)
        return near or f". Define it under row_mixes, or in {SHARED_ROWS} beside this file"

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string"}, {"$ref": "#/definitions/row_mix_in_place"}]}


@dataclass(frozen=True)
class PlacementValue:
    """A kind of placement, or explicit page ids per sequence: {name: straddle, pages: [[4, 3], [7]]}."""

    kind: Kind = "text"

    def parse(self, node: Node, name: str, vocabulary: Vocabulary) -> Placement:
        if not isinstance(node, MappingNode):
            word = one_of(text(node, name), PLACEMENTS, "placement", span_of(node))
            return Placement(word, word)
        label = _label(node, "an explicit placement", vocabulary.source)
        if label in PLACEMENTS:
            raise Mistake(span_of(node), f"'{label}' is a kind of placement: give the explicit one another name")
        entries = vocabulary.source.entries(node, name)
        for mistake in unknown_keys(entries, ("name", "pages"), "placement key"):
            vocabulary.source.add(mistake)
        if "pages" not in entries:
            raise Mistake(span_of(node), f"placement '{label}' has no pages")
        page = Number(0)
        rows = tuple(
            tuple(int(page.parse(cell, "a page id", vocabulary) or 0) for cell in items(row, "a row of pages"))
            for row in items(entries["pages"][1], "pages")
        )
        return Placement("explicit", label, rows)

    def schema(self) -> Schema:
        pages = {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}}
        explicit = {
            "type": "object",
            "properties": {"name": {"type": "string"}, "pages": pages},
            "required": ["name", "pages"],
            "additionalProperties": False,
        }
        return {"anyOf": [{"enum": list(PLACEMENTS)}, explicit]}


def _label(node: Node, what: str, source: Source) -> str:
    entries = source.entries(node, what)
    if "name" not in entries:
        raise Mistake(span_of(node), f"{what} needs a name, which ids spell")
    name = entries["name"][1]
    return check_name(text(name, "name"), span_of(name), what.split()[-1])
