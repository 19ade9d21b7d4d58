"""A small, safe expression language over named values: comparisons, and/or/not, in, arithmetic, parentheses.

Invariant: an Expression that parses evaluates without surprises: names and kinds (number, text, truth) are checked
beforehand, nothing but the operators below is reachable, and none behaves: none == none, none is ordered before and
after nothing (the comparison is false), arithmetic with none is none.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.errors import AttnregError
from harness.matrix.source import suggestion

Kind = Literal["number", "text", "truth", "none"]
Lookup = Callable[[str], Any]
Evaluate = Callable[[Lookup], Any]

_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv, ast.Mod: operator.mod,
}  # fmt: skip


class ExpressionError(AttnregError):
    """An expression that cannot be read or evaluated; `offset` and `width` (characters) say where in `text`."""

    def __init__(self, text: str, offset: int, width: int, what: str) -> None:
        self.text, self.offset, self.width, self.what = text, offset, width, what
        super().__init__(f"{what}\n    {text}\n    {' ' * offset}{'^' * width}")


@dataclass(frozen=True)
class Expression:
    """A checked expression. `names` are the names it reads; `evaluate` takes a lookup from name to value."""

    text: str
    kind: Kind
    names: frozenset[str]
    evaluate: Evaluate


def parse_expression(text: str, kinds: Mapping[str, Kind], words: Mapping[str, Collection[str]]) -> Expression:
    """Read `text` over the names of `kinds`; `words` lists, per text name, the values it may be compared with.

    Raises ExpressionError: syntax, unknown names and values (with a suggestion), kinds that do not go together.
    """
    clean = " ".join(text.splitlines()).rstrip()
    body = clean.lstrip()
    indent = len(clean) - len(body)
    try:
        tree = ast.parse(body, mode="eval")
    except SyntaxError as error:
        offset = indent + min(error.offset - 1 if error.offset else len(body), len(body))  # no offset: at the end
        cut = body.count("(") > body.count(")")
        advice = "an expression with a comma has to be quoted here" if cut else "for example: page_size == 16"
        raise ExpressionError(clean, offset, 1, f"this is no expression; {advice}") from None
    compiler = _Compiler(clean, indent, kinds, words)
    evaluate, kind = compiler.compile(tree.body)
    return Expression(clean, kind, frozenset(compiler.names), evaluate)


class _Compiler:
    """One pass over the syntax tree: checks kinds and builds closures."""

    def __init__(self, text: str, indent: int, kinds: Mapping[str, Kind], words: Mapping[str, Collection[str]]) -> None:
        self.text, self.indent, self.kinds, self.words = text, indent, kinds, words
        self.names: set[str] = set()

    def error(self, node: ast.expr, what: str) -> ExpressionError:
        end = node.end_col_offset or node.col_offset + 1
        return ExpressionError(self.text, node.col_offset + self.indent, max(end - node.col_offset, 1), what)

    def compile(self, node: ast.expr) -> tuple[Evaluate, Kind]:
        if isinstance(node, ast.Constant):
            return self._constant(node)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.BoolOp):
            return self._bool_op(node)
        if isinstance(node, ast.UnaryOp):
            return self._unary(node)
        if isinstance(node, ast.BinOp):
            return self._arithmetic(node)
        if isinstance(node, ast.Compare):
            return self._compare(node)
        raise self.error(node, f"'{ast.unparse(node)}' is not allowed here: only comparisons, logic and arithmetic")

    def _constant(self, node: ast.Constant) -> tuple[Evaluate, Kind]:
        value = node.value
        if value is None:
            return (lambda lookup: None), "none"
        if isinstance(value, bool):
            return (lambda lookup: value), "truth"
        if isinstance(value, int | float):
            return (lambda lookup: value), "number"
        if isinstance(value, str):
            return (lambda lookup: value), "text"
        raise self.error(node, f"{value!r} is neither a number nor a text")

    def _name(self, node: ast.Name) -> tuple[Evaluate, Kind]:
        name = node.id
        if name in _WORDS:
            return self._constant(ast.copy_location(ast.Constant(_WORDS[name]), node))
        if name not in self.kinds:
            raise self.error(node, f"unknown name '{name}'{suggestion(name, self.kinds)}")
        self.names.add(name)
        return (lambda lookup: lookup(name)), self.kinds[name]

    def _truth(self, node: ast.expr) -> Evaluate:
        evaluate, kind = self.compile(node)
        if kind != "truth":
            raise self.error(node, f"'{ast.unparse(node)}' is a {kind}, not true or false: compare it with something")
        return evaluate

    def _number(self, node: ast.expr) -> Evaluate:
        evaluate, kind = self.compile(node)
        if kind not in ("number", "none"):
            raise self.error(node, f"'{ast.unparse(node)}' is a {kind}, not a number")
        return evaluate

    def _bool_op(self, node: ast.BoolOp) -> tuple[Evaluate, Kind]:
        parts = [self._truth(value) for value in node.values]
        if isinstance(node.op, ast.And):
            return (lambda lookup: all(part(lookup) for part in parts)), "truth"
        return (lambda lookup: any(part(lookup) for part in parts)), "truth"

    def _unary(self, node: ast.UnaryOp) -> tuple[Evaluate, Kind]:
        if isinstance(node.op, ast.Not):
            inner = self._truth(node.operand)
            return (lambda lookup: not inner(lookup)), "truth"
        if not isinstance(node.op, ast.USub):
            raise self.error(node, f"operator '{ast.unparse(node)[0]}' is not allowed here")
        value = self._number(node.operand)
        return (lambda lookup: None if (found := value(lookup)) is None else -found), "number"

    def _arithmetic(self, node: ast.BinOp) -> tuple[Evaluate, Kind]:
        apply = _ARITHMETIC.get(type(node.op))
        if apply is None:
            raise self.error(node, "only + - * / // and % are allowed here")
        left, right = self._number(node.left), self._number(node.right)

        def evaluate(lookup: Lookup) -> Any:
            a, b = left(lookup), right(lookup)
            if a is None or b is None:
                return None
            try:
                return apply(a, b)
            except ZeroDivisionError:
                raise self.error(node, f"'{ast.unparse(node)}' divides by zero") from None

        return evaluate, "number"

    def _compare(self, node: ast.Compare) -> tuple[Evaluate, Kind]:
        operands = [node.left, *node.comparators]
        links = [
            self._link(left, op, right)
            for left, op, right in zip(operands, node.ops, operands[1:], strict=False)  # one more operand than ops
        ]
        return (lambda lookup: all(link(lookup) for link in links)), "truth"

    def _link(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Evaluate:
        if isinstance(op, ast.In | ast.NotIn):
            return self._membership(left, right, negate=isinstance(op, ast.NotIn))
        if type(op) in _ORDER:
            low, high, compare = self._number(left), self._number(right), _ORDER[type(op)]

            def ordered(lookup: Lookup) -> bool:
                a, b = low(lookup), high(lookup)
                return a is not None and b is not None and compare(a, b)

            return ordered
        same = self._equality(left, right)
        if isinstance(op, ast.NotEq | ast.IsNot):
            return lambda lookup: not same(lookup)
        return same

    def _equality(self, left: ast.expr, right: ast.expr) -> Evaluate:
        (a, kind_a), (b, kind_b) = self.compile(left), self.compile(right)
        if kind_a != kind_b and "none" not in (kind_a, kind_b):
            what = f"{ast.unparse(left)} is a {kind_a}, {ast.unparse(right)} a {kind_b}: they are never equal"
            raise self.error(right, what)
        self._check_word(left, right)
        self._check_word(right, left)
        return lambda lookup: bool(a(lookup) == b(lookup))

    def _membership(self, left: ast.expr, right: ast.expr, *, negate: bool) -> Evaluate:
        if not isinstance(right, ast.List | ast.Tuple):
            raise self.error(right, "'in' needs a list such as (1, 16) or ['fp16', 'bf16']")
        links = [self._equality(left, element) for element in right.elts]
        return lambda lookup: any(link(lookup) for link in links) != negate

    def _check_word(self, name: ast.expr, word: ast.expr) -> None:
        if not isinstance(name, ast.Name) or not isinstance(word, ast.Constant) or not isinstance(word.value, str):
            return
        known = self.words.get(name.id)
        if known is not None and word.value not in known:
            raise self.error(word, f"unknown {name.id} '{word.value}'{suggestion(word.value, known)}")
