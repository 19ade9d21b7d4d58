"""Clauses that contracts of every kind have: sets of admitted words and sizes, one per axis.

Invariant: a clause looks at one axis of a case; None admits every value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.case import Case
from harness.matrix.axes import AXES
from harness.matrix.axis_types import Choice
from harness.matrix.rows import NAME

_AXIS_OF: Mapping[str, str] = {  # field of a contract -> the axis whose values it admits
    "dtypes": "dtype",
    "kv_dtypes": "kv_dtype",
    "descales_per": "descales_per",
    "descales": "descales",
    "q_dtypes": "q_dtype",
    "out_dtypes": "out_dtype",
    "layouts": "layout",
    "page_tables": "page_table",
    "page_sizes": "page_size",
    "head_sizes": "head_size",
}
_WORDS: Mapping[str, frozenset[str]] = {
    name: frozenset(axis_type.words)
    for name, axis in _AXIS_OF.items()
    if isinstance(axis_type := AXES[axis].type, Choice)
}


def first_clause(contract: Any, case: Case) -> str | None:
    """The first clause of `contract` that `case` is outside of, in words; fields that it does not have admit all."""
    for name, axis in _AXIS_OF.items():
        admitted, value = getattr(contract, name, None), getattr(case, axis)
        if admitted is not None and value not in admitted:
            return f"{axis} {value} (admitted: {', '.join(str(a) for a in sorted(admitted, key=str))})"
    return None


def wrong_words(contract: Any, known: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """What is wrong with the words of `contract`; `known` are those of its sets that are no words of an axis."""
    if not NAME.fullmatch(contract.name):
        yield "a name holds letters, digits, _ and . only: ids spell it"
    if contract.entry and ":" not in contract.entry:  # none: a kernel that is never loaded
        yield f"entry is 'file:function', not '{contract.entry}'"
    for name, words in (*known.items(), *_WORDS.items()):
        given: Any = getattr(contract, name, frozenset())
        if unknown := {given} if isinstance(given, str) else set(given) - words:
            shown = ", ".join(sorted(map(str, unknown)))
            yield f"unknown {name}: {shown}; it is a set of {', '.join(sorted(words))}"
    if isinstance(contract.launches, str):
        yield f"launches is a tuple, ('{contract.launches}',) for one kernel"
