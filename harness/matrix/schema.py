"""JSON Schema (draft 7) of a matrix, for completion and checking in editors.

Invariant: it is derived from the tables the loader reads (KEYS, TIER_KEYS, AXES, FAULTS, TIERS), so that what an editor
completes is what the loader takes. Names (of kernels, row mixes) and expressions are checked by the loader only.

    python -m harness.matrix.schema > cases/schema.json
"""

from __future__ import annotations

import json

from harness.matrix.axes import ALIASES, AXES, TWIN_AXES, axis_name
from harness.matrix.axis_types import Schema
from harness.matrix.conditions import EXPECT_KEYS
from harness.matrix.dispatching import MUST_RUN_KEYS, UNREACHED_KEYS, UNREACHED_TIERS
from harness.matrix.expect import EXPECTABLE
from harness.matrix.loading import KEYS, LEGACY_KEYS, REQUIRED_KEYS
from harness.matrix.matrix import FAULTS, NOISE_FLOORS, TIERS
from harness.matrix.rows import DRAWN_KEYS, LISTED_KEYS
from harness.matrix.tiers import TIER_KEYS

_TEXT: Schema = {"type": "string"}


def build() -> Schema:
    """The schema as plain data."""
    shapes: dict[str, Schema] = {
        "matrix": {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"},
        "about": _TEXT,
        "kernels": _many(_TEXT),
        "fixed": _axes(several=False, single=True),
        "axes": _axes(several=True, single=False),
        "row_mixes": {"type": "object", "additionalProperties": {"$ref": "#/definitions/row_mix"}},
        "constraints": _many({"anyOf": [_TEXT, _object({"require": _TEXT, "because": _TEXT}, ["require"])]}),
        "must_see": _many({"enum": list(FAULTS)}),
        "margin": {"type": "number", "minimum": 1},
        "legacy_tolerance": _object({key: {"type": "number", "minimum": 0} for key in LEGACY_KEYS}, list(LEGACY_KEYS)),
        "noise_floor": {"enum": list(NOISE_FLOORS)},
        "twins": _many({"enum": list(TWIN_AXES)}),
        "must_run": _many(_object(dict.fromkeys(MUST_RUN_KEYS, _TEXT), list(MUST_RUN_KEYS))),
        "unreached": _many(
            _object(
                dict.fromkeys(UNREACHED_KEYS, _TEXT) | {UNREACHED_TIERS: _one_or_many({"enum": list(TIERS)})},
                list(UNREACHED_KEYS),
            )
        ),
        "tiers": _object({tier: {"$ref": "#/definitions/tier"} for tier in TIERS}, []),
        "expect": _many({"$ref": "#/definitions/expectation"}),
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "attnreg matrix",
        **_object({key: {**shapes[key], "description": doc} for key, doc in KEYS.items()}, list(REQUIRED_KEYS)),
        "definitions": {
            "tier": _tier(),
            "values": _axes(several=True, single=True),
            "row_mix": _row_mix(named=False),
            "row_mix_in_place": _row_mix(named=True),
            "expectation": _object(
                dict.fromkeys(EXPECT_KEYS, _TEXT) | {"outcome": {"enum": list(EXPECTABLE)}}, list(EXPECT_KEYS)
            ),
        },
    }


def render() -> str:
    """The text of cases/schema.json."""
    return json.dumps(build(), indent=1) + "\n"


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _many(element: Schema) -> Schema:
    return {"type": "array", "items": element, "minItems": 1}


def _one_or_many(element: Schema) -> Schema:
    return {"anyOf": [element, _many(element)]}


def _axes(*, several: bool, single: bool) -> Schema:
    """Axes by name, each with a value, a list of values, or either."""
    shapes: dict[str, Schema] = {}
    for name in (*AXES, *ALIASES):
        axis = AXES[axis_name(name)]
        one = axis.type.schema()
        forms = [*([one] if single else []), *([_many(one)] if several else [])]
        shape = forms[0] if len(forms) == 1 else {"anyOf": forms}
        shapes[name] = {**shape, "description": axis.doc}
    if not (several and single):
        del shapes["kernel"]  # `kernels` says it
    return _object(shapes, [])


def _tier() -> Schema:
    entries = _many({"$ref": "#/definitions/values"})
    shapes: dict[str, Schema] = {
        "cover": {"enum": [2, 3]},
        "full": {"const": True},
        "list": entries,
        "shrink": {"$ref": "#/definitions/values"},
        "also": entries,
    }
    mapping = _object({key: {**shapes[key], "description": doc} for key, doc in TIER_KEYS.items()}, [])
    one_of = [{"required": [key]} for key in ("cover", "full", "list")]
    return {"anyOf": [{"const": "full"}, {**mapping, "oneOf": one_of}]}


def _row_mix(*, named: bool) -> Schema:
    name: dict[str, Schema] = {"name": _TEXT} if named else {}
    lengths = _many({"anyOf": [{"type": "integer"}, _TEXT]})
    span: Schema = {"type": "string", "pattern": r"^-?\d+\.\.-?\d+$"}
    drawn: dict[str, Schema] = {
        **dict.fromkeys(LISTED_KEYS, span),
        "num_seqs": {"type": "integer", "minimum": 1},
        "first": {"const": "decode"},
        "last": {"const": "decode"},
    }
    listed = _object({**name, **dict.fromkeys(LISTED_KEYS, lengths)}, [*name, *LISTED_KEYS])
    return {
        "anyOf": [listed, _object({**name, **{k: drawn[k] for k in DRAWN_KEYS}}, [*name, *LISTED_KEYS, "num_seqs"])]
    }


if __name__ == "__main__":
    print(render(), end="")
