"""The one table of axes: name, type, default, id fragment and meaning.

Invariant: every field of harness.case.Case but `matrix` is an axis here, in the order in which ids spell it, and the
default here is the default there. A value is converted by the axis's declared type and by nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yaml import Node, SequenceNode

from harness.case import Case
from harness.layout import LAYOUTS
from harness.matrix.axis_types import (
    AxisType,
    Choice,
    Flag,
    KernelName,
    Number,
    PlacementValue,
    RowsValue,
    Vocabulary,
    WriterName,
)
from harness.matrix.source import Mistake, describe, span_of
from harness.problem.boundary import BOUNDARIES, POSITIONS, TARGETS

DATA_LAWS = (
    "auto",
    "normal", "probe", "needle", "uniform", "outliers", "negative",
    "needle_edges", "rising", "falling", "large", "biased", "bar_codes", "tiny",
)  # fmt: skip
KV_DTYPES = ("fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz", "int8")
FP8_DTYPES = KV_DTYPES[:-1]
DESCALES_PER = ("tensor", "head", "page", "token")
DESCALES = ("loud", "quiet", "equal", "one")
TWIN_AXES = ("layout", "page_table", "table_padding", "strides")  # they move bytes, and nothing else
POOLS = ("auto", "dense", "aliased")


@dataclass(frozen=True)
class Axis:
    """One axis. `fragment` stands before the value in an id; a flag's fragment stands alone for its unusual value."""

    name: str
    type: AxisType
    fragment: str
    doc: str
    default: Any = None
    required: bool = False  # no default: every case must be given one

    def parse(self, node: Node, vocabulary: Vocabulary) -> Any:
        """The value at `node`, of the type of this axis. Raises Mistake."""
        if isinstance(node, SequenceNode):
            raise Mistake(span_of(node), f"{self.name} is one value here, not {describe(node)}")
        return self.type.parse(node, self.name, vocabulary)


def _axis(name: str, type_: AxisType, fragment: str, doc: str) -> Axis:
    default = next(f for f in dataclasses.fields(Case) if f.name == name).default
    missing = default is dataclasses.MISSING
    return Axis(name, type_, fragment, doc, None if missing else default, missing)


AXES: Mapping[str, Axis] = {
    axis.name: axis
    for axis in (
        _axis("kernel", KernelName(), "", "the kernel under test, by the name of its contract"),
        _axis("dtype", Choice(("fp32", "fp16", "bf16")), "", "element type of new k and v, and of all that is auto"),
        _axis("num_q_heads", Number(1), "h", "query heads"),
        _axis("gqa_ratio", Number(1), "gqa", "query heads per KV head; divides num_q_heads"),
        _axis("head_size", Number(1), "d", "dimension of q and k, and of v unless head_size_v says otherwise"),
        _axis("head_size_v", Number(1, optional=True), "dv", "dimension of v; none: as head_size"),
        _axis("kv_dtype", Choice(("auto", *KV_DTYPES)), "kv", "what the cache stores; auto: dtype"),
        _axis("descales_per", Choice(DESCALES_PER), "per_", "what of a quantised cache has a descale of its own"),
        _axis("descales", Choice(DESCALES), "descales_", "how the descales of K, V and q are drawn"),
        _axis("q_dtype", Choice(("auto", *FP8_DTYPES)), "q", "what q is stored in, with one descale; auto: dtype"),
        _axis("out_dtype", Choice(("auto", *FP8_DTYPES)), "out", "what out is stored in, with one scale; auto: dtype"),
        _axis("sliding_window", Number(1, optional=True), "sw", "keys a query sees, itself included; none: all"),
        _axis("page_size", Number(1), "p", "tokens per KV page"),
        _axis("layout", Choice(tuple(LAYOUTS)), "", "how (page, slot, head, dim) maps to storage"),
        _axis("strides", Choice(("compact", "cache", "all")), "strided_", "which tensors are non-contiguous views"),
        _axis("page_table", Choice(("block_table", "kv_indices")), "", "2-D page table or a list of pages"),
        _axis("table_padding", Choice(("poison_page", "out_of_range", "exact")), "pad_", "page ids past the end"),
        _axis("tail", Choice(("nan", "loud")), "tail_", "what lies behind the last token of a live page"),
        _axis("causal", Flag(), "noncausal", "whether a query sees keys up to its own position only"),
        _axis("logits_soft_cap", Number(0, whole=False, optional=True, exclusive=True), "cap", "cap * tanh(s / cap)"),
        _axis("alibi", Flag(), "alibi", "bias of slope * (key position - query position)"),
        _axis("sinks", Flag(), "sinks", "one more logit per head in the softmax denominator"),
        _axis("sink_tokens", Number(0), "sink", "leading tokens that stay visible outside of the sliding window"),
        _axis("num_splits", Number(1, optional=True), "splits", "split-KV parts; none: the path without split-KV"),
        _axis("scale_factor", Number(0, whole=False, exclusive=True), "scale", "softmax scale times sqrt(head_size)"),
        _axis("placement", PlacementValue(), "", "which physical pages a sequence gets"),
        _axis("num_pages", Number(1, optional=True), "pool", "pages of the pool; none: those needed and a few more"),
        _axis("pool", Choice(POOLS), "", "memory of the pool; auto: aliased where it is large and mostly unused"),
        _axis("writer", WriterName(), "after_", "the kernel that stores the new tokens; none: the cache is built full"),
        _axis("steps", Number(1), "steps", "steps of a simulated engine, whose requests the rows are; 1: one launch"),
        _axis(
            "boundary", Choice(BOUNDARIES, optional=True), "at_", "where the addresses of a probe lie; none: no probe"
        ),
        _axis("boundary_target", Choice(TARGETS), "of_", "whose addresses reach the boundary"),
        _axis("boundary_position", Choice(POSITIONS), "", "where the two suspect pages lie"),
        _axis("rows", RowsValue(), "", "the batch: a row mix, by name or in place"),
        _axis("data", Choice(DATA_LAWS, "data law"), "", "how q, k and v are drawn; auto: as must_see needs"),
        _axis("geometry_seed", Number(0), "g", "seed of drawn lengths and of placement"),
        _axis("data_seed", Number(0), "s", "seed of values; `seed` for short"),
    )
}
ALIASES: Mapping[str, str] = {"seed": "data_seed"}


def axis_name(key: str) -> str:
    """The axis a key means: itself, or what it is an alias of."""
    return ALIASES.get(key, key)


def case_id(case: Case) -> str:
    """`<matrix>-<kernel>-<fragments>`: axes in the order of AXES, those at their default left out.

    Rows and placements appear by name; characters are letters, digits, '_', '.' and '-'. Leaving defaults out keeps
    ids, and the history and expectations keyed on them, when an axis is added.
    """
    parts = [case.matrix]
    for axis in AXES.values():
        value = getattr(case, axis.name)
        if not axis.required and value == axis.default:
            continue
        parts.append(axis.fragment if isinstance(value, bool) else f"{axis.fragment}{_spell(value)}")
    return "-".join(parts)


def _spell(value: object) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and value < 1e15 else repr(value).replace("+", "")
    return str(getattr(value, "name", value))
