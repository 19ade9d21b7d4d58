"""The exported schema: up to date, complete, and of one mind with the loader about the shipped matrices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.matrix import AXES, FAULTS, SHARED_ROWS, TIERS
from harness.matrix.loading import EXPECT_KEYS, KEYS, TIER_KEYS
from harness.matrix.schema import build, render

CASES = Path(__file__).parents[2] / "cases"
MATRICES = sorted(path for path in CASES.glob("*.yaml") if path.name != SHARED_ROWS)
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Draft 7 as far as our schema uses it."""
    if "$ref" in schema:
        return fits(value, root["definitions"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema and not any(fits(value, option, root) for option in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(value, option, root) for option in schema["oneOf"]) != 1:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        rest = schema.get("additionalProperties", True)
        return all(key in value for key in schema.get("required", ())) and all(
            fits(item, properties[key], root) if key in properties else rest and fits(item, dict(rest or {}), root)
            for key, item in value.items()
            if key in properties or rest is not True
        )
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(fits(v, schema.get("items", {}), root) for v in value)
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, int | float):
        return bool(value >= schema.get("minimum", value) and value > schema.get("exclusiveMinimum", value - 1))
    return True


def shipped(path: Path) -> dict[str, Any]:
    """The file as an editor reads it."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def test_the_file_is_up_to_date() -> None:
    assert (CASES / "schema.json").read_text(encoding="utf-8") == render(), (
        "run: python -m harness.matrix.schema > cases/schema.json"
    )


def test_every_key_axis_fault_and_tier_is_in_it() -> None:
    schema = build()
    assert set(schema["properties"]) == set(KEYS)
    assert set(schema["properties"]["axes"]["properties"]) == set(AXES) - {"kernel"} | {"seed"}
    assert set(schema["definitions"]["values"]["properties"]) == set(AXES) | {"seed"}
    assert schema["properties"]["must_see"]["items"]["enum"] == list(FAULTS)
    assert set(schema["properties"]["tiers"]["properties"]) == set(TIERS)
    assert set(schema["definitions"]["tier"]["anyOf"][1]["properties"]) == set(TIER_KEYS)
    assert set(schema["definitions"]["expectation"]["properties"]) == set(EXPECT_KEYS)


@pytest.mark.parametrize("path", MATRICES, ids=lambda path: path.stem)
def test_shipped_matrices_fit_and_point_to_it(path: Path) -> None:
    assert fits(shipped(path), build(), build())
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize(
    ("section", "planted"),
    [
        ("fixed", {"hed_size": 64}),
        ("fixed", {"head_size": "large"}),
        ("fixed", {"head_size": 0}),
        ("fixed", {"causal": "no"}),
        ("axes", {"page_size": 16}),
        ("axes", {"page_size": []}),
        ("axes", {"logits_soft_cap": [0]}),
        ("tiers", {"smoke": {"cover": 7}}),
        ("tiers", {"smoke": {"cover": 2, "full": True}}),
        ("tiers", {"nigthly": "full"}),
        ("must_see", ["newest_tokn"]),
        ("row_mixes", {"m": {"query_lens": [1]}}),
        ("row_mixes", {"m": {"num_seqs": 2, "query_lens": [1, 2], "context_lens": "0..3"}}),
        ("expect", [{"where": "sinks", "outcome": "FAIL"}]),
    ],
)
def test_planted_mistakes_do_not_fit(section: str, planted: object) -> None:
    document = shipped(MATRICES[0])
    assert fits(document, build(), build())
    document[section] = planted
    assert not fits(document, build(), build())
