"""Reads one matrix file into a Matrix, or says everything that is wrong with it.

Invariant: nothing is guessed. A key, name or value that is not known is a mistake with its place, and all mistakes of
a file are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from yaml import MappingNode, Node, ScalarNode, SequenceNode

from harness.matrix.axes import ALIASES, AXES, Number, Vocabulary, axis_name
from harness.matrix.expand import check_tier
from harness.matrix.expect import EXPECTABLE, Expectation
from harness.matrix.expression import ExpressionError
from harness.matrix.matrix import FAULTS, NOISE_FLOORS, TIERS, Entry, Matrix, Rule, Tier, Values
from harness.matrix.rows import SHARED_ROWS, RowMix, parse_mixes
from harness.matrix.source import (
    Mistake,
    Source,
    Span,
    items,
    one_of,
    span_of,
    span_within,
    text,
    unknown_keys,
)
from harness.matrix.where import Where

KEYS: Mapping[str, str] = {
    "matrix": "name of the matrix; ids begin with it",
    "about": "one sentence: what is swept, and why",
    "kernels": "the kernels under test",
    "fixed": "axes with one value",
    "axes": "axes with several values; the first is the plain one, which list entries get",
    "row_mixes": "batches by name, for the axis 'rows'; more are shared in rows.yaml",
    "constraints": "conditions that every case meets",
    "must_see": "faults that every case must be able to see; a case that cannot is BLIND",
    "margin": "how many tolerances a fault of must_see has to move some output by; 8 unless given",
    "legacy_tolerance": "{atol, rtol} of another test suite: attnreg audit measures with it, runs do not",
    "noise_floor": "report or fail: compare each case's error with that of its twin with one page per sequence",
    "tiers": "which cases run when",
    "expect": "known failures, each with a reason, a link and a date",
}
REQUIRED_KEYS = ("matrix", "about", "kernels", "tiers")
TIER_KEYS: Mapping[str, str] = {
    "cover": "2 or 3: every possible pair or triple of values occurs",
    "full": "true: every possible combination",
    "list": "these cases only",
    "shrink": "values that replace those of the matrix in this tier",
    "also": "cases beside the cover or product",
}
LEGACY_KEYS = ("atol", "rtol")
EXPECT_KEYS = ("where", "outcome", "because", "issue", "until")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_Entries = Mapping[str, tuple[Node, Node]]


def load(path: Path | str, *, kernel_names: Collection[str] | None = None) -> Matrix:
    """The matrix at `path`; names of kernels are checked where `kernel_names` is given.

    Raises MatrixError with all mistakes in the file (or in the shared rows beside it).
    """
    path = Path(path)
    source = Source.read(path)
    vocabulary = Vocabulary(source, kernel_names, shared_mixes(path.parent))
    return _Loader(path, source, vocabulary).run()


def shared_mixes(folder: Path) -> dict[str, RowMix]:
    """The row mixes of rows.yaml in `folder`; none where there is no such file. Raises MatrixError."""
    path = folder / SHARED_ROWS
    if not path.exists():
        return {}
    source = Source.read(path)
    mixes = parse_mixes(source, source.root(), SHARED_ROWS)
    source.finish()
    return mixes


class _Loader:
    def __init__(self, path: Path, source: Source, vocabulary: Vocabulary) -> None:
        self.path, self.source, self.vocabulary = path, source, vocabulary
        self.spans: dict[tuple[str, Any], Span] = {}

    def run(self) -> Matrix:
        with self.source.collect():
            return self._read(self.source.entries(self.source.root(), "a matrix"))
        raise self.source.error()

    def _read(self, entries: _Entries) -> Matrix:
        for mistake in unknown_keys(entries, KEYS, "key"):
            self.source.add(mistake)
        for key in REQUIRED_KEYS:
            if key not in entries:
                self.source.add(Mistake(Span(1, 1), f"the matrix has no '{key}'"))
        name = about = ""
        with self.source.collect():
            name = self._name(entries)
        with self.source.collect():
            about = text(entries["about"][1], "about") if "about" in entries else ""
        self._mixes(entries)
        values = self._values(entries)
        tiers = self._tiers(entries)  # before expressions: rows defined in place may be named there
        rules = tuple(self._rules(entries))
        must_see = tuple(self._must_see(entries))
        expectations = tuple(self._expectations(entries))
        margin, legacy_tolerance = self._margin(entries), self._legacy_tolerance(entries)
        noise_floor = self._noise_floor(entries)
        self.source.finish()
        matrix = Matrix(
            self.path,
            name,
            about,
            values,
            rules,
            must_see,
            tiers,
            expectations,
            self.source,
            self.spans,
            margin,
            legacy_tolerance,
            noise_floor,
        )
        noted: set[Span] = set()
        for tier in tiers.values():  # what is wrong in one place is wrong once, however many tiers meet it
            for mistake in [m for m in check_tier(matrix, tier) if m.span not in noted]:
                noted.add(mistake.span)
                self.source.add(mistake)
        self.source.finish()
        return matrix

    def _name(self, entries: _Entries) -> str:
        if "matrix" not in entries:
            return ""
        node = entries["matrix"][1]
        name = text(node, "matrix")
        if not _NAME.fullmatch(name):
            raise Mistake(span_of(node), f"matrix is a name of a-z, 0-9 and _, not '{name}'")
        return name

    def _mixes(self, entries: _Entries) -> None:
        if "row_mixes" not in entries:
            return
        for name, mix in parse_mixes(self.source, entries["row_mixes"][1], "row_mixes").items():
            if name in self.vocabulary.mixes:
                self.source.add(Mistake(span_of(entries["row_mixes"][0]), f"row mix '{name}' is also in {SHARED_ROWS}"))
            self.vocabulary.mixes[name] = mix

    def _values(self, entries: _Entries) -> Values:
        found: dict[str, tuple[Any, ...]] = {}
        with self.source.collect():
            if "kernels" in entries:
                found["kernel"] = self._list_of("kernel", entries["kernels"][1], "kernels")
        for section, several in (("fixed", False), ("axes", True)):
            with self.source.collect():
                if section not in entries:
                    continue
                for axis, key, node in self._axes_of(self.source.entries(entries[section][1], section)):
                    with self.source.collect():
                        if axis == "kernel":
                            raise Mistake(span_of(key), "the kernels of a matrix go under 'kernels'")
                        if axis in found:
                            raise Mistake(span_of(key), f"axis '{axis}' already has values elsewhere")
                        if several:
                            found[axis] = self._list_of(axis, node, f"axes.{axis}")
                        else:
                            found[axis] = (self._value(axis, node),)
        return {axis: found[axis] for axis in AXES if axis in found}

    def _axes_of(self, entries: _Entries) -> Iterator[tuple[str, Node, Node]]:
        for mistake in unknown_keys(entries, (*AXES, *ALIASES), "axis"):
            self.source.add(mistake)
        for key, (key_node, node) in entries.items():
            if axis_name(key) in AXES:
                yield axis_name(key), key_node, node

    def _value(self, axis: str, node: Node) -> Any:
        value = AXES[axis].parse(node, self.vocabulary)
        self.spans.setdefault((axis, value), span_of(node))
        return value

    def _list_of(self, axis: str, node: Node, what: str) -> tuple[Any, ...]:
        found: list[Any] = []
        for element in items(node, what):
            with self.source.collect():
                value = self._value(axis, element)
                if value in found:
                    raise Mistake(span_of(element), f"{what} lists {text_of(element)} twice")
                found.append(value)
        return tuple(found)

    def _one_or_more(self, entries: _Entries, what: str) -> Values:
        """{axis: values} of shrink, list and also, where a single value may stand for a list of one."""
        found: dict[str, tuple[Any, ...]] = {}
        for axis, key, node in self._axes_of(entries):
            with self.source.collect():
                if axis in found:
                    raise Mistake(span_of(key), f"axis '{axis}' already has values elsewhere")
                several = isinstance(node, SequenceNode)
                found[axis] = self._list_of(axis, node, f"{what}.{axis}") if several else (self._value(axis, node),)
        return found

    def _rules(self, entries: _Entries) -> Iterator[Rule]:
        with self.source.collect():
            for node in items(entries["constraints"][1], "constraints") if "constraints" in entries else ():
                with self.source.collect():
                    yield self._rule(node)

    def _rule(self, node: Node) -> Rule:
        if not isinstance(node, MappingNode):
            return Rule(self._where(node), "", span_of(node))
        fields = self.source.entries(node, "a constraint")
        for mistake in unknown_keys(fields, ("require", "because"), "constraint key"):
            self.source.add(mistake)
        if "require" not in fields:
            raise Mistake(span_of(node), "the constraint has no 'require'")
        because = text(fields["because"][1], "because") if "because" in fields else ""
        return Rule(self._where(fields["require"][1]), because, span_of(fields["require"][1]))

    def _where(self, node: Node) -> Where:
        condition = text(node, "a condition")
        words: dict[str, Collection[str]] = {"rows": tuple(self.vocabulary.mixes)}
        if self.vocabulary.kernels is not None:
            words["kernel"] = self.vocabulary.kernels
        try:
            return Where.parse(condition, words)
        except ExpressionError as error:
            raise Mistake(span_within(node, error.offset, error.width), error.what) from None

    def _must_see(self, entries: _Entries) -> Iterator[str]:
        with self.source.collect():
            for node in items(entries["must_see"][1], "must_see") if "must_see" in entries else ():
                with self.source.collect():
                    yield one_of(text(node, "a fault"), FAULTS, "fault", span_of(node))

    def _margin(self, entries: _Entries) -> float:
        margin = Matrix.margin
        with self.source.collect():
            if "margin" in entries:
                margin = self._number(entries["margin"][1], "margin", Number(1, whole=False))
        return margin

    def _noise_floor(self, entries: _Entries) -> str:
        found = Matrix.noise_floor
        with self.source.collect():
            if "noise_floor" in entries:
                node = entries["noise_floor"][1]
                found = one_of(text(node, "noise_floor"), NOISE_FLOORS, "noise_floor", span_of(node))
        return found

    def _legacy_tolerance(self, entries: _Entries) -> tuple[float, float] | None:
        if "legacy_tolerance" not in entries:
            return None
        found: tuple[float, float] | None = None
        with self.source.collect():
            node = entries["legacy_tolerance"][1]
            fields = self.source.entries(node, "legacy_tolerance")
            for mistake in unknown_keys(fields, LEGACY_KEYS, "tolerance"):
                self.source.add(mistake)
            if missing := [key for key in LEGACY_KEYS if key not in fields]:
                raise Mistake(span_of(node), f"legacy_tolerance has no {' and no '.join(missing)}")
            atol, rtol = (self._number(fields[key][1], key, Number(0, whole=False)) for key in LEGACY_KEYS)
            found = atol, rtol
        return found

    def _number(self, node: Node, name: str, kind: Number) -> float:
        return float(kind.parse(node, name, self.vocabulary) or 0)

    def _tiers(self, entries: _Entries) -> dict[str, Tier]:
        found: dict[str, Tier] = {}
        with self.source.collect():
            named = self.source.entries(entries["tiers"][1], "tiers") if "tiers" in entries else {}
            for mistake in unknown_keys(named, TIERS, "tier"):
                self.source.add(mistake)
            for name, (key, node) in named.items():
                with self.source.collect():
                    found[name] = self._tier(name, span_of(key), node)
        return found

    def _tier(self, name: str, span: Span, node: Node) -> Tier:
        if isinstance(node, ScalarNode):
            if node.value != "full":
                raise Mistake(span_of(node), f"a tier is full or a mapping such as {{cover: 2}}, not '{node.value}'")
            return Tier(name, span, full=True)
        fields = self.source.entries(node, f"tier '{name}'")
        for mistake in unknown_keys(fields, TIER_KEYS, "tier key"):
            self.source.add(mistake)
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
            shrink = self._one_or_more(self.source.entries(fields["shrink"][1], "shrink"), "shrink")
        entries = (*self._entries(fields, "list"), *self._entries(fields, "also"))
        return Tier(name, span, cover, "full" in fields, entries, shrink)

    def _entries(self, fields: _Entries, key: str) -> Iterator[Entry]:
        for node in items(fields[key][1], key) if key in fields else ():
            with self.source.collect():
                yield Entry(self._one_or_more(self.source.entries(node, "an entry"), key), span_of(node))

    def _expectations(self, entries: _Entries) -> Iterator[Expectation]:
        with self.source.collect():
            for node in items(entries["expect"][1], "expect") if "expect" in entries else ():
                with self.source.collect():
                    yield self._expectation(node)

    def _expectation(self, node: Node) -> Expectation:
        fields = self.source.entries(node, "an expectation")
        for mistake in unknown_keys(fields, EXPECT_KEYS, "expectation key"):
            self.source.add(mistake)
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
        return Expectation(self._where(nodes["where"]), outcome, because, issue, until, span_of(node).line)


def text_of(node: Node) -> str:
    """A scalar as written, for messages."""
    return str(node.value) if isinstance(node, ScalarNode) else "a value"
