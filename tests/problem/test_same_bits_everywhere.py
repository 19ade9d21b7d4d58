"""A case has the same bits on every device: the seeds of a record are enough to rebuild it anywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch

from harness.case import Case, Rows
from harness.problem.admission import LAWS
from harness.problem.problem import build_problem

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DIGEST = "e3ef44e2cfeac9c3c59bbde4bacbaaa0c12d1639c5a17b2c216a81a9f40d2af3"


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_are_those_of_every_other_device(device: str) -> None:
    digest = hashlib.sha256()
    for data in LAWS:
        for kv_dtype in ("auto", "fp8_e4m3", "fp8_e5m2"):
            rows = Rows("mix", (40, 1, 4), (100, 300, -2))
            case = Case("m", "k", rows, kv_dtype=kv_dtype, sliding_window=33, sinks=True, data=data)
            problem = build_problem(case, torch.device(device))
            assert problem.sinks is not None
            for tensor in (problem.q, problem.k, problem.v, problem.sinks):
                digest.update(tensor.float().cpu().numpy().tobytes())
    assert digest.hexdigest() == DIGEST
