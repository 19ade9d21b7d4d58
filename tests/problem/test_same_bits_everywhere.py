"""A case has the same bits on every device and in every version: the seeds of a record rebuild it anywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch

from harness.case import Case, Rows
from harness.problem.admission import DESCALES, LAWS
from harness.problem.problem import Problem, build_problem

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = Rows("mix", (40, 1, 4), (100, 300, -2))
# One line per law: a new law adds a line and changes none.
BITS = {
    "normal": "ada1abe2ef83a2c6f6711185ed993ec8e3b9f42206a846c3b0f68dd699e63ae8",
    "probe": "0b582852c8ab16222acb093f9b9630547634fbc480fe1ad76dda9b2bb1f718a0",
    "needle": "f3fc5fa68e4a88f522ba2fe0b135a00af7ad225925976eecb753a60c5b8a7f7e",
    "uniform": "9c0de20ebe1af37ad39a34a0253af350bfaa5ebb900ba6d62ade1a8440dafdcb",
    "outliers": "44d0ab61133511f595f05d1304fd8ae8e24ad37c314b1704fb3652cb02002511",
    "negative": "f4f8721898de16985c21e3512a594a4cf3b7371b7d8ecfcd70bcedc9e8f1be02",
    "needle_edges": "59ebeeb51c902814aef2280d219777ebcc5dcff8d45b45043fe4f23a3dc938cb",
    "rising": "428d6c5b7b841663e37322ec59c76062d4f33b9586a401463965a719ad133f05",
    "falling": "18a8ee3436eb33ccf1ba411f8b210aad89ddafde21a694afe43972dbbad508e3",
    "large": "b7c6e95d1cb3ae12c3348612b0dbfcb2cee79e188fe05282581f98b01a6112d5",
    "biased": "ed12b3946dea26a0e581b2d39245ed0c576479fbb77d9867eababd22036c2e20",
    "bar_codes": "e1b86be4fc4fc50819e3cfd5d9d35151c10d9f258de736f04dd887ab85b7fe46",
    "tiny": "23c86d4e911c728373aec6f9f35039381aee8d60a5c6fb366763736eac6bc76b",
}
PAGE_BITS = {
    "per_tensor": "ddf9d674c3b8a050311f6a422b3f61811d57adf4295a2f015a370848120269d3",
    "quiet": "c9dd6b2fafc75ea21ef359e3e41e072f7c79e38991e55ee5dda674dd5f24d1d7",
    "loud": "8248006645efe1009f11b4f2a4ea4d0a6facbb5db9f44f89f340108c5984ee21",
    "one": "9b89c80dc7cf16788bb019905d221d65804b4e43ff3efe3721d434962c4d3afd",
}


def digest(problems: list[Problem]) -> str:
    """SHA-256 over q, k, v, sinks and descales."""
    found = hashlib.sha256()
    for p in problems:
        for tensor in (p.q, p.k, p.v, p.sinks, p.page_descales):
            if tensor is not None:
                found.update(tensor.float().cpu().numpy().tobytes())
        found.update(repr((p.k_scale, p.v_scale)).encode())
    return found.hexdigest()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("data", LAWS)
def test_laws_have_the_bits_of_every_other_device(data: str, device: str) -> None:
    cases = [
        Case("m", "k", ROWS, kv_dtype=kv_dtype, sliding_window=33, sinks=True, data=data)
        for kv_dtype in ("auto", "fp8_e4m3", "fp8_e5m2")
    ]
    assert digest([build_problem(case, torch.device(device)) for case in cases]) == BITS[data]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("descales", DESCALES)
def test_descales_have_the_bits_of_every_other_device(descales: str, device: str) -> None:
    cases = [Case("m", "k", ROWS, kv_dtype="fp8_e4m3", descales=descales, data=data) for data in ("normal", "needle")]
    assert digest([build_problem(case, torch.device(device)) for case in cases]) == PAGE_BITS[descales]
