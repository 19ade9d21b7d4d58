"""The exported schema: up to date, complete, and of one mind with the loader about the shipped matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from harness.matrix import AXES, FAULTS, SHARED_ROWS, TIERS
from harness.matrix.conditions import EXPECT_KEYS
from harness.matrix.loading import KEYS
from harness.matrix.schema import build, render
from harness.matrix.tiers import TIER_KEYS

CASES = Path(__file__).parents[2] / "cases"
MATRICES = sorted(path for path in CASES.glob("*.yaml") if path.name != SHARED_ROWS)


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether `value` fits a part of the schema `root`."""
    return bool(Draft7Validator({**schema, "definitions": root.get("definitions", {})}).is_valid(value))


def test_the_schema_is_itself_valid_draft_7() -> None:
    Draft7Validator.check_schema(build())
    assert build()["$schema"].startswith("http://json-schema.org/draft-07/")


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
