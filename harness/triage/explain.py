"""Explanations: why a verdict is what it is, as plain data that renderers print without computing.

Invariant: an explanation is {"rows": {label: [line, ...]}, ...}. Rows are what people read, in reading order;
everything else in it is the same again as numbers, for machines. Any later finding adds a row of its own.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from harness.case import Case
from harness.errors import SetupBug
from harness.oracle.findings import Findings, TensorFindings, Worst
from harness.store.plain import plain_dict
from harness.triage.gains import gain_summary, tell_gains, tell_hull
from harness.triage.hints import Hint, compare_tensors, find_hints, merge_hints
from harness.triage.pattern import Pattern, find_pattern
from harness.triage.place import RowPart, places
from harness.triage.wording import compact, count, number, without_numbers

MAX_SEQUENCES = 4  # sequences told one by one


def explain_mismatch(case: Case, findings: Findings) -> dict[str, Any]:
    """Explanation of findings that are not clean.

    Keys: rows; summary (one line); tensors (one per compared tensor: counts, index sets, sequences, worst element);
    heat (strips of fractions over tokens, heads and dims of the first wrong tensor); hints; shape (equal for equal
    kinds of pattern). ValueError where a mask does not have the shape that `case` implies.
    """
    rows: dict[str, list[str]] = {}
    tensors: list[dict[str, Any]] = []
    hints_of: dict[str, list[Hint]] = {}
    heat: list[dict[str, Any]] = []
    shape: list[str] = []
    if findings.violations:
        rows["violates"] = list(findings.violations)
        shape += [f"violates: {without_numbers(violation)}" for violation in findings.violations]
    for found in findings.tensors:
        pattern = find_pattern(case, found)
        tensors.append(_tensor_data(case, found, pattern))
        if pattern is None:
            continue
        seen = find_hints(case, found, pattern)
        where = [f"{pattern.wrong:,} of {count(found.num_elements, 'element')} {pattern.describe()}"]
        where += _where(case, pattern)
        if found.name == "out":
            rows["wrong"], rows["how much"] = where, _how_much(case, found.worst)
        else:
            rows[found.name] = where + _how_much(case, found.worst)
        heat = heat or [vars(strip) for strip in pattern.heat]
        hints_of[found.name] = seen
        shape.append(_shape(found, pattern, seen))
    if findings.hull.num_outside:
        rows["hull"] = tell_hull(findings.hull)
        shape.append("hull")
    if findings.gains.best is not None:
        rows |= tell_gains(case, findings.gains)
        shape.append(f"gain: {findings.gains.best.kind}")
    hints = merge_hints(hints_of) + compare_tensors(findings)
    present, absent = _kinds(findings)
    if present:
        rows["of these"] = [", ".join(present)]
    if absent:
        rows["not"] = [", ".join(absent)]
    if hints:
        rows["seen"] = [hint.text for hint in hints]
    return plain_dict(
        {
            "rows": rows,
            "summary": _summary(findings, rows) or gain_summary(case, findings.gains),
            "tensors": tensors,
            "heat": heat,
            "gains": {"z": findings.gains.z, "found": [vars(gain) for gain in findings.gains.gains]}
            | ({"source": vars(findings.gains.source)} if findings.gains.source else {}),
            "hints": [hint.key for hint in hints],
            "shape": "; ".join(shape),
        }
    )


def explain_setup_bug(bug: SetupBug) -> dict[str, Any]:
    """Explanation of a TEST_BUG: which argument, what was built, what the contract wants, how such a thing happens."""
    lines = [f"{bug.tensor}: got {bug.got}, expected {bug.expected}"] + ([f"({bug.hint})"] if bug.hint else [])
    return plain_dict(
        {
            "rows": {"before launch": lines},
            "summary": f"before launch: {lines[0]}",
            "bug": {"tensor": bug.tensor, "expected": bug.expected, "got": bug.got, "hint": bug.hint},
            "shape": f"{bug.tensor}: {bug.expected}",
        }
    )


def explain_blind(cannot_see: Mapping[str, float], facts: Sequence[str] = (), advice: str = "") -> dict[str, Any]:
    """Explanation of BLIND. cannot_see: fault -> the largest change it makes, in units of the tolerance."""
    faults = ", ".join(f"{fault} ({size:.3g} of tolerance)" for fault, size in cannot_see.items())
    rows = {"cannot see": [faults], "because": list(facts), "try": [advice] if advice else []}
    return plain_dict(
        {
            "rows": {label: lines for label, lines in rows.items() if lines},
            "summary": f"cannot see {faults}",
            "cannot_see": dict(cannot_see),
            "shape": ", ".join(sorted(cannot_see)),
        }
    )


def explain_error(error: BaseException) -> dict[str, Any]:
    """Explanation of an ERROR of the harness: the only one that carries a stack trace."""
    message = f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return plain_dict(
        {"rows": {"harness": [message]}, "summary": message, "traceback": trace, "shape": type(error).__name__}
    )


def with_row(explanation: Mapping[str, Any] | None, label: str, *lines: str) -> dict[str, Any]:
    """`explanation` with one more row, for whoever has something to add to what was found."""
    known = dict(explanation or {})
    return known | {"rows": {**known.get("rows", {}), label: list(lines)}}


def _summary(findings: Findings, rows: Mapping[str, Sequence[str]]) -> str:
    first = next((rows[label][0] for label in ("wrong", "lse", "violates", "hull") if label in rows), "")
    label = "lse: " if "wrong" not in rows and "lse" in rows else ""
    worst = f", worst {_ratio(findings.err_over_tol)}" if any(t.num_mismatched for t in findings.tensors) else ""
    broken = rows.get("violates", ())
    also = f"{broken[0]}; " if broken and first != broken[0] else ""
    return also + label + first + worst


def _where(case: Case, pattern: Pattern) -> list[str]:
    parts = pattern.parts
    lines = []
    if len(parts) > 1:
        decode = sum(part.phase == "decode" for part in parts)
        phases = [(len(parts) - decode, "prefill row"), (decode, "decode row")]
        everywhere = len(parts) == case.rows.num_seqs
        which = f"all {len(parts)} sequences" if everywhere else f"sequences {compact([p.sequence for p in parts])}"
        lines.append(f"{which}: " + ", ".join(count(n, name) for n, name in phases if n))
    worst_first = sorted(parts, key=lambda part: (-part.wrong_elements, part.sequence))[:MAX_SEQUENCES]
    if len(parts) <= MAX_SEQUENCES or any(len(part.indices) < part.query_len for part in parts):
        lines += [_row_line(part) for part in worst_first]
    if not pattern.whole(1):
        kv_heads = sorted({head // case.gqa_ratio for head in pattern.heads})
        of = f" (of kv {_named('head', kv_heads)})" if case.gqa_ratio > 1 else ""
        lines.append(_named("head", pattern.heads) + of)
    if not pattern.whole(2):
        lines.append(_named("dim", pattern.dims))
    return lines


def _named(singular: str, indices: Sequence[int]) -> str:
    return f"{singular}{'' if len(indices) == 1 else 's'} {compact(indices)}"


def _row_line(part: RowPart) -> str:
    some = "" if len(part.indices) == part.query_len else f", {len(part.indices)} of {part.query_len} tokens"
    at = f"sequence {part.sequence}, {part.phase} row, {_named('position', part.positions)}"
    return f"{at} (query_len {part.query_len}, context {part.context_len}){some}"


def _how_much(case: Case, worst: Worst | None) -> list[str]:
    if worst is None:
        return ["nothing could be compared"]
    place = _place_data(case, worst)
    dim = f", dim {worst.dim}" if worst.dim >= 0 else ""
    kv = f" (kv head {place['kv_head']})" if case.gqa_ratio > 1 else ""
    slot = f" = page slot {place['page_slot']}, offset {place['page_offset']}" if place["position"] >= 0 else ""
    bounds = f"want {number(worst.want)} +- {number(worst.tolerance)}"
    return [
        f"worst {_ratio(worst.ratio)}: got {number(worst.got)} {bounds}",
        f"at token {worst.token}, head {worst.head}{kv}{dim}",
        f"(sequence {place['sequence']}, {place['phase']} row, position {place['position']}{slot})",
    ]


def _ratio(ratio: float) -> str:
    return f"{ratio:.3g}x tolerance" if math.isfinite(ratio) else "beyond any tolerance"


def _place_data(case: Case, worst: Worst) -> dict[str, Any]:
    place = places(case.rows, [worst.token])[0]
    page_slot, page_offset = divmod(place.position, case.page_size)
    return {
        "sequence": place.sequence,
        "phase": place.phase,
        "position": place.position,
        "kv_head": worst.head // case.gqa_ratio,
        "page_slot": page_slot,
        "page_offset": page_offset,
    }


def _kinds(findings: Findings) -> tuple[list[str], list[str]]:
    """Kinds of fault that are there, counted, of tensors but out with their name; and kinds that are nowhere."""
    present, absent = [], []
    for kind, counts in (
        ("NaN", {t.name: t.num_nan for t in findings.tensors}),
        ("Inf", {t.name: t.num_inf for t in findings.tensors}),
        ("unwritten", {t.name: t.num_unwritten for t in findings.tensors}),
        *((("outside the range of V", {"out": findings.hull.num_outside}),) if findings.hull.num_elements else ()),
    ):
        met = {name: amount for name, amount in counts.items() if amount}
        present += [f"{amount:,} {kind}{'' if name == 'out' else f' in {name}'}" for name, amount in met.items()]
        absent += [] if met else [kind]
    return present, absent


def _shape(found: TensorFindings, pattern: Pattern, hints: Sequence[Hint]) -> str:
    axes = [name if pattern.whole(axis) else f"some {name}" for axis, name in enumerate(("tokens", "heads", "dims"))]
    keys = ",".join(sorted(hint.key for hint in hints))
    return f"{found.name}: {' x '.join(axes[: len(pattern.shape)])} [{keys}]"


def _tensor_data(case: Case, found: TensorFindings, pattern: Pattern | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": found.name,
        "elements": found.num_elements,
        "wrong": found.num_mismatched,
        "nan": found.num_nan,
        "inf": found.num_inf,
        "unwritten": found.num_unwritten,
        "err_over_tol": found.err_over_tol,
        "worst": None if found.worst is None else vars(found.worst) | _place_data(case, found.worst),
    }
    if pattern is not None:
        worst_first = sorted(pattern.parts, key=lambda part: (-part.wrong_elements, part.sequence))
        data |= {
            "sizes": [len(s) for s in pattern.sets],
            "exact": pattern.exact,
            "fill": pattern.fill,
            "heads": compact(pattern.heads, pattern.shape[1]),
            "dims": compact(pattern.dims, pattern.shape[2]) if pattern.dims else "",
            "num_sequences": len(pattern.parts),
            "sequences": [
                {
                    "sequence": part.sequence,
                    "phase": part.phase,
                    "query_len": part.query_len,
                    "context_len": part.context_len,
                    "wrong_tokens": len(part.indices),
                    "wrong_elements": part.wrong_elements,
                    "positions": compact(part.positions),
                }
                for part in worst_first[:MAX_SEQUENCES]
            ],
        }
    return data
