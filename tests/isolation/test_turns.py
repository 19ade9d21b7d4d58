"""Large cases take turns on a device; small ones, and large ones whose unused pages share memory, wait for nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import Case, Placement, Rows
from harness.isolation import turns
from harness.run.outcome import Outcome
from tests.plugin.test_session import Toys

SMALL = Case("m", "k", Rows("r", (1,), (40,)), page_size=1024)
LARGE = replace(SMALL, num_pages=257)


def test_two_workers_never_have_a_large_case_at_once(toys: Toys) -> None:
    axes = "num_pages: [33000]\n  pool: [dense]\n  page_size: [256]\n  geometry_seed: [0, 1]"  # 1.01 GiB of K and V
    toys.run("toy_unsociable", "-n2", axes=axes, isolated=True)
    assert len(toys.records) == 4
    assert {record.worker for record in toys.records} == {"gw0", "gw1"}
    assert toys.outcomes == {"toy_unsociable": {Outcome.PASS}}


def test_what_is_small_or_on_another_device_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with turns.turn(LARGE, tmp_path), turns.turn(SMALL, tmp_path):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with turns.turn(LARGE, tmp_path):
            assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("change", "large"),
    [
        ({}, False),
        ({"num_pages": 256}, False),  # 1 GiB: 256 pages of 1024 tokens, 8 heads, 2 x 128 of two bytes
        ({"num_pages": 257}, True),
        ({"num_pages": 257, "kv_dtype": "fp8_e4m3"}, False),
        ({"num_pages": 257, "gqa_ratio": 2}, False),
        ({"num_pages": 257, "head_size_v": 64}, False),
        ({"num_pages": 5000, "pool": "aliased"}, False),
        ({"placement": Placement("explicit", "far", ((3,), (256, 1)))}, True),
        ({"placement": Placement("explicit", "near", ((3,), (255, 1)))}, False),
        ({"boundary": "int32_bytes"}, False),  # aliased wherever it can be
        ({"boundary": "int32_bytes", "pool": "dense"}, True),
    ],
)
def test_large_is_what_needs_more_than_a_gibibyte_of_its_own(change: dict[str, object], large: bool) -> None:
    assert turns.is_large(replace(SMALL, **change)) == large  # type: ignore[arg-type]
