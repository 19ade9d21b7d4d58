"""Large cases take turns on a device; small ones, and those whose pool is aliased, wait for nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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


def granted(lock: Path) -> bool:
    """Whether another process gets that turn now."""
    ask = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", ask, lock], capture_output=True, check=False).returncode == 0


def test_a_turn_is_one_processs_until_it_is_given_back(tmp_path: Path) -> None:
    first, second = ({"CUDA_VISIBLE_DEVICES": device} for device in ("MIG-GPU-7/0", "1"))
    mine = turns.lock_of(tmp_path, first)
    with turns.turn(LARGE, tmp_path, first):
        assert not granted(mine)
        assert granted(turns.lock_of(tmp_path, second))
        child = os.fork()  # as a kernel might, and leave it behind
        if child == 0:
            signal.pause()
    try:
        assert granted(mine)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with turns.turn(SMALL, tmp_path, first):
        assert granted(mine)


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
        ({"rows": Rows("long", (1, 1), (130_000, 131_072))}, False),
        ({"rows": Rows("long", (1, 1), (131_072, 131_072))}, True),  # 257 pages
        ({"boundary": "bytes31"}, False),  # aliased wherever it can be
        ({"boundary": "bytes31", "pool": "dense"}, True),
        ({"boundary": "bytes31", "boundary_target": "out"}, False),
        ({"boundary": "bytes31", "boundary_target": "out", "num_pages": 257}, True),
    ],
)
def test_large_is_what_needs_more_than_a_gibibyte_of_its_own(change: dict[str, object], large: bool) -> None:
    assert turns.is_large(replace(SMALL, **change)) == large  # type: ignore[arg-type]
