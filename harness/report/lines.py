"""Styled lines: the one model of text behind both the coloured terminal and plain text.

Invariant: styles add colour and nothing else; the plain text of a line is the same characters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 80
INDENT = "  "
LABEL_WIDTH = 13


@dataclass(frozen=True)
class Span:
    text: str
    style: str = ""  # a rich style, e.g. "bold red"


@dataclass(frozen=True)
class Line:
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


def line(*parts: str | Span) -> Line:
    return Line(tuple(part if isinstance(part, Span) else Span(part) for part in parts))


def to_text(lines: Iterable[Line]) -> str:
    """Plain text, without trailing blanks or a last line break."""
    return "\n".join(one.text.rstrip() for one in lines)


def labelled(label: str, texts: Sequence[str], width: int = WIDTH, style: str = "") -> list[Line]:
    """`texts` in a column behind `label`, wrapped at `width`; a word that is longer than the column stays whole."""
    column = len(INDENT) + max(LABEL_WIDTH, len(label) + 2)
    wrapped = [piece for text in texts for piece in wrap(text, width - column) or [""]]
    margins = [INDENT + label.ljust(column - len(INDENT))] + [" " * column] * (len(wrapped) - 1)
    return [line(Span(margin, "dim"), Span(piece, style)) for margin, piece in zip(margins, wrapped, strict=True)]


def wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
