"""`where` expressions: conditions over the axes of a case and a few names derived from them.

Invariant: a Where knows which axes it depends on, so that it can be decided as soon as those are known.
Used by constraints, by expectations and by selection on the command line; the grammar is harness.matrix.expression's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from harness.case import Case
from harness.matrix.axes import ALIASES, AXES, axis_name
from harness.matrix.axis_types import Choice
from harness.matrix.expression import Expression, ExpressionError, Kind, parse_expression
from harness.matrix.rows import ROWS_AXES


@dataclass(frozen=True)
class Derived:
    """A name computed from the axes `axes`."""

    kind: Kind
    axes: frozenset[str]
    value: Callable[[Case], Any]
    doc: str


_HEADS = frozenset({"num_q_heads", "gqa_ratio"})
DERIVED: Mapping[str, Derived] = {
    "num_kv_heads": Derived("number", _HEADS, lambda c: c.num_kv_heads, "num_q_heads // gqa_ratio"),
    "num_seqs": Derived("number", ROWS_AXES, lambda c: c.rows.num_seqs, "sequences in the batch"),
    "max_query_len": Derived("number", ROWS_AXES, lambda c: max(c.rows.query_lens), "most new tokens of a row"),
    "min_query_len": Derived("number", ROWS_AXES, lambda c: min(c.rows.query_lens), "fewest new tokens of a row"),
    "max_context_len": Derived("number", ROWS_AXES, lambda c: max(c.rows.context_lens), "longest context"),
    "min_context_len": Derived("number", ROWS_AXES, lambda c: min(c.rows.context_lens), "shortest context"),
    "max_seq_len": Derived("number", ROWS_AXES, lambda c: max(c.rows.seq_lens), "longest sequence"),
    "has_prefill": Derived("truth", ROWS_AXES, lambda c: max(c.rows.query_lens) > 1, "a row has query_len > 1"),
    "has_decode": Derived("truth", ROWS_AXES, lambda c: 1 in c.rows.query_lens, "a row has query_len == 1"),
}
_KINDS: Mapping[str, Kind] = {
    **{name: axis.type.kind for name, axis in AXES.items()},
    **{alias: AXES[name].type.kind for alias, name in ALIASES.items()},
    **{name: derived.kind for name, derived in DERIVED.items()},
}
_CHOICES: Mapping[str, Collection[str]] = {n: a.type.words for n, a in AXES.items() if isinstance(a.type, Choice)}
_BY_NAME = ("rows", "placement")  # compared by the name of their value


@dataclass(frozen=True)
class Where:
    """A condition. `axes` are the axes it depends on, directly or through a derived name."""

    expression: Expression
    axes: frozenset[str]

    @classmethod
    def parse(cls, text: str, words: Mapping[str, Collection[str]] | None = None) -> Where:
        """Read `text`; `words` adds known values of text axes (kernel, rows) to those of the choice axes.

        Raises ExpressionError, which says where in `text` and what was perhaps meant.
        """
        expression = parse_expression(text, _KINDS, {**_CHOICES, **(words or {})})
        if expression.kind != "truth":
            what = f"this is a {expression.kind}, not a condition: compare it with something"
            raise ExpressionError(expression.text, 0, len(expression.text), what)
        axes: set[str] = set()
        for name in expression.names:
            axes |= DERIVED[name].axes if name in DERIVED else {axis_name(name)}
        return cls(expression, frozenset(axes))

    @property
    def text(self) -> str:
        return self.expression.text.strip()

    def evaluate(self, case: Case) -> bool:
        """Whether `case` meets the condition. Raises ExpressionError on a division by zero."""
        return bool(self.expression.evaluate(lambda name: _value(case, name)))


def _value(case: Case, name: str) -> Any:
    if name in DERIVED:
        return DERIVED[name].value(case)
    value = getattr(case, axis_name(name))
    return value.name if name in _BY_NAME else value
