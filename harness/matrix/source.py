"""YAML read as text with places: every value keeps its line and column until its declared type is known.

Invariant: no scalar is converted by YAML's own rules (`no`, `1e-2`, `017` and `12:30` are just text here), no duplicate
key is lost, and every mistake is a `path:line:col: what` with the line it is on. All mistakes of a file come together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from harness.errors import AttnregError


@dataclass(frozen=True, order=True)
class Span:
    """A place in a file: 1-based line and column, and how many characters to underline."""

    line: int
    column: int
    width: int = 1


def span_of(node: Node) -> Span:
    """The place of `node`; a node over several lines is marked at its first character."""
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 1
    return Span(start.line + 1, start.column + 1, max(width, 1))


class Mistake(AttnregError):
    """One mistake at one place; collected by a Source and shown by MatrixError."""

    def __init__(self, span: Span, what: str) -> None:
        self.span, self.what = span, what
        super().__init__(what)


class MatrixError(AttnregError):
    """Everything wrong with one file, sorted by line. `mistakes` are (Span, what) in that order."""

    def __init__(self, path: str, lines: tuple[str, ...], mistakes: Iterable[Mistake]) -> None:
        self.path = path
        self.mistakes = tuple(sorted({(m.span, m.what) for m in mistakes}))
        super().__init__("\n".join(self._block(lines, span, what) for span, what in self.mistakes))

    @property
    def headlines(self) -> tuple[str, ...]:
        """One line per mistake: path:line:col: what."""
        return tuple(f"{self.path}:{span.line}:{span.column}: {what}" for span, what in self.mistakes)

    def _block(self, lines: tuple[str, ...], span: Span, what: str) -> str:
        if not lines:  # a file that could not be read has none to show
            return f"{self.path}:{span.line}:{span.column}: {what}"
        shown = lines[span.line - 1] if span.line <= len(lines) else ""
        return (
            f"{self.path}:{span.line}:{span.column}: {what}\n"
            f"{span.line:>5} | {shown}\n"
            f"      | {' ' * (span.column - 1)}{'^' * span.width}"
        )


class Source:
    """One YAML file and the mistakes found in it so far."""

    def __init__(self, path: Path | str, text: str) -> None:
        self.path = str(path)
        self.lines = tuple(text.splitlines())
        self.text = text
        self._mistakes: list[Mistake] = []

    @classmethod
    def read(cls, path: Path | str) -> Source:
        """The file at `path`. MatrixError where it cannot be read or is not UTF-8 text."""
        try:
            return cls(path, Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise MatrixError(str(path), (), [Mistake(Span(1, 1), f"cannot be read: {error.strerror}")]) from None
        except UnicodeDecodeError as error:
            raise MatrixError(str(path), (), [Mistake(Span(1, 1), f"not UTF-8 text: {error.reason}")]) from None

    def root(self) -> Node:
        """The top node. MatrixError where the text is not YAML or is empty."""
        try:
            node = yaml.compose(self.text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            span = Span(mark.line + 1, mark.column + 1) if mark else Span(1, 1)
            self.add(Mistake(span, f"not valid YAML: {error.problem}"))
        except yaml.reader.ReaderError as error:
            self.add(Mistake(Span(1, 1), f"not valid YAML: {error.reason}"))
        else:
            if node is not None:
                return node
            self.add(Mistake(Span(1, 1), "the file is empty"))
        raise self.error()

    def add(self, mistake: Mistake) -> None:
        self._mistakes.append(mistake)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note a Mistake raised inside and go on after the block."""
        try:
            yield
        except Mistake as mistake:
            self.add(mistake)

    @property
    def clean(self) -> bool:
        return not self._mistakes

    def error(self) -> MatrixError:
        return MatrixError(self.path, self.lines, self._mistakes)

    def finish(self) -> None:
        """Raise everything collected, if anything was."""
        if self._mistakes:
            raise self.error()

    def entries(self, node: Node, what: str) -> dict[str, tuple[Node, Node]]:
        """{key: (key node, value node)} of a mapping; duplicate keys are noted, other nodes raise Mistake."""
        if not isinstance(node, MappingNode):
            raise Mistake(span_of(node), f"{what} is a mapping (key: value), not {describe(node)}")
        found: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self.add(Mistake(span_of(key), f"a key of {what} is a plain word, not {describe(key)}"))
            elif key.value in found:
                first = span_of(found[key.value][0]).line
                self.add(Mistake(span_of(key), f"duplicate key '{key.value}' (first on line {first})"))
            else:
                found[key.value] = (key, value)
        return found


def items(node: Node, what: str) -> list[Node]:
    """The elements of a list; Mistake where `node` is no list or an empty one."""
    if not isinstance(node, SequenceNode):
        hint = f". Write [{node.value}]" if isinstance(node, ScalarNode) else ""
        raise Mistake(span_of(node), f"{what} is a list, not {describe(node)}{hint}")
    if not node.value:
        raise Mistake(span_of(node), f"{what} is an empty list")
    return list(node.value)


def text(node: Node, what: str) -> str:
    """The text of a scalar, whatever YAML would make of it; Mistake for lists, mappings and empty values."""
    if not isinstance(node, ScalarNode):
        raise Mistake(span_of(node), f"{what} is a single value, not {describe(node)}")
    if not node.value.strip():
        raise Mistake(span_of(node), f"{what} is empty")
    return str(node.value)


def span_within(node: Node, offset: int, width: int) -> Span:
    """The place of part of a scalar's text; of its start where the text is folded over lines."""
    start = span_of(node)
    if node.end_mark.line != node.start_mark.line:
        return start
    quote = 1 if getattr(node, "style", None) in ("'", '"') else 0
    return Span(start.line, start.column + quote + offset, width)


def describe(node: Node) -> str:
    """What a node is, for messages."""
    if isinstance(node, MappingNode):
        return "a mapping"
    if isinstance(node, SequenceNode):
        return "a list"
    return f"'{node.value}'"


def suggestion(word: str, known: Iterable[str]) -> str:
    """ ". Did you mean 'x'?" for the closest known word, else the known words where they are few, else nothing."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f". Did you mean '{close[0]}'?"
    return f". Known: {', '.join(names)}" if 0 < len(names) <= 8 else ""


def one_of(word: str, known: Iterable[str], what: str, span: Span) -> str:
    """`word` if it is known; else a Mistake with a suggestion."""
    names = tuple(known)
    if word not in names:
        raise Mistake(span, f"unknown {what} '{word}'{suggestion(word, names)}")
    return word


def unknown_keys(entries: Mapping[str, tuple[Node, Node]], known: Iterable[str], what: str) -> Iterator[Mistake]:
    """A Mistake for every key that is not known."""
    names = tuple(known)
    for key, (key_node, _) in entries.items():
        if key not in names:
            yield Mistake(span_of(key_node), f"unknown {what} '{key}'{suggestion(key, names)}")
